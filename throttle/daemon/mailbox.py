"""Hands one stream's states from the thread that reads them to the one that decides."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from throttle.errors import ThrottleError

if TYPE_CHECKING:
    from collections.abc import Callable

    from throttle.control.state import IterationState
    from throttle.v1 import engine_pb2

#: States that may wait for a decision, and bytes of their messages; an engine that is this far
#: ahead reads no answers.
WAITING_STATES_LIMIT: Final = 4096
WAITING_BYTES_LIMIT: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Arrival:
    """A validated state and the message that it came in."""

    state: IterationState
    message: engine_pb2.IterationState


class Mailbox:
    """States in order, until the stream ends."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        # one for each time that something comes where nothing was: the interpreter's own queue
        # wakes its reader without a line of Python, which a condition does not
        self._woken: SimpleQueue[None] = SimpleQueue()
        self._arrivals: list[Arrival] = []
        self._bytes = 0  # of their messages
        self._oldest_seconds: float | None = None
        self._ended = False
        self._error: BaseException | None = None

    @property
    def error(self) -> BaseException | None:
        """Why the stream ended, if not by the engine's wish."""
        return self._error

    @property
    def oldest_seconds(self) -> float | None:
        """When the oldest state that waits came, by the clock; None when none waits."""
        return self._oldest_seconds

    def put(self, arrival: Arrival) -> None:
        """Add a state.

        Raises:
            ThrottleError: Too many wait already.
        """
        size = arrival.message.ByteSize()
        with self._lock:
            if self._oldest_seconds is None:
                self._oldest_seconds = self._clock()
            count = len(self._arrivals)
            if count >= WAITING_STATES_LIMIT or (
                count and self._bytes + size > WAITING_BYTES_LIMIT
            ):
                raise ThrottleError(
                    f"{count} states of {self._bytes} bytes wait for a decision; allowed: "
                    f"{WAITING_STATES_LIMIT} of {WAITING_BYTES_LIMIT} bytes: read the answers"
                )
            self._arrivals.append(arrival)
            self._bytes += size
            if not count:
                self._woken.put(None)

    def end(self, error: BaseException | None = None) -> None:
        """No more states will come; the first call's error counts."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self._error = error
            self._woken.put(None)

    def take(self, timeout_seconds: float | None) -> list[Arrival] | None:
        """Everything that waits, oldest first.

        Args:
            timeout_seconds: Longest wait; None waits for ever.

        Returns:
            The states; an empty list after the timeout; None when the stream has ended, by an error
            at once, else when nothing waits any more.
        """
        due = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            with self._lock:
                if self._ended and (self._error is not None or not self._arrivals):
                    return None
                if self._arrivals:
                    return self._take()
            left = due - time.monotonic()
            if left <= 0.0:
                return []
            with contextlib.suppress(Empty):
                self._woken.get(timeout=None if due == math.inf else left)

    def waiting(self) -> list[Arrival]:
        """What has come by now, oldest first; none where the stream has ended by an error."""
        with self._lock:
            return [] if self._error is not None else self._take()

    def _take(self) -> list[Arrival]:
        arrivals, self._arrivals = self._arrivals, []
        if not self._woken.empty():  # told already
            self._woken.get_nowait()
        self._bytes = 0
        self._oldest_seconds = None
        return arrivals
