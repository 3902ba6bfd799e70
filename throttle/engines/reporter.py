"""Numbers, dates and sends an adapter's states, and keeps an idle engine's lease alive."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol

from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

#: Time between the heartbeats of an idle engine; well below the shortest usual lease.
HEARTBEAT_SECONDS: Final = 1.0

_log = logging.getLogger("throttle.engines")


class StateSink(Protocol):
    """What takes states: `ThrottleClient`, `SenderProcess`, or a list's front in tests."""

    def submit(self, state: engine_pb2.IterationState) -> None:
        """Take a state."""

    def close(self, timeout_seconds: float = 2.0) -> None:
        """Take no more."""


class Reporter:
    """Gives states of several threads one order.

    An idle engine says nothing by itself. Where `tells_arrivals` the reporter sends heartbeats for
    it, so that the daemon may park its GPUs; the next arrival wakes them. Where the engine does not
    tell of arrivals, a parked GPU would compute the first prompt slowly: nothing is sent, the lease
    runs out, and the GPUs idle at default clocks.
    """

    def __init__(
        self,
        sink: StateSink,
        *,
        tells_arrivals: bool,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sink = sink
        self._tells_arrivals = tells_arrivals
        self._heartbeat_seconds = heartbeat_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._sequence_number = 0
        self._idle = True
        self._sent_seconds = clock()
        self._closed = threading.Event()
        self._errors_count = 0
        self._thread: threading.Thread | None = None
        if tells_arrivals:
            self._thread = threading.Thread(
                target=self._beat, name="throttle-heartbeat", daemon=True
            )
            self._thread.start()

    @property
    def sink(self) -> StateSink:
        """Where the states go."""
        return self._sink

    @property
    def idle(self) -> bool:
        """Whether the last state left the engine nothing to do."""
        return self._idle

    @property
    def errors_count(self) -> int:
        """Failures of the adapter that were kept from the engine."""
        return self._errors_count

    def now_seconds(self) -> float:
        """Engine time."""
        return self._clock()

    def send(
        self, state: engine_pb2.IterationState, *, idle: bool, at_seconds: float | None = None
    ) -> None:
        """Number, date and submit a state.

        Args:
            state: Without number and engine time.
            idle: Whether the engine has nothing to do after it.
            at_seconds: Engine time that the state's ages count from; now by default.
        """
        with self._lock:
            now = self._clock() if at_seconds is None else at_seconds
            now = max(now, self._sent_seconds)  # another thread may have been quicker
            self._sequence_number += 1
            state.sequence_number = self._sequence_number
            state.engine_time_seconds = now
            self._sent_seconds = now
            self._idle = idle
            self._sink.submit(state)

    def tell_arrivals(self) -> None:
        """Something tells of arrivals after all: send heartbeats from now on."""
        with self._lock:
            if self._tells_arrivals:
                return
            self._tells_arrivals = True
            self._thread = threading.Thread(
                target=self._beat, name="throttle-heartbeat", daemon=True
            )
        self._thread.start()

    def note_error(self) -> None:
        """Count the exception being handled and log it once; for `except` blocks of adapters."""
        self._errors_count += 1
        if self._errors_count == 1:
            _log.exception("the throttle adapter failed; the engine goes on without it")

    def close(self) -> None:
        """Stop heartbeats and end the stream."""
        self._closed.set()
        self._sink.close()

    def _beat(self) -> None:
        while not self._closed.wait(self._heartbeat_seconds):
            self.beat()

    def beat(self) -> None:
        """Send a heartbeat if the engine is idle and has been silent for long enough."""
        with self._lock:
            now = self._clock()
            if not self._idle or now - self._sent_seconds < 0.5 * self._heartbeat_seconds:
                return
            self._sequence_number += 1
            self._sent_seconds = now
            self._sink.submit(
                engine_pb2.IterationState(
                    sequence_number=self._sequence_number,
                    phase=engine_pb2.ITERATION_PHASE_HEARTBEAT,
                    engine_time_seconds=now,
                )
            )
