"""`throttle serve`: run the daemon."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from throttle.commands.configuration import (
    add_configuration,
    configuration_file,
    read_configuration,
)

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "serve",
        help="run the daemon",
        description="Serve engines until SIGTERM or SIGINT, then return all clocks to default. "
        "A flag wins over the environment (THROTTLE_...), that over the file, that over the "
        "default.",
    )
    add_configuration(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve; 0 when every GPU is back at default clocks."""
    # One prediction is too small for threads, and XGBoost reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from throttle.daemon.logs import configure_logs  # noqa: PLC0415 - after the line above
    from throttle.daemon.server import build_server, serve_until_signal  # noqa: PLC0415

    config = read_configuration(arguments)
    configure_logs(config.log_level, config.log_format)
    return serve_until_signal(
        build_server(
            config,
            read_config=lambda: read_configuration(arguments),
            config_file=configuration_file(arguments),
        )
    )
