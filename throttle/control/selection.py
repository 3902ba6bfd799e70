"""From slack and power to one clock, with its reason: up at once, down slowly."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.advice import Advice
    from throttle.control.slack import Slo


class Reason(enum.IntEnum):
    """Why a clock was chosen (values and meanings as in the protocol)."""

    CRUISE = 1
    SLACK = 2
    HELD = 3
    INFEASIBLE = 4
    PARKED = 5
    KV_PRESSURE = 6
    OUT_OF_ENVELOPE = 7
    POOR_INFORMATION = 8
    RECORDING = 9
    FAULT = 10
    RELEASED = 11
    LEASE_EXPIRED = 12
    EXPLORATION = 13
    BREAKER_OPEN = 14


@dataclass(frozen=True, slots=True)
class Binding:
    """The limit with the least slack at the chosen clock."""

    slo: Slo
    request_number: int
    slack_seconds: float


@dataclass(frozen=True, slots=True)
class Decision:
    """A clock and why; what is predicted is of the next iteration unless it says otherwise.

    Attributes:
        target_clock_mhz: Clock to apply; 0 means the GPU's default.
        reason: Why.
        binding: The limit that binds; None when none does.
        predicted_iteration_seconds: Expected duration at the target; 0 when nothing runs.
        predicted_iteration_upper_seconds: Its calibrated upper bound.
        predicted_power_watts: Expected power of all GPUs of the engine.
        predicted_default_iteration_seconds: The same at the default (fastest) clock.
        predicted_default_power_watts: The same at the default (fastest) clock.
        cruise_clock_mhz: Clock of least long-run power; 0 while the load is not known.
        lost_requests_count: Requests that no clock can save.
        long_run_power_watts: Average power of all GPUs of the engine at the present load, idle time
            included, if work is always done at this clock; 0 while the load is not known.
        default_long_run_power_watts: The same, had the GPUs always been at default clocks: what is
            saved is the difference. Fewer requests are batched there, so more iterations are run.
        advice: On what is not decided here; None where the engine did not ask.
    """

    target_clock_mhz: int
    reason: Reason
    binding: Binding | None = None
    predicted_iteration_seconds: float = 0.0
    predicted_iteration_upper_seconds: float = 0.0
    predicted_power_watts: float = 0.0
    predicted_default_iteration_seconds: float = 0.0
    predicted_default_power_watts: float = 0.0
    cruise_clock_mhz: int = 0
    lost_requests_count: int = 0
    long_run_power_watts: float = 0.0
    default_long_run_power_watts: float = 0.0
    advice: Advice | None = None


@dataclass(frozen=True, slots=True)
class Hysteresis:
    """What keeps clocks from chattering.

    Attributes:
        dwell_seconds: Age of the last change from which a lower clock needs no more than the least
            gain. Sooner it needs more, by the square of what is lacking: a change is worth its cost
            when it saves much, or for long.
        least_dwell_seconds: Least time between the last change and a lower clock.
        least_gain_ratio: Share of long-run power that a change must save.
        raise_step_ratio: Least relative step upwards when slack forces it, so that a shrinking
            slack is answered once and not one clock at a time.
    """

    dwell_seconds: float
    least_dwell_seconds: float
    least_gain_ratio: float
    raise_step_ratio: float


class Selector:
    """Chooses among clocks and remembers only what hysteresis needs.

    Args:
        clocks_mhz: Candidate clocks, rising, (C,).
        hysteresis: How reluctantly to change.
    """

    def __init__(self, clocks_mhz: NDArray[np.int64], hysteresis: Hysteresis) -> None:
        self._clocks_mhz = clocks_mhz
        self._hysteresis = hysteresis
        self._current = len(clocks_mhz) - 1
        self._changed_seconds = -np.inf

    @property
    def current(self) -> int:
        """Index of the clock last chosen."""
        return self._current

    def jump(self, index: int, now_seconds: float) -> int:
        """Take a clock past every dwell: guards, parking and waking."""
        if index != self._current:
            self._current = index
            self._changed_seconds = now_seconds
        return index

    def choose(
        self,
        feasible: NDArray[np.bool_],
        long_run_power_watts: NDArray[np.float64] | None,
        now_seconds: float,
        weight_ratio: NDArray[np.float64] | None = None,
    ) -> tuple[int, Reason]:
        """Choose a feasible clock of least long-run power, weighed by what it risks.

        Args:
            feasible: Which clocks keep every limit, (C,).
            long_run_power_watts: Power at the equilibrium of each clock, infinite where the load is
                not carried, (C,); None while the load is not known.
            now_seconds: Engine time.
            weight_ratio: What power is multiplied with for what each clock risks, 1 or more, (C,).

        Returns:
            The clock's index and the reason. A clock that is not feasible is returned only when
            none is, and then it is the fastest.
        """
        fastest = len(self._clocks_mhz) - 1
        if not feasible.any():
            return self.jump(fastest, now_seconds), Reason.INFEASIBLE
        if long_run_power_watts is None:
            return self.jump(self._fastest(feasible), now_seconds), Reason.POOR_INFORMATION
        cost = long_run_power_watts if weight_ratio is None else long_run_power_watts * weight_ratio
        cost = np.where(feasible, cost, np.inf)
        best = int(np.argmin(cost))
        if not np.isfinite(cost[best]):
            # The load is more than any feasible clock carries in the long run.
            return self.jump(self._fastest(feasible), now_seconds), Reason.INFEASIBLE
        free = best == int(np.argmin(long_run_power_watts))
        reason = Reason.CRUISE if free else Reason.SLACK
        current = self._current
        if not np.isfinite(cost[current]):
            best = self._raised(best, feasible)
        elif best != current and self._reluctant(cost, best, now_seconds):
            best, reason = current, Reason.HELD
        return self.jump(best, now_seconds), reason

    def _reluctant(self, cost: NDArray[np.float64], best: int, now_seconds: float) -> bool:
        """Whether the gain is too small, or a lower clock comes too soon."""
        gain = 1.0 - cost[best] / cost[self._current]
        least_gain = self._hysteresis.least_gain_ratio
        if best < self._current:
            elapsed = now_seconds - self._changed_seconds
            if elapsed < self._hysteresis.least_dwell_seconds:
                return True
            if elapsed < self._hysteresis.dwell_seconds:
                least_gain *= (self._hysteresis.dwell_seconds / elapsed) ** 2
        return bool(gain < least_gain)

    def _fastest(self, feasible: NDArray[np.bool_]) -> int:
        return int(np.flatnonzero(feasible)[-1])

    def _raised(self, best: int, feasible: NDArray[np.bool_]) -> int:
        """`best`, or the next feasible clock at least one raise step above the present one."""
        if best < self._current:
            return best
        wanted = self._clocks_mhz[self._current] * (1.0 + self._hysteresis.raise_step_ratio)
        stepped = int(np.searchsorted(self._clocks_mhz, wanted))
        stepped = min(max(best, stepped), len(self._clocks_mhz) - 1)
        return stepped if feasible[stepped] else best
