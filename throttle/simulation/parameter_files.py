"""TOML tables into frozen dataclasses, with errors that name the key."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from typing import TYPE_CHECKING, Any, TypeVar

from throttle.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        InvalidInputError: The file does not parse.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInputError(path.name, str(error), "TOML") from error


def from_table(kind: type[T], table: object, name: str) -> T:
    """Build a dataclass from a TOML table whose keys are exactly its fields.

    A field with a default may be missing. Fields may be numbers, text, other dataclasses, or
    mappings from text to either.

    Args:
        kind: The dataclass.
        table: What the file holds there.
        name: Dotted name of the table, for messages.

    Raises:
        InvalidInputError: A key is unknown or missing, or a value is of the wrong type or not
            finite.
    """
    if not isinstance(table, dict):
        raise InvalidInputError(name, table, "a table")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise InvalidInputError(f"{name}.{key}", table[key], f"keys {', '.join(fields)}")
    hints = typing.get_type_hints(kind)
    values: dict[str, object] = {}
    for key, field in fields.items():
        if key in table:
            values[key] = _value(hints[key], table[key], f"{name}.{key}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InvalidInputError(f"{name}.{key}", None, "a value: this key is required")
    return kind(**values)


def _value(hint: Any, value: object, name: str) -> object:  # noqa: ANN401 - a type of any kind
    if dataclasses.is_dataclass(hint):
        return from_table(typing.cast("type[object]", hint), value, name)
    if typing.get_origin(hint) is types.UnionType:  # a table that may be absent
        return _value(typing.get_args(hint)[0], value, name)
    if typing.get_origin(hint) is not None:  # a mapping from text to something
        if not isinstance(value, dict):
            raise InvalidInputError(name, value, "a table")
        inner = typing.get_args(hint)[1]
        return {key: _value(inner, entry, f"{name}.{key}") for key, entry in value.items()}
    if hint is str:
        if not isinstance(value, str):
            raise InvalidInputError(name, value, "text")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidInputError(name, value, "a finite number")
    if hint is int:
        if value != int(value):
            raise InvalidInputError(name, value, "a whole number")
        return int(value)
    return float(value)


def with_overrides(table: Mapping[str, Any], overrides: Mapping[str, object]) -> dict[str, Any]:
    """A copy of a table with some dotted keys replaced, such as `power.limit_watts`.

    Raises:
        InvalidInputError: A dotted key leads through something that is not a table, or to a table
            or key that is not there.
    """
    result = {key: dict(v) if isinstance(v, dict) else v for key, v in table.items()}
    for dotted, value in overrides.items():
        node: dict[str, Any] = result
        *path, last = dotted.split(".")
        for part in path:
            if not isinstance(node.get(part), dict):
                allowed = ", ".join(key for key, v in node.items() if isinstance(v, dict))
                raise InvalidInputError(dotted, value, f"a key under one of {allowed or 'none'}")
            node[part] = dict(node[part])
            node = node[part]
        if last not in node or isinstance(node[last], dict):
            allowed = ", ".join(key for key, v in node.items() if not isinstance(v, dict))
            raise InvalidInputError(dotted, value, f"one of the keys {allowed}")
        node[last] = value
    return result
