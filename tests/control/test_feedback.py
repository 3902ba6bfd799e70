from __future__ import annotations

import numpy as np
import pytest

from predictors.prediction import Prediction
from throttle.control.feedback import PredictionFeedback

ONE = np.ones((2, 3))
PREDICTION = Prediction(ONE * 0.01, ONE * 0.011, ONE * 300)
MIXED = np.array([False, True])


def _feed(feedback, ratio, count, spread=0.01, *, mixed=False, seed=3):
    random = np.random.default_rng(seed)
    missed = 0
    for _ in range(count):
        observed = 0.01 * ratio * float(np.exp(random.normal(0, spread)))
        _, upper = feedback.correct(PREDICTION, np.array([mixed, mixed]))
        missed += observed > upper[0, 0]
        feedback.learn(observed, 0.01, 0.011, mixed=mixed)
    return missed / count


def test_without_observations_nothing_is_corrected():
    latency, upper = PredictionFeedback(0.01).correct(PREDICTION, MIXED)
    np.testing.assert_array_equal(latency, PREDICTION.latency_seconds)
    np.testing.assert_array_equal(upper, PREDICTION.latency_upper_seconds)


def test_a_predictor_that_is_15_percent_too_fast_is_corrected():
    feedback = PredictionFeedback(0.01)
    _feed(feedback, 1.15, 500)
    assert feedback.bias_ratio(mixed=False) == pytest.approx(1.15, rel=0.01)


def test_phases_are_corrected_apart():
    feedback = PredictionFeedback(0.01)
    _feed(feedback, 1.2, 500, mixed=True)
    latency, _ = feedback.correct(PREDICTION, MIXED)
    assert latency[0, 0] == pytest.approx(0.01)
    assert latency[1, 0] == pytest.approx(0.012, rel=0.01)


def test_the_bound_returns_to_its_violation_rate_after_a_slowdown():
    feedback = PredictionFeedback(0.01)
    _feed(feedback, 1.0, 1000)
    _feed(feedback, 1.15, 2000, seed=4)
    assert _feed(feedback, 1.15, 6000, spread=0.05, seed=5) == pytest.approx(0.01, abs=0.01)


def test_one_absurd_observation_hardly_moves_the_bias():
    feedback = PredictionFeedback(0.01)
    _feed(feedback, 1.0, 300)
    feedback.learn(10.0, 0.01, 0.011, mixed=False)
    assert feedback.bias_ratio(mixed=False) == pytest.approx(1.0, abs=0.02)


def test_the_upper_bound_is_never_below_the_expectation():
    feedback = PredictionFeedback(0.01)
    _feed(feedback, 1.0, 20_000, spread=1e-6)
    latency, upper = feedback.correct(PREDICTION, MIXED)
    assert (upper >= latency).all()
    assert feedback.coverage_ratio > 0.9


@pytest.mark.parametrize("step_iterations", [1, 7])
def test_power_is_corrected_even_if_the_energy_counter_moves_in_steps(step_iterations):
    feedback = PredictionFeedback(0.01)
    for number in range(1, 2101):
        # the counter shows the energy of several iterations at once, and none in between
        shown = step_iterations if number % step_iterations == 0 else 0
        feedback.learn_power(360.0 * shown, 300.0, 0.01)
    assert feedback.power_ratio == pytest.approx(1.2, rel=0.03)


def test_a_counter_that_stands_still_or_jumps_moves_the_power_by_no_more_than_a_limit():
    feedback = PredictionFeedback(0.01)
    assert feedback.power_ratio == 1.0
    for _ in range(50):
        feedback.learn_power(0.0, 300.0, 1.0)
    assert feedback.power_ratio == pytest.approx(0.5, abs=0.01)
    for _ in range(50):
        feedback.learn_power(1e9, 300.0, 1.0)
    assert feedback.power_ratio == pytest.approx(2.0, abs=0.01)
