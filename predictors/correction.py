"""Correction of a predictor by what is observed while it serves, and of its bound."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from predictors.prediction import Prediction

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: What a correction may depend on: load, in logarithms of about one; the first `_TILTED_COUNT` of
#: it times the log of the clock; and the clock itself, linear between these clock ratios, since
#: voltage leaves its floor at a clock that nobody tells.
_LOAD_COUNT = 4
_TILTED_COUNT = 3
_CLOCK_NODES = np.linspace(0.2, 1.0, 9)

#: Prior deviation of each weight, in log units: corrections start at none.
_PRIOR_DEVIATION = 0.2

#: Deviation of one observation that the update assumes.
_NOISE_DEVIATION = 0.05

#: Variance by which each weight may drift from one observation to the next: with the noise above,
#: about the last thousand count.
_DRIFT_VARIANCE = 2.5e-9

#: One observation counts as no more than this many log units off, and no correction exceeds the
#: other.
_OBSERVATION_LIMIT = 0.3
_CORRECTION_LIMIT = math.log(3.0)

#: Step of the adaptive bound (adaptive conformal inference, Gibbs and Candes 2021, equation 2), in
#: log units per miss; and the most that it widens.
_BOUND_STEP = 0.02
_BOUND_WIDENING_LIMIT = math.log(1.5)


class OnlineCorrection:
    """Latency and power corrected by recursive least squares of the log error.

    One linear model per phase (with prompts or without) and target: a constant, the logs of tokens,
    requests and KV, the log of the clock times load, and the clock, piecewise linear. A constant
    alone would follow the mix of loads and clocks instead of the error of each.

    Args:
        violation_ratio: Share of iterations allowed above the upper bound.
    """

    def __init__(self, violation_ratio: float = 0.01) -> None:
        self._violation_ratio = violation_ratio
        self._latency = [_Regression(), _Regression()]
        self._power = [_Regression(), _Regression()]
        self._widening = [0.0, 0.0]

    def learn(
        self,
        shape: NDArray[np.float64],
        clock_ratio: float,
        *,
        observed_seconds: float,
        predicted_seconds: float,
        upper_seconds: float,
        observed_watts: float | None = None,
        predicted_watts: float | None = None,
    ) -> None:
        """Take in one iteration.

        Args:
            shape: (7,) what it computed.
            clock_ratio: Clock that it ran at over the maximum clock.
            observed_seconds: Its duration.
            predicted_seconds: Expected duration at that clock, uncorrected.
            upper_seconds: Upper bound at that clock, uncorrected.
            observed_watts: Power of one GPU, if its window says so.
            predicted_watts: Expected power at that clock, uncorrected.
        """
        phase = int(shape[1] > 0.0)
        row = _row(shape, clock_ratio)
        corrected = predicted_seconds * math.exp(self._latency[phase].value(row))
        margin = math.log(upper_seconds / predicted_seconds)
        widening = self._widening[phase]
        missed = observed_seconds > corrected * math.exp(margin + widening)
        moved = widening + _BOUND_STEP * (missed - self._violation_ratio)
        # the calibrated width may prove too wide as well as too narrow; never below the mean
        self._widening[phase] = min(max(moved, -margin), _BOUND_WIDENING_LIMIT)
        self._latency[phase].learn(row, math.log(observed_seconds / predicted_seconds))
        if observed_watts and predicted_watts:
            self._power[phase].learn(row, math.log(observed_watts / predicted_watts))

    def correct_row(
        self,
        shape: NDArray[np.float64],
        clock_ratio: float,
        predicted: tuple[float, float, float],
    ) -> tuple[float, float, float]:
        """Latency, bound and power of one shape at one clock, corrected."""
        phase = int(shape[1] > 0.0)
        row = _row(shape, clock_ratio)
        latency, upper, power = predicted
        factor = math.exp(self._latency[phase].value(row))
        return (
            latency * factor,
            max(upper * factor * math.exp(self._widening[phase]), latency * factor),
            power * math.exp(self._power[phase].value(row)),
        )

    def corrected(
        self,
        prediction: Prediction,
        shapes: NDArray[np.float64],
        clock_ratios: NDArray[np.float64],
    ) -> Prediction:
        """The prediction of (K, 7) shapes at C clocks, corrected, and monotone in clock as before.

        Args:
            prediction: Arrays (K, C).
            shapes: What was predicted.
            clock_ratios: (C,) clock over maximum clock.
        """
        load = _load_rows(shapes)
        mixed = (shapes[:, 1] > 0.0)[:, None]
        latency, power = (
            np.where(mixed, both[1].values(load, clock_ratios), both[0].values(load, clock_ratios))
            for both in (self._latency, self._power)
        )
        seconds = _falling(prediction.latency_seconds * np.exp(latency))
        widening = np.where(mixed, self._widening[1], self._widening[0])
        upper = _falling(prediction.latency_upper_seconds * np.exp(latency + widening))
        watts = np.maximum.accumulate(prediction.power_watts * np.exp(power), axis=1)
        return Prediction(seconds, np.maximum(upper, seconds), watts)


class _Regression:
    """Bayesian linear regression that forgets: recursive least squares with a prior."""

    def __init__(self) -> None:
        count = _LOAD_COUNT + _TILTED_COUNT + len(_CLOCK_NODES)
        self._weights = np.zeros(count)
        self._covariance = np.eye(count) * _PRIOR_DEVIATION**2
        self._drift = np.eye(count) * _DRIFT_VARIANCE

    def value(self, row: NDArray[np.float64]) -> float:
        return float(np.clip(row @ self._weights, -_CORRECTION_LIMIT, _CORRECTION_LIMIT))

    def values(
        self, load: NDArray[np.float64], clock_ratios: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Log corrections, (K, C)."""
        load_weights, tilts, nodes = np.split(
            self._weights, [_LOAD_COUNT, _LOAD_COUNT + _TILTED_COUNT]
        )
        found = (load @ load_weights)[:, None]
        found = found + (load[:, :_TILTED_COUNT] @ tilts)[:, None] * np.log(clock_ratios)
        found = found + np.interp(clock_ratios, _CLOCK_NODES, nodes)
        return np.clip(found, -_CORRECTION_LIMIT, _CORRECTION_LIMIT)

    def learn(self, row: NDArray[np.float64], target: float) -> None:
        error = target - float(row @ self._weights)
        error = min(max(error, -_OBSERVATION_LIMIT), _OBSERVATION_LIMIT)
        covariance = self._covariance
        if covariance[0, 0] < _PRIOR_DEVIATION**2:
            covariance = covariance + self._drift
        direction = covariance @ row
        gain = direction / (_NOISE_DEVIATION**2 + float(row @ direction))
        self._weights = self._weights + gain * error
        covariance = covariance - np.outer(gain, direction)
        self._covariance = 0.5 * (covariance + covariance.T)


def _load_rows(shapes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K, 4): one, and the logs of tokens, requests and KV, each about one."""
    rows = np.ones((len(shapes), _LOAD_COUNT))
    rows[:, 1] = np.log1p(shapes[:, 1] + shapes[:, 5]) / 5.0
    rows[:, 2] = np.log1p(shapes[:, 0] + shapes[:, 3]) / 5.0
    rows[:, 3] = np.log1p(shapes[:, 2] + shapes[:, 4]) / 10.0
    return rows


def _row(shape: NDArray[np.float64], clock_ratio: float) -> NDArray[np.float64]:
    """One iteration as the regressions see it."""
    load = _load_rows(shape[None, :])[0]
    position = np.interp(clock_ratio, _CLOCK_NODES, np.arange(len(_CLOCK_NODES)))
    nodes = np.maximum(1.0 - np.abs(np.arange(len(_CLOCK_NODES)) - position), 0.0)
    return np.concatenate([load, load[:_TILTED_COUNT] * math.log(clock_ratio), nodes])


def _falling(values: NDArray[np.float64]) -> NDArray[np.float64]:
    falling: NDArray[np.float64] = np.maximum.accumulate(values[:, ::-1], axis=1)[:, ::-1]
    return falling
