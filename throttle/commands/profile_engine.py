"""`throttle profile-engine`: record a real engine over all clocks, or at those that it takes."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

from throttle.commands.configuration import add_configuration, read_configuration
from throttle.commands.serve import run_supervised
from throttle.errors import InvalidInputError

if TYPE_CHECKING:
    import argparse
    import socket
    from collections.abc import Callable

    from throttle.daemon.config import DaemonConfig


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "profile-engine",
        help="record real engines while clocks follow an exploration plan",
        description="Serve engines as `throttle serve` does, but choose clocks over an exploration "
        "plan instead of by a bundle, record every iteration, and stop after a time. An engine in "
        "mode ACT is explored; one in mode RECORD is only observed at the clocks that its GPUs "
        "take by themselves. Send load meanwhile, with `throttle load` or your own.",
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="default: %(default)s")
    add_configuration(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Record; 0 when every GPU is back at default clocks."""
    if not 0.0 < arguments.minutes < float("inf"):
        raise InvalidInputError("--minutes", arguments.minutes, "finite, above 0")
    config = read_configuration(arguments)

    def control(channel: socket.socket) -> int:
        ending = {signal.SIGTERM, signal.SIGINT}
        return 0 if record(config, lambda: signal.sigwait(ending), channel) else 1

    return run_supervised(config, "profile-engine", control, limit_seconds=60.0 * arguments.minutes)


def record(
    config: DaemonConfig, wait: Callable[[], object], channel: socket.socket | None = None
) -> bool:
    """Serve and record until it is time to stop.

    Args:
        config: Of the daemon; its `recordings` must be set.
        wait: Returns when it is.
        channel: To the privileged process; None sets clocks in this one, for tests.

    Returns:
        Whether every GPU is known to be at default clocks.

    Raises:
        InvalidInputError: The configuration records nothing.
    """
    from throttle.commands.profile import ExplorationFactory, Round  # noqa: PLC0415 (slow to load)
    from throttle.daemon.assembly import build_server  # noqa: PLC0415

    if config.recordings is None:
        raise InvalidInputError("recordings", None, "a folder to record into")
    before = set(config.recordings.glob("*.parquet"))
    daemon = build_server(config, ExplorationFactory(Round(0, 0.0, (), None)), channel=channel)
    daemon.start()
    try:
        wait()
    finally:
        restored = daemon.stop()  # which resets the clocks and closes the recordings
    for path in sorted(set(config.recordings.glob("*.parquet")) - before):
        print(f"recorded {path}", file=sys.stderr)
    return restored
