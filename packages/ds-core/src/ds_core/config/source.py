"""Reading a configuration: a dictionary, a JSON file, JSON text, or base64 of JSON text."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from .._json import plain

if TYPE_CHECKING:
    from ..protocols import Json

Source: TypeAlias = "Mapping[str, object] | str | Path"
"""Where a configuration comes from."""

_FORMS = "a dictionary, the path of a JSON file, JSON text or base64 of it"


def read(source: Source) -> dict[str, Json]:
    """Read a configuration into plain JSON values; the source is copied, never kept.

    Args:
        source: A dictionary; the path of a JSON file; JSON text; or base64 of JSON text, as DeepSpeed's launcher
            passes it on a command line.

    Returns:
        The configuration as it stands there, with nothing checked but that it is JSON.

    Raises:
        ValueError: If the source is none of these, is no JSON object, or has one key twice.

    Example:
        >>> read('{"train_batch_size": 8}')
        {'train_batch_size': 8}
    """
    if isinstance(source, Mapping):
        return cast("dict[str, Json]", plain(source, ""))
    if not isinstance(cast("object", source), (str, os.PathLike)):
        raise ValueError(f"a configuration is required: {_FORMS}; got {source!r}")
    text, origin = _text(source)
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{origin} must hold a JSON object {{...}}, got {value!r}")
    return value


def _text(source: str | Path) -> tuple[str, str]:
    """Return the JSON text and what to call its origin."""
    text = str(source)
    if text.lstrip().startswith("{"):
        return text, "the configuration given as text"
    path = Path(text)
    # A long base64 text is no path, and asking the file system for it would raise.
    if len(text) < 4096 and path.exists():
        return path.read_text(encoding="utf-8"), f"the file {text}"
    try:
        decoded = base64.urlsafe_b64decode(text.encode("ascii")).decode("utf-8")
    except (UnicodeError, binascii.Error):
        decoded = ""
    if not decoded.lstrip().startswith("{"):
        raise ValueError(f"a configuration is {_FORMS}; got {text!r}, which is none of these: no such file exists")
    return decoded, "the configuration given as base64"


def _without_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    values: dict[str, Json] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(
                f"the key {key!r} stands twice in one JSON object, as {values[key]!r} and as {value!r}; remove one"
            )
        values[key] = value
    return values
