"""One decision after the other, so that states are read while others are decided on.

The interpreter decides for one engine at a time whatever the number of threads. Where dozens of
streams all want to decide, those that only read would wait among them, and states would grow old in
the transport, where nothing overtakes them. A stream that waits for its turn finds newer states in
its mailbox when it comes, and decides on the newest alone.
"""

from __future__ import annotations

import threading
from typing import Final, Self

#: Longest wait for a turn. One that hangs must not hold up other engines for good.
PATIENCE_SECONDS: Final = 0.25


class Turns:
    """Who may decide now: one at a time.

    With two at a time, states of 64 engines were half as old again on two cores.

    Args:
        patience_seconds: After this long a turn is taken even if none is free.
    """

    def __init__(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        # the interpreter's own lock: a semaphore is Python, and costs as much as a small decision
        self._free = threading.Lock()
        self._patience_seconds = patience_seconds

    def turn(self) -> _Turn:
        """Wait for a turn and keep it for the `with` block."""
        return _Turn(self._free, self._patience_seconds)


class _Turn:
    __slots__ = ("_free", "_ours", "_patience_seconds")

    def __init__(self, free: threading.Lock, patience_seconds: float) -> None:
        self._free = free
        self._patience_seconds = patience_seconds
        self._ours = False

    def __enter__(self) -> Self:
        self._ours = self._free.acquire(timeout=self._patience_seconds)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._free.release()
