"""One decision after the other, so that states are read while others are decided on.

The interpreter decides for one engine at a time whatever the number of threads. Where dozens of
streams all want to decide, those that only read would wait among them, and states would grow old in
the transport, where nothing overtakes them. A stream that waits for its turn finds newer states in
its mailbox when it comes, and decides on the newest alone.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Decisions at once. With two, states of 64 engines were half as old again on two cores.
TURNS_COUNT: Final = 1
#: Longest wait for a turn. One that hangs must not hold up other engines for good.
PATIENCE_SECONDS: Final = 0.25


class Turns:
    """Who may decide now.

    Args:
        count: Decisions at once.
        patience_seconds: After this long a turn is taken even if none is free.
    """

    def __init__(
        self, count: int = TURNS_COUNT, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._free = threading.Semaphore(count)
        self._patience_seconds = patience_seconds

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn and keep it for the block."""
        ours = self._free.acquire(timeout=self._patience_seconds)
        try:
            yield
        finally:
            if ours:
                self._free.release()
