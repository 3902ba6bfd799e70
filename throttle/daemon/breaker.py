"""Gives up throttling an engine for a while when its requests miss their limits under it.

The controller promises by prediction; this looks at what came of it. It judges requests that have
ended and ran while their GPUs were throttled, each by its own limits, on the engine's own time.
"""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from throttle.control.state import EventKind

if TYPE_CHECKING:
    from throttle.control.state import IterationState, RequestEvent, Slos

#: Ended requests that are judged together, and the fewest that say anything.
_WINDOW_COUNT: Final = 100
_FEWEST_COUNT: Final = 20
#: Requests followed at once; an engine that never ends any must not fill the memory.
_FOLLOWED_LIMIT: Final = 100_000


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When throttling is given up.

    Attributes:
        attainment_ratio: Least share of throttled requests that keep all of their limits, over the
            last 100; below it the engine's GPUs return to default clocks. 0 never does.
        backoff_seconds: For how long, by the engine's time.
    """

    attainment_ratio: float = 0.8
    backoff_seconds: float = 60.0

    def problems(self) -> list[str]:
        """Values that cannot be used, one line each."""
        found = []
        if not 0.0 <= self.attainment_ratio <= 1.0:
            found.append(f"attainment_ratio is {self.attainment_ratio}; allowed: 0 to 1")
        if not (math.isfinite(self.backoff_seconds) and self.backoff_seconds >= 1.0):
            found.append(f"backoff_seconds is {self.backoff_seconds}; allowed: 1 or more")
        return found


@dataclass(slots=True)
class _Request:
    arrived_seconds: float
    slos: Slos
    throttled: bool = False
    first_token_seconds: float | None = None


class SloBreaker:
    """One engine's breaker. Not thread safe."""

    def __init__(self, settings: BreakerSettings, default_slos: Slos) -> None:
        self._settings = settings
        self._default_slos = default_slos
        self._requests: dict[int, _Request] = {}
        self._kept: collections.deque[bool] = collections.deque(maxlen=_WINDOW_COUNT)
        self._open_until_seconds = -math.inf
        self.trips_count = 0

    def observe(self, state: IterationState, *, throttled: bool) -> None:
        """Take in one state, in order.

        Args:
            state: What the engine said.
            throttled: Whether its GPUs were held below their highest clock until now.
        """
        now = state.engine_time_seconds
        if throttled:
            for request in self._requests.values():
                request.throttled = True
        for event in state.request_events:
            self._note(event, now - event.age_seconds)
        if len(self._kept) >= _FEWEST_COUNT:
            attained = sum(self._kept) / len(self._kept)
            if attained < self._settings.attainment_ratio:
                self._open_until_seconds = now + self._settings.backoff_seconds
                self._kept.clear()  # what comes after is judged anew
                self.trips_count += 1

    def is_open(self, engine_time_seconds: float) -> bool:
        """Whether the engine's GPUs must stay at default clocks."""
        return engine_time_seconds < self._open_until_seconds

    def _note(self, event: RequestEvent, when_seconds: float) -> None:
        number = event.request_number
        if event.kind is EventKind.ARRIVED:
            if len(self._requests) < _FOLLOWED_LIMIT:
                slos = event.slos.over(self._default_slos)
                self._requests[number] = _Request(when_seconds, slos)
        elif event.kind is EventKind.FIRST_TOKEN:
            if number in self._requests:
                self._requests[number].first_token_seconds = when_seconds
        elif event.kind in {EventKind.FINISHED, EventKind.ABORTED}:
            request = self._requests.pop(number, None)
            if request is not None and request.throttled and event.kind is EventKind.FINISHED:
                self._kept.append(_kept(request, when_seconds, event.generated_tokens))


def _kept(request: _Request, finished_seconds: float, generated_tokens: int) -> bool:
    """Whether a request kept every limit that can be judged of it."""
    slos, first = request.slos, request.first_token_seconds
    whole_seconds = finished_seconds - request.arrived_seconds
    if slos.e2e_seconds is not None and whole_seconds > slos.e2e_seconds:
        return False
    if first is None:
        return True
    if slos.ttft_seconds is not None and first - request.arrived_seconds > slos.ttft_seconds:
        return False
    if slos.tpot_seconds is None or generated_tokens < 2:
        return True
    return (finished_seconds - first) / (generated_tokens - 1) <= slos.tpot_seconds
