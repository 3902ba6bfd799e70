"""`throttle reset`: return GPUs to default clocks without a daemon."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from throttle.actuation.backends import make_backend
from throttle.actuation.restore import restore
from throttle.commands.configuration import add_configuration, read_configuration

if TYPE_CHECKING:
    import argparse

    from throttle.actuation.hand import ClockChange


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "reset",
        help="return GPUs to default clocks without a daemon",
        description="Reset every GPU that a daemon which is gone may have left slow, as its "
        "records say. A GPU that a running daemon holds is left alone: use `throttle release`.",
    )
    parser.add_argument(
        "--all-configured", action="store_true", help="reset every configured GPU as well"
    )
    add_configuration(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Reset; 0 when every GPU that was named is at default clocks."""
    config = read_configuration(arguments)
    backend = make_backend(config.backend, config.simulated_gpus)
    try:
        uuids = (config.gpus or backend.uuids()) if arguments.all_configured else ()
        holder = f"`throttle reset`, process {os.getpid()}"
        results = restore(
            backend, config.state_directory, uuids, config.actuation, tell=_ignore, holder=holder
        )
    finally:
        backend.close()
    for uuid, problem in results.items():
        print(problem or f"{uuid}: default clocks", file=sys.stderr if problem else sys.stdout)
    if not results:
        print("no GPU was left slow", file=sys.stderr)
    return 1 if any(results.values()) else 0


def _ignore(_: ClockChange) -> None:
    """What was written is printed at the end."""
