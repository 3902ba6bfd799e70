"""The daemon's settings as flags, for the commands that take them."""

from __future__ import annotations

import os
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from throttle.daemon.config import FILE_VARIABLE, VARIABLE_PREFIX, DaemonConfig, load_config
from throttle.daemon.layers import Setting, settings_of

if TYPE_CHECKING:
    import argparse

#: Where the flags' values are kept in the parsed arguments.
_FLAG_PREFIX = "setting:"


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and one flag for each setting."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"TOML file (environment: {VARIABLE_PREFIX}CONFIG)",
    )
    for setting in settings_of(DaemonConfig):
        options: dict[str, Any] = {"metavar": _metavar(setting)}
        if setting.kind is bool:
            options |= {"nargs": "?", "const": "true"}
        parser.add_argument(
            setting.flag,
            dest=_FLAG_PREFIX + setting.key,
            help=f"{setting.help} Default: {shown(setting.default)}.".replace("%", "%%"),
            **options,
        )


def read_configuration(arguments: argparse.Namespace) -> DaemonConfig:
    """The configuration of flags, environment, file and defaults.

    Raises:
        ConfigurationError: Lists everything that is wrong.
    """
    flags = {
        name.removeprefix(_FLAG_PREFIX): value
        for name, value in vars(arguments).items()
        if name.startswith(_FLAG_PREFIX) and value is not None
    }
    return load_config(flags, os.environ, arguments.config)


def configuration_file(arguments: argparse.Namespace) -> Path | None:
    """The file that is read, if any."""
    named = arguments.config or os.environ.get(FILE_VARIABLE)
    return Path(named) if named else None


def shown(value: object) -> str:
    """A value as an operator would write it."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value) or "empty"
    return str(value) or "empty"


def _metavar(setting: Setting) -> str:
    if typing.get_origin(setting.kind) is typing.Literal:
        return "|".join(typing.get_args(setting.kind))
    if setting.kind is bool:
        return "true|false"
    return setting.key.rsplit("_", 1)[-1].rsplit(".", 1)[-1].upper()
