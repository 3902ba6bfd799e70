"""Clocks for profiling: one after another, so that every load meets the whole range."""

from __future__ import annotations

import bisect
import itertools
import math
from typing import TYPE_CHECKING

from throttle.control.selection import Decision, Reason
from throttle.control.state import Phase
from throttle.errors import ThrottleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from throttle.control.evaluation import Evaluation
    from throttle.control.state import IterationState

#: Steps of the golden ratio fill an interval more evenly than random draws, at every length
#: (an additive recurrence; Roberts 2018).
_GOLDEN_STEP = (math.sqrt(5.0) - 1.0) / 2.0


class ExplorationPlan:
    """Chooses clocks by a low-discrepancy sequence, whatever the load.

    Stands where a `Controller` stands, so that profiling runs through the daemon's own path.

    Args:
        clocks_mhz: Clocks to explore, rising.
        hold_seconds: Engine time for which each clock is held at least; must outlast a clock
            switch, or no iteration would run at one clock from start to end.
        start_ratio: Where in the range the sequence starts, in [0, 1).
        hold_iterations: Iterations for which each clock is held at least: a long prompt may take
            longer than `hold_seconds`, and would else never run at one clock.
        weights: How often each clock is wanted, relative to the others; all alike if None.

    Raises:
        ThrottleError: There are no clocks, or the weights do not fit them.
    """

    def __init__(
        self,
        clocks_mhz: Sequence[int],
        hold_seconds: float,
        start_ratio: float = 0.5,
        hold_iterations: int = 1,
        weights: Sequence[float] | None = None,
    ) -> None:
        self._clocks_mhz = tuple(clocks_mhz)
        shares = tuple(weights) if weights is not None else (1.0,) * len(self._clocks_mhz)
        if not shares or len(shares) != len(self._clocks_mhz) or not sum(shares) > 0.0:
            raise ThrottleError(
                f"{len(self._clocks_mhz)} clocks to explore with {len(shares)} weights; allowed: "
                "one weight for each clock, and one clock or more"
            )
        total = sum(shares)
        self._reached = tuple(reached / total for reached in itertools.accumulate(shares))
        self._hold_seconds = hold_seconds
        self._hold_iterations = hold_iterations
        self._position = start_ratio
        self._next_change_seconds = -math.inf
        self._iterations_count = 0
        self._clock_mhz = self._clocks_mhz[-1]

    @property
    def latency_bias_ratio(self) -> float:
        """Always 1: nothing is predicted."""
        return 1.0

    @property
    def coverage_ratio(self) -> float | None:
        """Always None: nothing is predicted."""
        return None

    def observe(
        self,
        state: IterationState,
        observed_clock_mhz: int,
        observed_power_watts: float | None = None,
    ) -> None:
        """Nothing to remember: what is observed is recorded elsewhere."""

    def decide(self, state: IterationState) -> Decision:
        """The clock of the moment."""
        idle = state.phase is not Phase.COMPLETED
        self._iterations_count += not idle
        held = idle or self._iterations_count >= self._hold_iterations
        if held and state.engine_time_seconds >= self._next_change_seconds:
            self._next_change_seconds = state.engine_time_seconds + self._hold_seconds
            self._iterations_count = 0
            index = bisect.bisect_right(self._reached, self._position)
            self._clock_mhz = self._clocks_mhz[min(index, len(self._clocks_mhz) - 1)]
            self._position = (self._position + _GOLDEN_STEP) % 1.0
        return Decision(self._clock_mhz, Reason.EXPLORATION)

    def evaluate(self, state: IterationState) -> Evaluation:  # noqa: ARG002 - of the protocol
        """Not possible while profiling.

        Raises:
            ThrottleError: Always.
        """
        raise ThrottleError("a profiling run predicts nothing; ask a daemon that has a bundle")
