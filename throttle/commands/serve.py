"""`throttle serve`: run the daemon: a supervisor, an unprivileged controller, an actuator."""

from __future__ import annotations

import math
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
    import socket
    from collections.abc import Callable, Sequence

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

    def control(channel: socket.socket) -> int:
        from throttle.daemon.assembly import build_server  # noqa: PLC0415 - after the fork
        from throttle.daemon.server import serve_until_signal  # noqa: PLC0415 - as above

        daemon = build_server(
            config,
            read_config=lambda: read_configuration(arguments),
            config_file=configuration_file(arguments),
            channel=channel,
        )
        return serve_until_signal(daemon)

    return run_supervised(config, "serve", control, actuator_command)


def run_supervised(
    config: DaemonConfig,
    command: str,
    control: Callable[[socket.socket], int],
    actuator_command: Sequence[str] = ACTUATOR_COMMAND,
    limit_seconds: float = math.inf,
) -> int:
    """Split into supervisor, actuator and controller; this returns in the first and the last.

    Args:
        config: A configuration without problems.
        command: Of the command line, for who finds a GPU taken.
        control: Serves in the controller's process, over its end of the channel, with SIGTERM and
            SIGINT blocked; returns an exit status.
        actuator_command: Starts the actuator when its orders are appended.
        limit_seconds: After so long, stop as on SIGTERM.

    Returns:
        Exit status: 0 when every GPU is back at default clocks.
    """
    holder = f"`throttle {command}`, process {os.getpid()} at {config.addresses}"
    supervisor = Supervisor(
        actuator_orders(config, holder),
        config.actuation.controller_user,
        config.drain_seconds + _STOP_MARGIN_SECONDS,
        actuator_command,
    )
    channel = supervisor.start()
    if channel is None:
        return supervisor.watch(limit_seconds)
    # One prediction is too small for threads, and XGBoost reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from throttle.actuation.remote import ActuatorEndedError  # noqa: PLC0415 - after the fork
    from throttle.daemon.logs import configure_logs  # noqa: PLC0415 - after the line above

    configure_logs(config.log_level, config.log_format)
    try:
        return control(channel)
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
