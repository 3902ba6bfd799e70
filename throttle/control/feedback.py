"""What observed iterations teach about the predictor: its biases, and how often its bound holds."""

from __future__ import annotations

import enum
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
_LEAST_POWER_RATIO = math.exp(-_LOG_RATIO_LIMIT)


class Learned(enum.IntEnum):
    """Places in what was learned, (12,), which compiled code reads and changes, too."""

    LOG_BIAS = 0  # of decodes; of iterations with prompts one place on, as below
    COUNT = 2  # observations
    WIDENING = 4  # of the bound, in logarithms
    COVERAGE = 6  # NaN before the first observation
    LOG_POWER_BIAS = 7
    POWER_SPANS = 8  # that were compared
    SPAN_SECONDS = 9  # of the span that is not yet compared
    SPAN_JOULES = 10
    PREDICTED_JOULES = 11


class Observed(enum.IntEnum):
    """Columns of an observed iteration's row after those of its shape."""

    SECONDS = 7  # its duration
    CLOCK = 8  # index of the clock it ran at
    WATTS = 9  # mean power of one GPU; NaN when not known


_PLACES_COUNT = int(Learned.PREDICTED_JOULES) + 1
# Places as plain numbers: compiled code takes them for constants.
_LOG_BIAS = int(Learned.LOG_BIAS)
_COUNT = int(Learned.COUNT)
_WIDENING = int(Learned.WIDENING)
_COVERAGE = int(Learned.COVERAGE)
_LOG_POWER_BIAS = int(Learned.LOG_POWER_BIAS)
_POWER_SPANS = int(Learned.POWER_SPANS)
_SPAN_SECONDS = int(Learned.SPAN_SECONDS)
_SPAN_JOULES = int(Learned.SPAN_JOULES)
_PREDICTED_JOULES = int(Learned.PREDICTED_JOULES)


def learn_duration(  # noqa: PLR0917 - as it is compiled
    learned: NDArray[np.float64],
    violation_ratio: float,
    observed_seconds: float,
    predicted_seconds: float,
    upper_seconds: float,
    phase: int,
) -> None:
    """Take in one iteration, as `PredictionFeedback.learn`; compiled as it stands.

    Args:
        learned: Places as in `Learned`; changed.
        violation_ratio: Share of iterations that may exceed their upper bound.
        observed_seconds: Its duration.
        predicted_seconds: Expected duration at the clock it ran at, uncorrected.
        upper_seconds: Upper bound at that clock, uncorrected.
        phase: 1 if it computed prompts, else 0.
    """
    bias, widening = learned[_LOG_BIAS + phase], learned[_WIDENING + phase]
    covered = observed_seconds <= upper_seconds * math.exp(bias + widening)
    missed = 0.0 if covered else 1.0
    moved = widening + _BOUND_STEP * (missed - violation_ratio)
    # The calibrated width may prove too wide as well as too narrow; never below the mean.
    floor = -math.log(upper_seconds / predicted_seconds)
    learned[_WIDENING + phase] = min(max(moved, floor), _BOUND_WIDENING_LIMIT)
    if math.isnan(learned[_COVERAGE]):
        learned[_COVERAGE] = 1.0 - missed
    learned[_COVERAGE] += _COVERAGE_WEIGHT * (1.0 - missed - learned[_COVERAGE])
    learned[_COUNT + phase] += 1.0
    weight = max(_BIAS_WEIGHT, 1.0 / (learned[_COUNT + phase] + _BIAS_HEAD_START))
    error = math.log(observed_seconds / predicted_seconds) - bias
    error = min(max(error, -_LOG_RATIO_LIMIT), _LOG_RATIO_LIMIT)
    learned[_LOG_BIAS + phase] = bias + weight * error


def learn_power(
    learned: NDArray[np.float64], observed_watts: float, predicted_watts: float, seconds: float
) -> None:
    """Take in the power of one iteration, as `PredictionFeedback.learn_power`; compiled, too.

    Args:
        learned: Places as in `Learned`; changed.
        observed_watts: Mean power of one GPU; a counter that has not moved since gives 0.
        predicted_watts: Expected power at the clock it ran at, uncorrected.
        seconds: Its duration.
    """
    learned[_SPAN_SECONDS] += seconds
    learned[_SPAN_JOULES] += observed_watts * seconds
    learned[_PREDICTED_JOULES] += predicted_watts * seconds
    if learned[_SPAN_SECONDS] < _POWER_SPAN_SECONDS:
        return
    ratio = learned[_SPAN_JOULES] / learned[_PREDICTED_JOULES]
    ratio = max(ratio, _LEAST_POWER_RATIO)
    learned[_SPAN_SECONDS] = learned[_SPAN_JOULES] = learned[_PREDICTED_JOULES] = 0.0
    learned[_POWER_SPANS] += 1.0
    weight = max(_POWER_WEIGHT, 1.0 / (learned[_POWER_SPANS] + 1.0))
    error = min(math.log(ratio), _LOG_RATIO_LIMIT) - learned[_LOG_POWER_BIAS]
    learned[_LOG_POWER_BIAS] += weight * error


class PredictionFeedback:
    """Correction of durations, per phase (decode only, or with prompts), and of power.

    Args:
        violation_ratio: Share of iterations that may exceed their upper bound.

    Attributes:
        learned: What was learned, (12,), places as in `Learned`.
        violation_ratio: As given.
    """

    def __init__(self, violation_ratio: float) -> None:
        self.violation_ratio = violation_ratio
        self.learned = np.zeros(_PLACES_COUNT)
        self.learned[_COVERAGE] = math.nan

    @property
    def coverage_ratio(self) -> float | None:
        """Share of recent iterations within their corrected bound; None before the first."""
        coverage = float(self.learned[_COVERAGE])
        return None if math.isnan(coverage) else coverage

    def bias_ratio(self, *, mixed: bool) -> float:
        """Observed over predicted duration of a phase, smoothed."""
        return math.exp(self.learned[_LOG_BIAS + mixed])

    @property
    def power_ratio(self) -> float:
        """Observed over predicted power at the clocks of late, smoothed."""
        return math.exp(self.learned[_LOG_POWER_BIAS])

    def factors(self, *, mixed: bool) -> tuple[float, float]:
        """What durations of a phase, and then their bounds, are multiplied with."""
        return math.exp(self.learned[_LOG_BIAS + mixed]), math.exp(self.learned[_WIDENING + mixed])

    def correct(
        self, prediction: Prediction, mixed: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Corrected latency and upper bound, (K, C) each; `mixed` tells each row's phase."""
        phase = mixed.astype(np.intp)
        bias = np.exp(self.learned[_LOG_BIAS + phase])[:, None]
        widening = np.exp(self.learned[_WIDENING + phase])[:, None]
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
        learn_duration(
            self.learned,
            self.violation_ratio,
            observed_seconds,
            predicted_seconds,
            upper_seconds,
            int(mixed),
        )

    def learn_power(self, observed_watts: float, predicted_watts: float, seconds: float) -> None:
        """Take in the power of one iteration that had the GPU to itself.

        Args:
            observed_watts: Mean power of one GPU; a counter that has not moved since gives 0.
            predicted_watts: Expected power at the clock it ran at, uncorrected.
            seconds: Its duration.
        """
        learn_power(self.learned, observed_watts, predicted_watts, seconds)
