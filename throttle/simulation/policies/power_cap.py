"""PALS-like control of a power cap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.control.projection import shape_of
from throttle.control.state import Phase
from throttle.simulation.policies.outlook import EngineView
from throttle.simulation.policies.reactive import ObservedGaps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.state import IterationState
    from throttle.simulation.policies.policy import PolicyInputs


@dataclass(frozen=True, slots=True)
class PowerCapKnobs:
    """Knobs of `PowerCap`.

    Attributes:
        period_seconds: Time between two choices of a cap (the source: 0.5).
        lowest_ratio: Lowest cap over the highest power.
        caps_count: Caps from there to the highest power.
        target_ratio: Share of the limit on the gap that is aimed at; chosen on the Azure trace.
        integral_ratio: Feedback per choice and unit of relative error.
        tolerance_ratio: Errors below this are left alone (the source: 5 %).
        wait_ratio: Share of TTFT after which the oldest wait lifts the cap; chosen likewise.
    """

    period_seconds: float = 0.5
    lowest_ratio: float = 0.4
    caps_count: int = 13
    target_ratio: float = 0.85
    integral_ratio: float = 0.1
    tolerance_ratio: float = 0.05
    wait_ratio: float = 0.4


class PowerCap:
    """The lowest power cap whose predicted gap meets the target, corrected by what is observed.

    PALS (arXiv 2605.21427): caps from a table, each half second the cheapest that meets the target
    rate, with feedback when the error stays above 5 %. Adapted: a cap is played as the highest
    clock whose predicted power for the next iteration keeps it, which is what the driver's cap
    does, but through the clock lock and so with its switching delay; the target is the limit on
    the mean gap; the batch size is the engine's and stays.

    Args:
        inputs: What it may know.
        knobs: Its knobs.
    """

    name = "power-cap"

    def __init__(self, inputs: PolicyInputs, knobs: PowerCapKnobs) -> None:
        self._knobs = knobs
        self._predictor = inputs.predictor
        self._slos = inputs.profile.default_slos
        self._view = EngineView(inputs.profile)
        self._gaps = ObservedGaps(2.0, self._slos)
        budget = float(inputs.profile.batched_tokens_limit)
        heavy = np.array([[1.0, budget, 0.0, 1.0, 1.0, 1.0, 0.5 * budget * budget]])
        highest = float(self._predictor.predict(heavy).power_watts.max())
        self._caps = highest * np.linspace(knobs.lowest_ratio, 1.0, knobs.caps_count)
        self._cap = highest
        self._bias = 1.0
        self._expected: float | None = None
        self._due_seconds = 0.0
        self._seen: list[tuple[float, ...]] = []

    def clock_mhz(self, state: IterationState) -> int:
        """The highest clock that keeps the cap in the next iteration."""
        self._view.observe(state)
        self._gaps.add(state)
        if state.phase is Phase.COMPLETED:
            self._seen.append(shape_of(state.scheduled))
        if state.engine_time_seconds >= self._due_seconds and self._seen:
            self._due_seconds = state.engine_time_seconds + self._knobs.period_seconds
            self._choose_cap()
        clocks = self._predictor.clocks_mhz
        outlook = self._view.outlook(state)
        limit = self._slos.ttft_seconds
        waited = outlook.oldest_wait_seconds(state.engine_time_seconds)
        if limit is not None and waited > self._knobs.wait_ratio * limit:
            return int(clocks[-1])
        if outlook.idle:
            return int(clocks[-1])
        power = self._predictor.predict(outlook.shapes[:1]).power_watts
        return int(clocks[self._below(power, np.array([self._cap]))[0, 0]])

    def _choose_cap(self) -> None:
        shapes = np.array(self._seen[-64:])
        self._seen = []
        prediction = self._predictor.predict(shapes)
        index = self._below(prediction.power_watts, self._caps)  # (K, caps)
        seconds = np.take_along_axis(prediction.latency_seconds, index, axis=1)
        rows = np.maximum(shapes[:, 3], 1e-9)
        gaps = (seconds * rows[:, None]).sum(axis=0) / rows.sum()
        observed = self._gaps.seconds()
        if observed is not None and self._expected is not None:
            error = observed / self._expected - self._bias
            if abs(error) > self._knobs.tolerance_ratio:
                self._bias += self._knobs.integral_ratio * error
        target = self._knobs.target_ratio * self._gaps.limit_seconds
        enough = gaps * self._bias <= target
        chosen = int(np.argmax(enough)) if enough.any() else len(self._caps) - 1
        self._cap = float(self._caps[chosen])
        self._expected = float(gaps[chosen])

    @staticmethod
    def _below(power: NDArray[np.float64], caps: NDArray[np.float64]) -> NDArray[np.int64]:
        """Index of the highest clock whose power keeps each cap, (K, caps); 0 where none does."""
        kept: NDArray[np.int64] = (power[:, :, None] <= caps).sum(axis=1)
        return np.maximum(kept - 1, 0)
