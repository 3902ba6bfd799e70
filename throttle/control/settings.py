"""What an operator may tune."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from throttle.control.selection import Hysteresis, Objective
from throttle.control.slack import Guards

Posture = Literal["performance", "balanced", "efficiency"]

#: Share of answers that may be late for want of a faster clock, on each rung of the ladder.
LATE_BUDGETS: Final[dict[Posture, float]] = {
    "performance": 0.0002,
    "balanced": 0.001,
    "efficiency": 0.002,
}


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """What an operator may tune; every field is a key of the configuration's [control] section.

    Attributes:
        posture: How much may be risked for energy: the share of answers that may be late for want
            of a faster clock is 0.0002, 0.001 or 0.002.
        objective: What a clock is judged by among those that keep every limit; the others than
            long-run are kept for comparison.
        ttft_guard_ratio: Share of the time left to a first token that may be planned with.
        tbt_guard_ratio: Share of the limit on a single gap that may be planned with.
        tpot_guard_ratio: Share of the limit on the mean gap that may be planned with, where nothing
            is known of single requests.
        late_budget_ratio: That share itself; empty for the posture's.
        late_limit_ratio: Share of the answers that end soon that a clock may be expected to make
            late at any moment, whatever it saves.
        e2e_guard_ratio: Share of the time left to a last token that may be planned with.
        reserve_seconds: Kept back from every first token for one switch and one decision.
        burst_deviations: Standard deviations of the number of prompts to come that are planned for.
        hurry_lost: Run at the fastest clock while some request cannot be saved even by that, so
            that it is less late; else such requests do not hold the clock up for the others.
        violation_ratio: Share of iterations that may exceed the latency bound.
        floor_clock_ratio: Lowest clock while work runs, as a share of the highest.
        ceiling_clock_ratio: Highest clock ever chosen, as a share of the highest.
        dwell_seconds: Engine time since the last change from which a lower clock needs no more than
            the least gain; sooner it needs more, by the square of what is lacking.
        least_dwell_seconds: Least engine time between a change and a lower clock.
        least_gain_ratio: Share of long-run power that a change must save.
        raise_step_ratio: Least relative step upwards when slack forces it.
        load_time_constant_seconds: Memory of the load estimate.
        load_settling_seconds: Engine time seen before the load estimate is believed.
        cruise_period_seconds: Engine time between two computations of the cruise clock.
        parking: Whether an idle engine's GPUs go to their lowest clock.
        parking_delay_seconds: Engine time without work before that.
        kv_pressure_ratio: Share of the KV cache, now or projected, beyond which the clock is raised
            to the fastest.
    """

    posture: Posture = "balanced"
    objective: Objective = "long-run"
    ttft_guard_ratio: float = 0.8
    tbt_guard_ratio: float = 0.95
    tpot_guard_ratio: float = 0.95
    late_budget_ratio: float | None = None
    late_limit_ratio: float = 0.01
    e2e_guard_ratio: float = 0.9
    reserve_seconds: float = 0.05
    burst_deviations: float = 1.0
    hurry_lost: bool = False
    violation_ratio: float = 0.01
    floor_clock_ratio: float = 0.2
    ceiling_clock_ratio: float = 1.0
    dwell_seconds: float = 1.1
    least_dwell_seconds: float = 0.45
    least_gain_ratio: float = 0.01
    raise_step_ratio: float = 0.05
    load_time_constant_seconds: float = 60.0
    load_settling_seconds: float = 5.0
    cruise_period_seconds: float = 1.0
    parking: bool = True
    parking_delay_seconds: float = 0.5
    kv_pressure_ratio: float = 0.95

    def guards(self) -> Guards:
        """How much of each limit may be planned with."""
        return Guards(
            self.ttft_guard_ratio,
            self.tbt_guard_ratio,
            self.tpot_guard_ratio,
            self.e2e_guard_ratio,
            self.reserve_seconds,
        )

    def late_budget(self) -> float:
        """Share of answers that may be late because the clock is not the fastest."""
        if self.late_budget_ratio is None:
            return LATE_BUDGETS[self.posture]
        return self.late_budget_ratio

    def hysteresis(self) -> Hysteresis:
        """How reluctantly clocks change."""
        return Hysteresis(
            self.dwell_seconds,
            self.least_dwell_seconds,
            self.least_gain_ratio,
            self.raise_step_ratio,
        )

    def problems(self) -> list[str]:
        """Values that cannot be used; one line each."""
        found = [
            f"{name} is {getattr(self, name)}; allowed: above 0, up to 1"
            for name in _SHARES
            if not 0.0 < getattr(self, name) <= 1.0
        ]
        found += [
            f"{name} is {getattr(self, name)}; allowed: 0 or more, finite"
            for name in _NOT_NEGATIVE
            if not 0.0 <= getattr(self, name) < math.inf
        ]
        if not 0.0 < self.load_time_constant_seconds < math.inf:
            found.append(
                f"load_time_constant_seconds is {self.load_time_constant_seconds}; "
                "allowed: above 0, finite"
            )
        if not 0.0 < self.violation_ratio < 0.5:
            found.append(f"violation_ratio is {self.violation_ratio}; allowed: above 0, below 0.5")
        if not 0.0 < self.late_budget() < 0.5:
            found.append(
                f"late_budget_ratio is {self.late_budget_ratio}; allowed: above 0, below 0.5"
            )
        if self.floor_clock_ratio > self.ceiling_clock_ratio:
            found.append(
                f"floor_clock_ratio is {self.floor_clock_ratio}; "
                f"allowed: up to ceiling_clock_ratio ({self.ceiling_clock_ratio})"
            )
        return found


_SHARES = (
    "ttft_guard_ratio",
    "tbt_guard_ratio",
    "tpot_guard_ratio",
    "e2e_guard_ratio",
    "floor_clock_ratio",
    "ceiling_clock_ratio",
    "kv_pressure_ratio",
    "late_limit_ratio",
)
_NOT_NEGATIVE = (
    "reserve_seconds",
    "burst_deviations",
    "dwell_seconds",
    "least_dwell_seconds",
    "least_gain_ratio",
    "raise_step_ratio",
    "load_settling_seconds",
    "cruise_period_seconds",
    "parking_delay_seconds",
)
