"""What goes wrong in the field, put between a policy and the world: biased models, lost states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from predictors.prediction import Prediction

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from predictors.prediction import Predictor
    from throttle.control.state import IterationState
    from throttle.simulation.policies.policy import Policy


class BiasedPredictor:
    """A predictor whose durations are all wrong by one factor.

    Args:
        predictor: The one that is asked.
        latency_ratio: Factor on its durations; 0.85 is 15 % too optimistic.
    """

    def __init__(self, predictor: Predictor, latency_ratio: float) -> None:
        self._predictor = predictor
        self._ratio = latency_ratio

    @property
    def clocks_mhz(self) -> NDArray[np.int64]:
        """Candidate clocks in MHz, rising, shape (C,)."""
        return self._predictor.clocks_mhz

    @property
    def idle_power_watts(self) -> NDArray[np.float64]:
        """Power of one idle GPU at each clock, shape (C,)."""
        return self._predictor.idle_power_watts

    def predict(self, shapes: NDArray[np.float64]) -> Prediction:
        """Predict, with every duration scaled."""
        prediction = self._predictor.predict(shapes)
        return Prediction(
            prediction.latency_seconds * self._ratio,
            prediction.latency_upper_seconds * self._ratio,
            prediction.power_watts,
        )

    def covers(self, shapes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """As the other one says."""
        return self._predictor.covers(shapes)


@dataclass(frozen=True, slots=True)
class Outages:
    """When states are lost on their way.

    Attributes:
        period_seconds: From one outage to the next; the first begins after one period.
        outage_seconds: How long each lasts.
        stale_seconds: Silence after which the clock is the default one: the lease's job.
    """

    period_seconds: float
    outage_seconds: float
    stale_seconds: float = 0.1


class Interrupted:
    """A policy that gets no states during outages; they and their events are lost for good.

    Args:
        policy: The policy.
        outages: When.
    """

    def __init__(self, policy: Policy, outages: Outages) -> None:
        self._policy = policy
        self._outages = outages
        self._heard_seconds = 0.0
        self._clock_mhz = 0
        self.name = policy.name

    def clock_mhz(self, state: IterationState) -> int:
        """The policy's clock; its last one while states are lost, the default once that is old."""
        now = state.engine_time_seconds
        periods, into = divmod(now, self._outages.period_seconds)
        if periods >= 1.0 and into < self._outages.outage_seconds:
            stale = now - self._heard_seconds >= self._outages.stale_seconds
            return 0 if stale else self._clock_mhz
        self._heard_seconds = now
        self._clock_mhz = self._policy.clock_mhz(state)
        return self._clock_mhz
