"""`throttle check-config`: check a configuration and print what it comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from throttle.commands.configuration import add_configuration, read_configuration, shown
from throttle.daemon.config import DaemonConfig
from throttle.daemon.layers import settings_of

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "check-config",
        help="check a configuration and print what it comes to",
        description="Read the configuration as `throttle serve` would, report everything that is "
        "wrong with it, or print every setting.",
    )
    add_configuration(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check; 0 when `throttle serve` could use it."""
    config = read_configuration(arguments)
    for setting in settings_of(DaemonConfig):
        value: object = config
        for name in setting.key.split("."):
            value = getattr(value, name)
        print(f"{setting.key} = {shown(value)}")
    return 0
