"""JSON values: making sure that something is one, or was meant to be, and spelling the state of a schedule as one.

[Note: State as JSON]
JSON has lists for tuples and only strings for keys, so what goes beyond it is spelled out, as an object with one key
that starts with ``$``: ``$tuple``, ``$dict`` and ``$counter`` (lists of pairs of key and value). Anything else, such
as a tensor or an object of a class, is an error that names the place.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .protocols import Json

_TUPLE, _DICT, _COUNTER = "$tuple", "$dict", "$counter"


def plain(value: object, path: str) -> Json:
    """Copy a value, making sure that it is JSON.

    Args:
        value: Tuples become lists, and NumPy's numbers Python's: callers compute sizes with them.
        path: Where it stands, for the error message; empty for a whole that needs no name.

    Returns:
        The copy.

    Raises:
        ValueError: It, or something in it, is no JSON value; the text names the innermost place.

    Example:
        >>> plain({"sizes": (1, 2)}, "")
        {'sizes': [1, 2]}
        >>> plain({"loss": {1: 0.5}}, "")
        Traceback (most recent call last):
        ...
        ValueError: keys must be strings, got 1 in loss
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {_key(key, path): plain(each, _below(path, key)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each, f"{path}[{index}]") for index, each in enumerate(value)]
    raise ValueError(f"{path or 'this'} must be a JSON value, got {value!r} of type {type(value).__name__}")


def is_quoted(value: object) -> bool:
    """Whether a value is a string that would be a number, or true or false, without its quotes.

    Example:
        >>> is_quoted("1e-3"), is_quoted("True"), is_quoted("AdamW"), is_quoted(1e-3)
        (True, True, False, False)
    """
    if not isinstance(value, str):
        return False
    try:
        return isinstance(json.loads(value.casefold()), (bool, int, float))
    except json.JSONDecodeError:
        return False


def encode_state(value: object, path: str) -> Json:
    """Spell the state of a schedule as JSON; see [Note: State as JSON].

    Args:
        value: The state.
        path: Where it stands, for the error message.

    Returns:
        What :func:`decode_state` takes.

    Raises:
        ValueError: Something in it cannot be spelled; the text names the innermost place.

    Example:
        >>> encode_state({"milestones": Counter([3, 5])}, "lr_scheduler")
        {'milestones': {'$counter': [[3, 1], [5, 1]]}}
    """
    if isinstance(value, tuple):
        return {_TUPLE: [encode_state(each, f"{path}[{index}]") for index, each in enumerate(value)]}
    if isinstance(value, list):
        return [encode_state(each, f"{path}[{index}]") for index, each in enumerate(value)]
    if not isinstance(value, Mapping):
        return plain(value, path)
    pairs = {key: encode_state(each, _below(path, key)) for key, each in value.items()}
    if isinstance(value, Counter):
        return {_COUNTER: _pairs(pairs, path)}
    if all(isinstance(key, str) and not key.startswith("$") for key in pairs):
        return pairs
    return {_DICT: _pairs(pairs, path)}


def decode_state(value: Json) -> Any:
    """Invert :func:`encode_state`.

    Example:
        >>> decode_state({"milestones": {"$counter": [[3, 1]]}, "range": {"$tuple": [0, 1]}})
        {'milestones': Counter({3: 1}), 'range': (0, 1)}
    """
    if isinstance(value, list):
        return [decode_state(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    decoded = {key: decode_state(each) for key, each in value.items()}
    if _TUPLE in decoded:
        return tuple(decoded[_TUPLE])
    if _DICT in decoded:
        return dict(decoded[_DICT])
    return Counter(dict(decoded[_COUNTER])) if _COUNTER in decoded else decoded


def _pairs(items: Mapping[Any, Json], path: str) -> list[Json]:
    for key in items:
        if not isinstance(key, (bool, int, float, str, type(None))):
            raise ValueError(f"keys must be numbers or strings, got {key!r} in {path}")
    return [[key, value] for key, value in items.items()]


def _key(key: object, path: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"keys must be strings, got {key!r} in {path or 'the configuration'}")
    return key


def _below(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
