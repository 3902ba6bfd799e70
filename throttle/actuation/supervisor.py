"""The parent of the two processes; fit to be process 1 of a container.

It forwards signals, reaps whatever ends, and ends when either of the two does: whoever started it
starts it again. When the actuator dies with its work undone, it has the GPUs reset. An actuator
that stands still expires no lease, so it is killed, which ends them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Final

from throttle.actuation import privileges
from throttle.actuation.audit import log_line, write_line
from throttle.actuation.process import open_backend, run
from throttle.errors import ActuationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from throttle.actuation.orders import Orders

#: The privileged process; -I: neither the environment nor the working directory choose its code.
ACTUATOR_COMMAND: Final = (sys.executable, "-I", "-m", "throttle.actuation.process")

_FORWARDED: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_WATCHED: Final = _FORWARDED | {signal.SIGCHLD}
#: For the actuator to reset every GPU once its controller is gone, and for the reset without it.
_RESET_SECONDS: Final = 8.0
#: Between two looks at the actuator's pulse, which beats ten times a second.
_TURN_SECONDS: Final = 0.25
#: The actuator may be silent for as long as the controller may, but at least this long: a busy
#: machine keeps a process waiting, too.
_LEAST_SILENCE_SECONDS: Final = 2.0


class Silence:
    """How long a pulse has been missing, while whoever listens was awake itself."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._silent_seconds = -math.inf
        self._looked_seconds = 0.0

    def too_long(self, now_seconds: float, *, beat: bool) -> bool:
        """Take in one look, true once for each silence that lasts too long.

        Args:
            now_seconds: When, monotonic.
            beat: Whether there was a beat since the last look; before the first, nothing is judged.
        """
        # a listener that stood still itself has heard nothing
        passed = min(now_seconds - self._looked_seconds, _TURN_SECONDS)
        self._looked_seconds = now_seconds
        self._silent_seconds = 0.0 if beat else self._silent_seconds + passed
        if self._silent_seconds <= self._limit_seconds:
            return False
        self._silent_seconds = -math.inf
        return True


class Supervisor:
    """Starts the two processes and sees to their end."""

    def __init__(
        self,
        orders: Orders,
        controller_user: str,
        stop_seconds: float,
        actuator_command: Sequence[str] = ACTUATOR_COMMAND,
    ) -> None:
        """Start nothing yet.

        Args:
            orders: For the actuator.
            controller_user: User that the controller becomes; empty to stay.
            stop_seconds: What the controller may take to stop.
            actuator_command: Starts the actuator when its orders are appended.
        """
        self._orders = orders
        self._controller_user = controller_user
        self._stop_seconds = stop_seconds
        self._command = tuple(actuator_command)
        self._controller = self._actuator = self._resetter = 0  # process ids while they live
        self._pulse = -1  # the actuator's
        self._silence = Silence(max(orders.settings.lease_seconds, _LEAST_SILENCE_SECONDS))
        self._status = 0
        self._stopping = False
        self._deadline_seconds = float("inf")

    def start(self) -> socket.socket | None:
        """Start both; this returns twice.

        Returns:
            In the controller's process: its end of the channel; it has no privileges any more. In
            the supervisor's: None; call `watch`.

        Raises:
            ThrottleError: In the controller's process: it cannot become the other user.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        parent = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pulse = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for descriptor in (theirs.fileno(), self._pulse):
            os.set_inheritable(descriptor, True)  # noqa: FBT003 - the standard library's signature
        self._actuator = self._spawn(
            dataclasses.replace(
                self._orders, channel=theirs.fileno(), parent=parent, pulse=self._pulse
            )
        )
        theirs.close()
        self._controller = os.fork()
        if self._controller:
            ours.close()
            return None
        os.close(self._pulse)
        os.setsid()  # an interrupt from the terminal reaches the supervisor alone
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # SIGTERM and SIGINT stay blocked: the controller waits for them, and its threads must not
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED - {signal.SIGTERM, signal.SIGINT})
        if self._controller_user:
            privileges.become(self._controller_user)
        if problem := privileges.keep_capabilities():
            self._log("privileges_not_dropped", problem=problem)
        privileges.forbid_new_privileges()
        privileges.die_with_parent(parent, signal.SIGTERM)
        return ours

    def watch(self, limit_seconds: float = math.inf) -> int:
        """Forward signals and reap until nothing is left.

        Args:
            limit_seconds: After so long, stop as on SIGTERM.

        Returns:
            Exit status: 0 when both ended in order and every GPU is at default clocks.
        """
        if self._orders.backend == "nvml":
            with contextlib.suppress(ActuationError):  # the actuator says so, too
                import_nvml_binding()
        end_seconds = time.monotonic() + limit_seconds
        while self._controller or self._actuator or self._resetter:
            if time.monotonic() >= end_seconds:
                self._stop_controller()
            remaining = self._deadline_seconds - time.monotonic()
            if remaining <= 0 and not self._give_up():
                break
            info = signal.sigtimedwait(_WATCHED, max(0.0, min(remaining, _TURN_SECONDS)))
            if info is not None and info.si_signo in _FORWARDED:
                self._forward(signal.Signals(info.si_signo))
            self._reap()
            self._feel_pulse()
        return self._status

    def _forward(self, number: signal.Signals) -> None:
        if number is signal.SIGHUP:
            self._signal(self._controller, signal.SIGHUP)
            return
        self._stop_controller()

    def _stop_controller(self) -> None:
        if self._controller and not self._stopping:
            self._stopping = True
            self._deadline_seconds = time.monotonic() + self._stop_seconds
            self._signal(self._controller, signal.SIGTERM)

    def _reap(self) -> None:
        while True:
            try:
                process, raw = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            status = os.waitstatus_to_exitcode(raw)
            if process == self._controller:
                self._controller = 0
                self._note_end("controller", status)
                # the actuator sees the end of its channel, resets every GPU and ends
                self._deadline_seconds = time.monotonic() + _RESET_SECONDS
            elif process == self._actuator:
                self._actuator = 0
                self._note_end("actuator", status)
                if status not in {0, 1}:  # it did not end by itself: its work may be undone
                    self._resetter = self._fork_resetter()
                    self._deadline_seconds = time.monotonic() + _RESET_SECONDS
                self._stop_controller()
            elif process == self._resetter:
                self._resetter = 0
                self._note_end("resetter", status)

    def _feel_pulse(self) -> None:
        """Kill an actuator that stands still; its end is seen like any other."""
        now, beat = time.monotonic(), True
        try:
            os.eventfd_read(self._pulse)
        except BlockingIOError:
            beat = False
        if self._silence.too_long(now, beat=beat) and self._actuator:
            self._log("actuator_killed", why="it stands still")
            self._signal(self._actuator, signal.SIGKILL)
            self._deadline_seconds = now + _RESET_SECONDS

    def _note_end(self, name: str, status: int) -> None:
        orderly = self._stopping or not self._controller
        said_why = status in {0, 1} or (self._stopping and status == -signal.SIGTERM)
        if not said_why:
            self._log("process_ended", process=name, status=status)
        if status or not (orderly or name == "resetter"):
            self._status = max(1, self._status, status)

    def _give_up(self) -> bool:
        """Past a deadline: kill the controller; but what is inside a driver call is left alone."""
        self._deadline_seconds = time.monotonic() + _RESET_SECONDS
        self._status = 1
        if self._controller:
            self._log("controller_killed", stop_seconds=self._stop_seconds)
            self._signal(self._controller, signal.SIGKILL)
            return True
        self._log("gpus_may_be_slow", remedy="throttle reset --all-configured")
        return False

    def _fork_resetter(self) -> int:
        """Reset the GPUs in a child, at once: no time is lost with starting Python."""
        process = os.fork()
        if process == 0:
            status = 1
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
                status = run(self._orders, open_backend)
            finally:
                os._exit(status)
        return process

    def _spawn(self, orders: Orders) -> int:
        command = (*self._command, orders.to_json())
        return os.posix_spawn(command[0], command, os.environ, setsid=True, setsigmask=())

    @staticmethod
    def _signal(process: int, number: signal.Signals) -> None:
        if process:
            os.kill(process, number)  # not reaped yet, so the number is still its own

    def _log(self, event: str, **fields: object) -> None:
        write_line(log_line(event, "error", fields, as_json=self._orders.log_json))


def import_nvml_binding() -> None:
    """Import what a reset needs before it is urgent; initializes nothing, which a fork forbids."""
    from throttle.actuation.nvml_clocks import import_binding  # noqa: PLC0415 - where there is a driver

    import_binding()
