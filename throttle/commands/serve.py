"""`throttle serve`: run the daemon: a supervisor, an unprivileged controller, an actuator."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from throttle.actuation.orders import Orders
from throttle.actuation.supervisor import ACTUATOR_COMMAND, Supervisor
from throttle.commands.configuration import (
    add_configuration,
    configuration_file,
    read_configuration,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from throttle.daemon.config import DaemonConfig

#: What stopping the controller may take beyond the drain before it is killed, seconds.
_STOP_MARGIN_SECONDS: Final = 7.0


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


def run(arguments: argparse.Namespace, actuator_command: Sequence[str] = ACTUATOR_COMMAND) -> int:
    """Serve; 0 when every GPU is back at default clocks."""
    config = read_configuration(arguments)
    supervisor = Supervisor(
        actuator_orders(config, f"`throttle serve`, process {os.getpid()} at {config.addresses}"),
        config.actuation.controller_user,
        config.drain_seconds + _STOP_MARGIN_SECONDS,
        actuator_command,
    )
    channel = supervisor.start()
    if channel is None:
        return supervisor.watch()
    # One prediction is too small for threads, and XGBoost reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from throttle.actuation.remote import ActuatorEndedError  # noqa: PLC0415 - after the fork
    from throttle.daemon.assembly import build_server  # noqa: PLC0415 - after the line above
    from throttle.daemon.logs import configure_logs  # noqa: PLC0415 - after the line above
    from throttle.daemon.server import serve_until_signal  # noqa: PLC0415

    configure_logs(config.log_level, config.log_format)
    try:
        daemon = build_server(
            config,
            read_config=lambda: read_configuration(arguments),
            config_file=configuration_file(arguments),
            channel=channel,
        )
        return serve_until_signal(daemon)
    except ActuatorEndedError:
        return 1  # it has said why


def actuator_orders(config: DaemonConfig, holder: str) -> Orders:
    """What the privileged process is told."""
    as_json = config.log_format == "json" or (
        config.log_format == "auto" and not sys.stderr.isatty()
    )
    return Orders(
        backend=config.backend,
        simulated_gpus=str(config.simulated_gpus or ""),
        gpus=config.gpus,
        directory=str(config.state_directory),
        holder=holder,
        settings=config.actuation,
        log_json=as_json,
    )
