"""Tells systemd how the daemon is, where it asks to be told (`Type=notify`, `WatchdogSec`)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

#: Twice within each watchdog interval, as sd_watchdog_enabled(3) advises.
_KICKS_PER_INTERVAL: Final = 2.0


class ServiceManager:
    """The end of systemd's notification socket; does nothing where there is none."""

    def __init__(self, environ: MutableMapping[str, str], clock: Callable[[], float]) -> None:
        """Read what systemd has set; takes it away from whatever this process starts.

        Args:
            environ: The process's environment.
            clock: Monotonic seconds.
        """
        address = environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        environ.pop("WATCHDOG_PID", "")  # the main process's; NotifyAccess=all lets us kick for it
        interval = environ.pop("WATCHDOG_USEC", "")
        self._interval_seconds = (
            int(interval) / 1e6 / _KICKS_PER_INTERVAL if interval.isdecimal() else None
        )
        self._clock = clock
        self._kicked_seconds = clock()

    def ready(self) -> None:
        """The daemon serves."""
        self._tell("READY=1\nSTATUS=serving")

    def stopping(self) -> None:
        """The daemon is on its way out."""
        self._tell("STOPPING=1\nSTATUS=returning clocks to default")

    def alive(self) -> None:
        """Kick the watchdog if it is time; called often."""
        now = self._clock()
        if self._interval_seconds is None or now - self._kicked_seconds < self._interval_seconds:
            return
        self._kicked_seconds = now
        self._tell("WATCHDOG=1")

    def _tell(self, text: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            try:
                sender.sendto(text.encode(), self._address)
            except OSError:
                return  # systemd notices what it needs to by itself
