"""Settings in layers: flags win over the environment, that over the file, that over the defaults.

Works on any tree of frozen dataclasses whose fields are str, int, float, bool, Path,
tuple[str, ...], Literal, one of these or None, or another such dataclass. The text of a setting's
help is the one in the class's `Attributes:`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from throttle.errors import ThrottleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_Settings = TypeVar("_Settings")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class ConfigurationError(ThrottleError):
    """Settings that cannot be used.

    Attributes:
        problems: All of them, one line each.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the tree.

    Attributes:
        key: Dotted name, such as `control.dwell_seconds`.
        kind: Its type.
        default: Its value when no layer says another.
        help: What it is for.
    """

    key: str
    kind: Any
    default: object
    help: str

    @property
    def flag(self) -> str:
        """Its command-line flag."""
        return "--" + self.key.replace(".", "-").replace("_", "-")

    def variable(self, prefix: str) -> str:
        """Its environment variable."""
        return prefix + self.key.replace(".", "__").upper()


@dataclass(frozen=True, slots=True)
class Layer:
    """Values of one source.

    Attributes:
        values: By dotted key; strings, or what TOML makes of a value.
        names: What the source calls each key, for messages.
    """

    values: Mapping[str, object]
    names: Mapping[str, str]


def settings_of(cls: type[Any], prefix: str = "") -> Iterator[Setting]:
    """Every leaf of a tree of dataclasses, in order."""
    kinds = typing.get_type_hints(cls)
    helps = _attribute_texts(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield from settings_of(typing.cast("type[Any]", kind), f"{prefix}{field.name}.")
        else:
            yield Setting(prefix + field.name, kind, field.default, helps.get(field.name, ""))


def file_layer(path: Path) -> Layer:
    """The values in a TOML file.

    Raises:
        ConfigurationError: It cannot be read.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError([f"{path} cannot be read: {error.strerror}"]) from None
    except ValueError as error:  # no UTF-8, or no TOML
        raise ConfigurationError([f"{path} is not TOML: {error}"]) from None
    values = dict(_flatten(document, ""))
    return Layer(values, {key: f"{key} in {path}" for key in values})


def environment_layer(
    environ: Mapping[str, str], prefix: str, no_setting: Callable[[str], bool]
) -> Layer:
    """The values in environment variables.

    Args:
        environ: The variables.
        prefix: What the names of ours begin with; `__` stands for a dot.
        no_setting: Tells names with the prefix that are no settings.
    """
    names = {
        name.removeprefix(prefix).lower().replace("__", "."): name
        for name in environ
        if name.startswith(prefix) and not no_setting(name)
    }
    return Layer({key: environ[name] for key, name in names.items()}, names)


def flag_layer(values: Mapping[str, str]) -> Layer:
    """The values of command-line flags, by dotted key."""
    flags = {key: Setting(key, str, "", "").flag for key in values}
    return Layer(values, flags)


def build(
    cls: type[_Settings], layers: list[Layer]
) -> tuple[_Settings | None, list[tuple[str, str]]]:
    """Make the tree from layers, the strongest first.

    Returns:
        The tree, with defaults in place of values that cannot be used, or None if even these do not
        fit together; and every problem found, as key and text.
    """
    problems: list[tuple[str, str]] = []
    chosen: dict[str, object] = {}
    known = {setting.key: setting for setting in settings_of(cls)}
    for layer in reversed(layers):
        for key, raw in layer.values.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(known)}"
                problems.append((key, f"{layer.names[key]} is not a setting; {hint}"))
                continue
            try:
                chosen[key] = _converted(known[key].kind, raw)
            except ValueError as error:
                problems.append((key, f"{layer.names[key]} is {raw!r}; allowed: {error}"))
    try:
        return _make(cls, chosen, ""), problems
    except ThrottleError as error:
        return None, [*problems, ("", str(error))]


def _make(cls: type[_Settings], chosen: Mapping[str, object], prefix: str) -> _Settings:
    kinds = typing.get_type_hints(cls)
    values: dict[str, object] = {}
    for field in dataclasses.fields(typing.cast("Any", cls)):
        key = prefix + field.name
        if dataclasses.is_dataclass(kinds[field.name]):
            values[field.name] = _make(kinds[field.name], chosen, key + ".")
        elif key in chosen:
            values[field.name] = chosen[key]
    return cls(**values)


def _flatten(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _converted(kind: Any, raw: object) -> object:  # noqa: ANN401, PLR0911 - a type, one return each
    """The value of a setting, or ValueError that says what is allowed."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        allowed = typing.get_args(kind)
        if raw in allowed:
            return raw
        raise ValueError(", ".join(allowed))
    if origin is types.UnionType:  # something or None, which is written as an empty string
        return None if raw == "" else _converted(typing.get_args(kind)[0], raw)
    if origin is tuple:
        return _texts(raw)
    if kind is bool:
        return _boolean(raw)
    if kind is int:
        return _number(raw, int, "a whole number")
    if kind is float:
        return _number(raw, float, "a finite number")
    if not isinstance(raw, str):
        raise ValueError("a text")  # noqa: TRY004 - one kind of error for every kind of value
    return Path(raw) if kind is Path else raw


def _texts(raw: object) -> tuple[str, ...]:
    if isinstance(raw, str):
        return tuple(part for part in (piece.strip() for piece in raw.split(",")) if part)
    if isinstance(raw, list) and all(isinstance(each, str) for each in raw):
        return tuple(raw)
    raise ValueError("a list of texts, or one text with commas")


def _boolean(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    text = raw.lower() if isinstance(raw, str) else ""
    if text not in _TRUE + _FALSE:
        raise ValueError("true or false")
    return text in _TRUE


def _number(raw: object, kind: type[int | float], allowed: str) -> float:
    fits = isinstance(raw, str | int | kind) and not isinstance(raw, bool)
    try:
        value = kind(str(raw)) if fits else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(allowed)
    return value


def _attribute_texts(cls: type[Any]) -> dict[str, str]:
    """The descriptions under `Attributes:` in a class's docstring."""
    _, _, attributes = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in attributes.splitlines():
        if match := re.fullmatch(r" {4}(\w+): (.*)", line):
            name = match[1]
            texts[name] = match[2]
        elif name and line.startswith("        "):
            texts[name] += " " + line.strip()
        elif line.strip():
            break
    return texts
