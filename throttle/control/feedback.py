"""What observed iterations teach about the predictor: its biases, and how often its bound holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from predictors.prediction import Prediction

#: Weight of one observation in the bias of its phase: about the last 100 count.
_BIAS_WEIGHT = 0.01
#: Early observations of a phase weigh 1 / (n + this), so that the first few do not swing it.
_BIAS_HEAD_START = 10.0
#: A single observation moves the bias by no more than this factor's logarithm says.
_LOG_RATIO_LIMIT = math.log(2.0)
#: Step of the adaptive bound (adaptive conformal inference, Gibbs and Candes 2021, equation 2),
#: in logarithm of duration per unit of miss rate.
_BOUND_STEP = 0.02
_BOUND_WIDENING_LIMIT = math.log(1.5)
#: Weight of one observation in the reported coverage.
_COVERAGE_WEIGHT = 0.002
#: Energies are compared over this much computing: driver counters move in steps of tens of
#: milliseconds, within which power is anything.
_POWER_SPAN_SECONDS = 1.0
#: Weight of one such span. Clocks err apart (voltage is what no feature tells), so the last few
#: seconds count.
_POWER_WEIGHT = 0.2


class PredictionFeedback:
    """Correction of durations, per phase (decode only, or with prompts), and of power.

    Args:
        violation_ratio: Share of iterations that may exceed their upper bound.
    """

    def __init__(self, violation_ratio: float) -> None:
        self._violation_ratio = violation_ratio
        self._log_bias = [0.0, 0.0]
        self._count = [0, 0]
        self._widening = [0.0, 0.0]
        self._coverage: float | None = None
        self._log_power_bias = 0.0
        self._power_spans_count = 0
        self._span_seconds = self._span_joules = self._predicted_joules = 0.0

    @property
    def coverage_ratio(self) -> float | None:
        """Share of recent iterations within their corrected bound; None before the first."""
        return self._coverage

    def bias_ratio(self, *, mixed: bool) -> float:
        """Observed over predicted duration of a phase, smoothed."""
        return math.exp(self._log_bias[mixed])

    @property
    def power_ratio(self) -> float:
        """Observed over predicted power at the clocks of late, smoothed."""
        return math.exp(self._log_power_bias)

    def factors(self, *, mixed: bool) -> tuple[float, float]:
        """What durations of a phase, and then their bounds, are multiplied with."""
        return math.exp(self._log_bias[mixed]), math.exp(self._widening[mixed])

    def correct(
        self, prediction: Prediction, mixed: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Corrected latency and upper bound, (K, C) each; `mixed` tells each row's phase."""
        bias = np.exp(np.where(mixed, self._log_bias[1], self._log_bias[0]))[:, None]
        widening = np.exp(np.where(mixed, self._widening[1], self._widening[0]))[:, None]
        latency = prediction.latency_seconds * bias
        upper = np.maximum(prediction.latency_upper_seconds * bias * widening, latency)
        return latency, upper

    def learn(
        self,
        observed_seconds: float,
        predicted_seconds: float,
        upper_seconds: float,
        *,
        mixed: bool,
    ) -> None:
        """Take in one iteration.

        Args:
            observed_seconds: Its duration.
            predicted_seconds: Expected duration at the clock it ran at, uncorrected.
            upper_seconds: Upper bound at that clock, uncorrected.
            mixed: Whether it computed prompts.
        """
        bias, widening = self._log_bias[mixed], self._widening[mixed]
        covered = observed_seconds <= upper_seconds * math.exp(bias + widening)
        missed = 0.0 if covered else 1.0
        moved = widening + _BOUND_STEP * (missed - self._violation_ratio)
        # The calibrated width may prove too wide as well as too narrow; never below the mean.
        floor = -math.log(upper_seconds / predicted_seconds)
        self._widening[mixed] = min(max(moved, floor), _BOUND_WIDENING_LIMIT)
        if self._coverage is None:
            self._coverage = 1.0 - missed
        self._coverage += _COVERAGE_WEIGHT * (1.0 - missed - self._coverage)
        self._count[mixed] += 1
        weight = max(_BIAS_WEIGHT, 1.0 / (self._count[mixed] + _BIAS_HEAD_START))
        error = math.log(observed_seconds / predicted_seconds) - bias
        error = min(max(error, -_LOG_RATIO_LIMIT), _LOG_RATIO_LIMIT)
        self._log_bias[mixed] = bias + weight * error

    def learn_power(self, observed_watts: float, predicted_watts: float, seconds: float) -> None:
        """Take in the power of one iteration that had the GPU to itself.

        Args:
            observed_watts: Mean power of one GPU; a counter that has not moved since gives 0.
            predicted_watts: Expected power at the clock it ran at, uncorrected.
            seconds: Its duration.
        """
        self._span_seconds += seconds
        self._span_joules += observed_watts * seconds
        self._predicted_joules += predicted_watts * seconds
        if self._span_seconds < _POWER_SPAN_SECONDS:
            return
        ratio = max(self._span_joules / self._predicted_joules, math.exp(-_LOG_RATIO_LIMIT))
        self._span_seconds = self._span_joules = self._predicted_joules = 0.0
        self._power_spans_count += 1
        weight = max(_POWER_WEIGHT, 1.0 / (self._power_spans_count + 1.0))
        error = min(math.log(ratio), _LOG_RATIO_LIMIT) - self._log_power_bias
        self._log_power_bias += weight * error
