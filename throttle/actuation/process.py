"""The privileged process: the only writer of clocks. No network, nothing but the standard library.

Started by the supervisor with one end of a socket pair; the controller has the other. It ends when
the controller does, on SIGTERM, and when the supervisor dies, and returns every GPU to default
clocks first. Here it starts and gives up what it does not need; `service.py` is its work.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from throttle.actuation import privileges
from throttle.actuation.audit import AuditLog
from throttle.actuation.backends import make_clock_driver
from throttle.actuation.journal import GpuRecord
from throttle.actuation.orders import Orders
from throttle.actuation.restore import restore
from throttle.actuation.service import Service
from throttle.errors import ConflictError, NotFoundError, ThrottleError

if TYPE_CHECKING:
    from collections.abc import Callable

    from throttle.actuation.backend import ClockDriver

#: For a daemon that was killed: its actuator resets its GPUs, then lets them go.
_PATIENCE_SECONDS: Final = 2.0


def run(orders: Orders, opener: Callable[[Orders], ClockDriver]) -> int:
    """Be the actuator, or reset GPUs and end when there is no channel.

    Args:
        orders: What to do.
        opener: Opens the driver.

    Raises:
        ThrottleError: It cannot start; no GPU has been slowed.
    """
    if orders.parent:
        privileges.die_with_parent(orders.parent, signal.SIGTERM)
    directory, settings = Path(orders.directory), orders.settings
    backend = opener(orders)
    uuids = orders.gpus or backend.uuids()
    if orders.channel < 0:
        log = AuditLog(as_json=orders.log_json)
        results = restore(
            backend, directory, uuids, settings, tell=log.change, holder=orders.holder
        )
        log("clocks_restored", problems={uuid: text for uuid, text in results.items() if text})
        log.flush(1.0)
        return 1 if any(results.values()) else 0
    channel = socket.socket(fileno=orders.channel)
    check_channel(channel, orders.parent)
    for uuid in uuids:
        if uuid not in backend.uuids():
            raise NotFoundError(
                f"GPU {uuid!r} is not on this machine; there are: "
                f"{', '.join(backend.uuids()) or 'none'}"
            )
    records = {
        uuid: GpuRecord(directory, uuid, orders.holder, _PATIENCE_SECONDS) for uuid in sorted(uuids)
    }
    records = {uuid: records[uuid] for uuid in uuids}
    skipped = [privileges.leave_the_network(), drop_privileges()]
    log = AuditLog(as_json=orders.log_json)
    for problem in filter(None, skipped):
        log("privileges_not_dropped", "warning", problem=problem)
    # GPUs of an earlier configuration that an earlier process has left slow
    for uuid, problem in restore(
        backend, directory, (), settings, tell=log.change, holder=orders.holder
    ).items():
        if uuid not in records:
            log("left_slow", "warning", gpu_uuid=uuid, problem=problem or "it was; reset now")
    try:
        return Service(channel, backend, records, orders, log).run()
    finally:
        log.flush(1.0)


def check_channel(channel: socket.socket, parent: int) -> None:
    """Refuse a channel that the supervisor has not made.

    Raises:
        ConflictError: It is of another kind, or another process made it.
    """
    kind = (channel.family, channel.type)
    if kind != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        raise ConflictError(f"the channel is {kind}; allowed: a Unix socket of packets")
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process_id, user_id, _ = struct.unpack("3i", credentials)
    if (process_id, user_id) != (parent, os.getuid()):
        raise ConflictError(
            f"the channel was made by process {process_id} of user {user_id}; allowed: the "
            f"supervisor, process {parent} of user {os.getuid()}"
        )


def drop_privileges() -> str:
    """Keep what the driver asks for; returns what could not be dropped."""
    privileges.forbid_new_privileges()
    return privileges.keep_capabilities(privileges.CAP_SYS_ADMIN)


def open_backend(orders: Orders) -> ClockDriver:
    """The driver that the orders name."""
    simulated_gpus = Path(orders.simulated_gpus) if orders.simulated_gpus else None
    return make_clock_driver(orders.backend, simulated_gpus)


def main(argument: str, opener: Callable[[Orders], ClockDriver] = open_backend) -> int:
    """Run by the supervisor; an error is one line."""
    try:
        return run(Orders.from_json(argument), opener)
    except (ThrottleError, ProcessLookupError) as error:
        print(f"throttle: {error}", file=sys.stderr, flush=True)  # noqa: T201 - as the command line
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
