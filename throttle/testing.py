"""Public doubles: real, working stand-ins for what is expensive or absent in a test.

Authors of adapters and policies may use them too. Nothing here patches anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from predictors.errors import PredictorsError
from predictors.prediction import SHAPE_COLUMNS, Prediction

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _default_clocks() -> NDArray[np.int64]:
    return np.arange(345, 1981, 15, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class FormulaPredictor:
    """A predictor by closed formulas: a fixed cost, a memory part and a compute part.

    Latency is `fixed + memory + compute / x`, power `static + dynamic * x * v(x)^2`, with x the
    share of the highest clock and v(x) a voltage that is flat up to `knee_ratio`. Not fitted to
    anything: for tests of what stands on a predictor.

    Attributes:
        clocks_mhz: Candidate clocks, rising.
        fixed_seconds: Time of an iteration that computes nothing.
        seconds_per_decode: Memory time of one generating request.
        seconds_per_kv_token: Memory time of one token of context.
        seconds_per_prefill_token: Compute time of one prompt token at the highest clock.
        decode_compute_seconds: Compute time of one generating request at the highest clock.
        static_watts: Power that does not depend on the clock.
        dynamic_watts: Power at the highest clock beyond that.
        knee_ratio: Share of the highest clock below which the voltage is at its floor.
        floor_voltage_ratio: That floor, as a share of the highest voltage.
        upper_ratio: Upper bound over expectation.
        covered: What `covers` answers.
    """

    clocks_mhz: NDArray[np.int64] = field(default_factory=_default_clocks)
    fixed_seconds: float = 4e-3
    seconds_per_decode: float = 4e-5
    seconds_per_kv_token: float = 2e-8
    seconds_per_prefill_token: float = 3e-5
    decode_compute_seconds: float = 4e-5
    static_watts: float = 150.0
    dynamic_watts: float = 350.0
    knee_ratio: float = 0.56
    floor_voltage_ratio: float = 0.72
    upper_ratio: float = 1.05
    covered: bool = True

    @property
    def idle_power_watts(self) -> NDArray[np.float64]:
        """A third of the static power at rest, all of it at the highest clock, (C,)."""
        return self.static_watts * (1.0 + 2.0 * self._power_factor()) / 3.0

    def predict(self, shapes: NDArray[np.float64]) -> Prediction:
        """Evaluate the formulas for a (K, 7) matrix of shapes.

        Raises:
            PredictorsError: The matrix has another form, as with a real bundle.
        """
        if shapes.ndim != 2 or shapes.shape[1] != len(SHAPE_COLUMNS):
            raise PredictorsError(
                f"shapes have the form {shapes.shape}; allowed: (K, {len(SHAPE_COLUMNS)})"
            )
        ratio = self.clocks_mhz / self.clocks_mhz[-1]
        decode, kv_tokens = shapes[:, 3:4], shapes[:, 4:5] + shapes[:, 2:3]
        memory = decode * self.seconds_per_decode + kv_tokens * self.seconds_per_kv_token
        compute = (
            shapes[:, 1:2] * self.seconds_per_prefill_token + decode * self.decode_compute_seconds
        )
        latency = self.fixed_seconds + memory + compute / ratio
        power = np.broadcast_to(
            self.static_watts + self.dynamic_watts * self._power_factor(), latency.shape
        )
        return Prediction(latency, latency * self.upper_ratio, power)

    def covers(self, shapes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """`covered` for every shape."""
        return np.full(len(shapes), self.covered)

    def _power_factor(self) -> NDArray[np.float64]:
        ratio = self.clocks_mhz / self.clocks_mhz[-1]
        rise = np.clip((ratio - self.knee_ratio) / (1.0 - self.knee_ratio), 0.0, 1.0)
        voltage = self.floor_voltage_ratio + (1.0 - self.floor_voltage_ratio) * rise
        factor: NDArray[np.float64] = ratio * voltage**2
        return factor
