"""The JSON Schema of a configuration, for editors and for people."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ..schedules import SCHEDULES
from .sections import OWNED, ROLE_GROUPS, SELECTING, ZERO, Config

if TYPE_CHECKING:
    from ..protocols import Json

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Json]:
    """Return the JSON Schema of the effective configuration.

    Settings of plugins are objects of any content: each plugin checks its own.

    Returns:
        A schema of draft 2020-12.

    Example:
        >>> schema()["properties"]["gradient_clipping"]["default"]
        1.0
    """
    from pydantic import TypeAdapter

    hints = typing.get_type_hints(Config)
    names = [each.name for each in fields(Config) if each.name in OWNED - SELECTING]
    kinds = {**{name: hints[name] for name in names}, **{kind.__name__: kind for kind in SCHEDULES}}
    parts, shared = TypeAdapter.json_schemas([(key, "validation", TypeAdapter(kind)) for key, kind in kinds.items()])
    definitions: dict[str, Any] = shared["$defs"]
    for kind in kinds.values():
        if isinstance(kind, type) and is_dataclass(kind):
            _describe(definitions[kind.__name__], kind)
    properties: dict[str, Any] = {name: parts[name, "validation"] for name in names}
    properties["optimizer"] = _selection({"type": {"type": "string"}, "params": {"type": "object"}})
    properties["scheduler"] = {
        "oneOf": [
            _selection({"type": {"const": kind.__name__}, "params": parts[kind.__name__, "validation"]})
            for kind in SCHEDULES
        ]
    }
    properties[ZERO] = {"type": "object"}
    for role in ROLE_GROUPS:
        properties[role] = {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        }
    whole: dict[str, Any] = {
        "$schema": _DRAFT,
        "type": "object",
        "properties": properties,
        "$defs": definitions,
    }
    _describe(whole, Config)
    return whole


def _selection(properties: Mapping[str, Json]) -> dict[str, Json]:
    return {"type": "object", "properties": properties, "required": ["type"], "additionalProperties": False}


def _describe(schema_of_class: dict[str, Any], kind: type) -> None:
    """Add the fields' defaults and docstrings, and that there are no other fields."""
    docs = field_docs(kind)
    defaults = {each.name: each.default for each in fields(kind) if each.default is not MISSING}
    schema_of_class["additionalProperties"] = False
    for name, part in schema_of_class["properties"].items():
        if name in docs:
            part["description"] = docs[name]
        if name in defaults:
            part["default"] = defaults[name]


def field_docs(kind: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, which only its source has.

    Example:
        >>> from .sections import Kernels
        >>> list(field_docs(Kernels))
        ['backend']
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    docs = {}
    if isinstance(body, ast.ClassDef):
        for statement, following in zip(body.body, body.body[1:]):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    docs[name] = " ".join(text.split())
    return docs
