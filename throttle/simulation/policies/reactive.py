"""Policies that predict nothing: they look at what has happened."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.control.state import Phase
from throttle.simulation.policies.outlook import EngineView

if TYPE_CHECKING:
    from throttle.control.state import IterationState, Slos
    from throttle.simulation.policies.policy import PolicyInputs


class ObservedGaps:
    """Gaps between tokens over a sliding window, each counted once per generating request.

    The figure is compared with the limit that the requests have: the mean where the mean gap is
    limited, the quantile of single gaps where these are.

    Args:
        window_seconds: Length of the window.
        slos: Limits.
        quantile_ratio: Quantile of single gaps.
    """

    def __init__(self, window_seconds: float, slos: Slos, quantile_ratio: float = 0.95) -> None:
        self._window = window_seconds
        self._quantile = quantile_ratio if slos.tbt_seconds is not None else None
        limit = slos.tbt_seconds if slos.tbt_seconds is not None else slos.tpot_seconds
        self.limit_seconds = np.inf if limit is None else limit
        self._gaps: deque[tuple[float, float, int]] = deque()
        self._seconds = self._count = 0.0

    def add(self, state: IterationState) -> None:
        """Take in one state; only completed iterations hold gaps."""
        now = state.engine_time_seconds
        rows, duration = state.scheduled.num_decode_requests, state.iteration_duration_seconds
        if state.phase is Phase.COMPLETED and rows and duration is not None:
            self._gaps.append((now, duration, rows))
            self._seconds += duration * rows
            self._count += rows
        while self._gaps and self._gaps[0][0] <= now - self._window:
            _, old, old_rows = self._gaps.popleft()
            self._seconds -= old * old_rows
            self._count -= old_rows

    @property
    def tokens_count(self) -> float:
        """Tokens in the window."""
        return self._count

    def seconds(self) -> float | None:
        """The window's figure; None without gaps."""
        if not self._gaps:
            return None
        if self._quantile is None:
            return self._seconds / self._count
        durations, rows = np.array([(each[1], each[2]) for each in self._gaps]).T
        order = np.argsort(durations)
        reached = np.cumsum(rows[order]) >= self._quantile * rows.sum()
        return float(durations[order][np.argmax(reached)])


@dataclass(frozen=True, slots=True)
class OndemandKnobs:
    """Knobs of `Ondemand`: those of Linux's governor.

    Attributes:
        period_seconds: Time between two looks.
        busy_ratio: Busy share above which the clock is the highest.
    """

    period_seconds: float = 0.1
    busy_ratio: float = 0.8


class Ondemand:
    """Linux's ondemand governor, with the share of time that iterations run as utilization.

    Pallipadi and Starikovskiy, "The Ondemand Governor", Linux Symposium 2006. A serving engine is
    nearly always busy, so it degenerates to maximum clock.

    Args:
        inputs: What it may know.
        knobs: Its knobs.
    """

    name = "ondemand"

    def __init__(self, inputs: PolicyInputs, knobs: OndemandKnobs) -> None:
        self._knobs = knobs
        self._clocks = inputs.predictor.clocks_mhz
        self._current = int(self._clocks[-1])
        self._busy_seconds = 0.0
        self._looked_seconds = 0.0

    def clock_mhz(self, state: IterationState) -> int:
        """Full speed above the threshold, else the smallest clock that would be at it."""
        if state.phase is Phase.COMPLETED and state.iteration_duration_seconds is not None:
            self._busy_seconds += state.iteration_duration_seconds
        span = state.engine_time_seconds - self._looked_seconds
        if span < self._knobs.period_seconds:
            return self._current
        busy = min(self._busy_seconds / span, 1.0)
        self._busy_seconds, self._looked_seconds = 0.0, state.engine_time_seconds
        wanted = self._clocks[-1] * busy / self._knobs.busy_ratio
        index = int(np.searchsorted(self._clocks, wanted))
        self._current = int(self._clocks[min(index, len(self._clocks) - 1)])
        return self._current


@dataclass(frozen=True, slots=True)
class AimdKnobs:
    """Knobs of `Aimd`, chosen on the Azure trace.

    Attributes:
        period_seconds: Time between two moves.
        window_seconds: Window of the observed gaps.
        target_ratio: Share of the limit that is aimed at.
        proportional_ratio: Clock, as a share of the highest, per unit of relative error.
        integral_ratio: The same per move and unit of relative error.
        wait_ratio: Share of TTFT after which the oldest wait means full speed.
        floor_ratio: Lowest clock over the highest.
    """

    period_seconds: float = 0.2
    window_seconds: float = 1.0
    target_ratio: float = 0.8
    proportional_ratio: float = 0.3
    integral_ratio: float = 0.04
    wait_ratio: float = 0.4
    floor_ratio: float = 0.4


class Aimd:
    """A PI controller on the observed time between tokens; a long wait means full speed.

    The feedback loop common to reactive GPU governors, in its PI form (Kp, Ki, anti-windup by
    clipping the integral). The observed figure is the mean gap where the mean is limited.

    Args:
        inputs: What it may know.
        knobs: Its knobs.
    """

    name = "aimd"

    def __init__(self, inputs: PolicyInputs, knobs: AimdKnobs) -> None:
        self._knobs = knobs
        self._clocks = inputs.predictor.clocks_mhz
        self._slos = inputs.profile.default_slos
        self._view = EngineView(inputs.profile)
        self._gaps = ObservedGaps(knobs.window_seconds, self._slos)
        self._integral = 1.0
        self._ratio = 1.0
        self._moved_seconds = 0.0

    def clock_mhz(self, state: IterationState) -> int:
        """One move each period; the wait is looked at after every state."""
        self._view.observe(state)
        self._gaps.add(state)
        now, knobs = state.engine_time_seconds, self._knobs
        if self._waits_long(state):
            return int(self._clocks[-1])
        if now - self._moved_seconds >= knobs.period_seconds:
            self._moved_seconds = now
            observed = self._gaps.seconds()
            if observed is not None:
                error = observed / self._gaps.limit_seconds - knobs.target_ratio
                low, high = knobs.floor_ratio, 1.0
                raised = self._integral + knobs.integral_ratio * error
                self._integral = min(max(raised, low), high)
                wanted = self._integral + knobs.proportional_ratio * error
                self._ratio = min(max(wanted, low), high)
        index = int(np.searchsorted(self._clocks, self._ratio * self._clocks[-1]))
        return int(self._clocks[index])

    def _waits_long(self, state: IterationState) -> bool:
        limit = self._slos.ttft_seconds
        if limit is None:
            return False
        outlook = self._view.outlook(state)
        waited = outlook.oldest_wait_seconds(state.engine_time_seconds)
        return waited > self._knobs.wait_ratio * limit
