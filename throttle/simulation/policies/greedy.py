"""Least predicted energy of the next iteration, alone and with a price on clock changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.simulation.policies.outlook import EngineView
from throttle.simulation.policies.slack_test import SlackTest

if TYPE_CHECKING:
    from throttle.control.state import IterationState
    from throttle.simulation.policies.policy import PolicyInputs


_SLACK = SlackTest(tpot_guard_ratio=0.8, lookahead_tokens=8.0)


@dataclass(frozen=True, slots=True)
class GreedyKnobs:
    """Knobs of `Greedy`; the guards are chosen on the Azure trace.

    Attributes:
        slack: How much of each limit is planned with.
        change_joules: Price of a clock change; 0 for none.
        iterations: Iterations over which a change must pay.
    """

    slack: SlackTest = _SLACK
    change_joules: float = 0.0
    iterations: float = 8.0


#: EnergyUCB charges each change; 1 J is about 40 W lost over a switch of 25 ms.
SWITCHING_AWARE = GreedyKnobs(
    SlackTest(tpot_guard_ratio=0.85, lookahead_tokens=8.0), change_joules=1.0
)


class Greedy:
    """`argmin P(f) t(f)` over the clocks that keep every limit.

    The objective of DynamoLLM's and Festina's clock choice (Stojkovic et al., HPCA 2025; Festina
    2026), applied to each iteration instead of to table rows. With a price on changes it is the
    idea of EnergyUCB (arXiv 2410.11855), whose bandit is replaced by the predictions that every
    baseline here has. An idle engine draws least at the lowest clock, so it goes there.

    Args:
        name: Name in tables.
        inputs: What it may know.
        knobs: Its knobs.
    """

    def __init__(self, name: str, inputs: PolicyInputs, knobs: GreedyKnobs) -> None:
        self.name = name
        self._knobs = knobs
        self._predictor = inputs.predictor
        self._slos = inputs.profile.default_slos
        self._view = EngineView(inputs.profile)
        self._current = len(inputs.predictor.clocks_mhz) - 1

    def clock_mhz(self, state: IterationState) -> int:
        """The feasible clock of least energy; the fastest where none is feasible."""
        self._view.observe(state)
        self._current = self._choose(state)
        return int(self._predictor.clocks_mhz[self._current])

    def _choose(self, state: IterationState) -> int:
        outlook = self._view.outlook(state)
        if outlook.idle:
            return 0 if not outlook.waiting_count else len(self._predictor.clocks_mhz) - 1
        prediction = self._predictor.predict(outlook.shapes)
        latency = prediction.latency_seconds
        feasible = self._knobs.slack.clocks(outlook, latency, state.engine_time_seconds, self._slos)
        if not feasible.any():
            return len(feasible) - 1
        cost = prediction.power_watts[0] * latency[0] * self._knobs.iterations
        cost = cost + self._knobs.change_joules
        cost[self._current] -= self._knobs.change_joules
        return int(np.argmin(np.where(feasible, cost, np.inf)))
