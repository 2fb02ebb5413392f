"""Turning JSON into a dataclass, with errors that name the key, the value and what was expected."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from .._json import is_quoted
from ..registry import nearest
from .no_effect import NO_EFFECT

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from ..protocols import Json

T = TypeVar("T")

_UNQUOTED = ("int_type", "float_type", "bool_type")  # pydantic's errors about what JSON writes without quotes


def validated(kind: type[T], value: Json, path: str, others: Iterable[str] = ()) -> T:
    """Make a value of a type from JSON.

    Nothing is guessed: a string is no number and a boolean is no integer. A float without a fraction is an
    integer where one is expected, because JSON files write ``5e8``.

    Args:
        kind: The type, usually a frozen dataclass; its ``__post_init__`` may check bounds by ValueError.
        value: What the file has.
        path: Dotted path of the value, for messages.
        others: Keys that are valid in files, though the type has no such field: one of them may have been meant.

    Returns:
        The value.

    Raises:
        ValueError: If there are unknown or missing keys, wrong types, or values out of bounds; all are named.

    Example:
        >>> from .sections import Kernels
        >>> validated(Kernels, {"backend": "cpu"}, "kernels")
        Kernels(backend='cpu')
    """
    # Imported here: pydantic takes a quarter of a second, and most programs parse one configuration.
    from pydantic import TypeAdapter, ValidationError

    problems = list(_unknown_keys(kind, value, path, others))
    if problems:
        raise ValueError("\n".join(problems))
    text = json.dumps(_with_integers(value))
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
    raise ValueError("\n".join(_messages(found, value, path)))


def unknown_key(path: str, value: Json, known: Iterable[str]) -> str:
    """Return the message about a key that does not exist, ``known`` being the keys beside it."""
    section, _, key = path.rpartition(".")
    if not key[:1].isalpha():
        return f"unknown key {path} = {value!r}; no key starts with {key[:1]!r}, and JSON has no comments: remove it"
    near = nearest(key, known)
    if near is None:
        return f"unknown key {path} = {value!r}"
    meant = f"{section}.{near}" if section else near
    idle = f" It has no effect: {NO_EFFECT[meant]}" if meant in NO_EFFECT else ""
    return f"unknown key {path} = {value!r}; did you mean {meant!r}?{idle}"


def _unknown_keys(kind: object, value: Json, path: str, others: Iterable[str] = ()) -> Iterator[str]:
    """Yield a message for each key that no field of the dataclass, or of those in it, has."""
    kind = _dataclass_in(kind)
    if kind is not None and isinstance(value, list):
        for index, each in enumerate(value):
            yield from _unknown_keys(kind, each, f"{path}[{index}]")
    if kind is None or not isinstance(value, Mapping):
        return
    hints = typing.get_type_hints(kind)
    for key, inner in value.items():
        if key not in hints:
            yield unknown_key(f"{path}.{key}", inner, {*hints, *others})
        else:
            yield from _unknown_keys(hints[key], inner, f"{path}.{key}")


def _dataclass_in(kind: object) -> type | None:
    """Return the dataclass that a type is, may be, or has a row of: ``X``, ``X | None`` or ``tuple[X, ...]``."""
    for each in (kind, *typing.get_args(kind)):
        if isinstance(each, type) and dataclasses.is_dataclass(each):
            return each
    return None


def _with_integers(value: Json) -> Json:
    """Write floats without a fraction as integers, which pydantic takes for either."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _with_integers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_integers(each) for each in value]
    return value


def _messages(errors: Iterable[ErrorDetails], value: Json, path: str) -> list[str]:
    """Return one message for each key concerned; the members of a union complain one by one."""
    problems: dict[str, str] = {}
    for error in errors:
        where, got = _locate(error["loc"], value, path)
        expected = error["msg"].removeprefix("Input should be ")
        if error["type"] == "missing":
            missing = f"{where}.{error['loc'][-1]}"
            problems[missing] = f"{missing} is missing, and has no default"
        elif error["type"] == "value_error":
            problems[where] = f"{where}: {error['ctx']['error']}"
        elif where in problems:
            problems[where] += f" or {expected}"
        else:
            cure = " (write it without quotes)" if error["type"] in _UNQUOTED and is_quoted(got) else ""
            problems[where] = f"{where}: got {got!r}{cure}, must be {expected}"
    return [*problems.values()]


def _locate(loc: tuple[int | str, ...], value: Json, path: str) -> tuple[str, Json]:
    """Follow an error's location as far as it goes: its tail may name a member of a union."""
    for step in loc:
        if isinstance(value, Mapping) and step in value:
            value, path = value[str(step)], f"{path}.{step}"
        elif isinstance(value, list) and isinstance(step, int):
            value, path = value[step], f"{path}[{step}]"
        else:
            break
    return path, value
