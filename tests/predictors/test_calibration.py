"""The one-sided bound."""

from __future__ import annotations

import math

import numpy as np
import pytest

from predictors.calibration import calibrate, conformal_quantile
from predictors.errors import PredictorsError


@pytest.mark.parametrize("violation", [0.01, 0.05, 0.2])
def test_bound_holds_at_the_stated_rate_on_fresh_draws(violation):
    rng = np.random.default_rng(3)
    violated = []
    for _ in range(300):
        scores = rng.standard_t(4, 400)
        violated.append(np.mean(rng.standard_t(4, 200) > conformal_quantile(scores, violation)))
    # by theory at most `violation` on average, and at least that less 1 / (n + 1)
    error = 3.0 * np.std(violated) / math.sqrt(len(violated))
    assert violation - 1 / 401 - error <= np.mean(violated) <= violation + error


def test_too_few_scores_give_no_quantile():
    assert math.isinf(conformal_quantile(np.zeros(98), 0.01))
    assert conformal_quantile(np.arange(99.0), 0.01) == 98.0


def test_each_phase_and_clock_band_has_its_margin():
    rng = np.random.default_rng(1)
    size = 6000
    ratios = rng.choice([0.3, 0.6, 1.0], size)
    prefill = rng.integers(0, 2, size)
    spread = np.where(prefill > 0, 0.2, 0.02) / ratios
    found = calibrate(np.abs(rng.normal(0, 1, size)) * spread, prefill, ratios, 0.01)
    for phase in ("decode", "prefill"):
        low, middle, high = found.log_margins[phase]
        assert low > middle > high > 0.0
    assert found.log_margins["prefill"][2] > found.log_margins["decode"][0]
    factors = found.factors(np.array([0.3, 0.5, 0.75, 1.0]))
    assert factors.shape == (3, 4)
    assert factors[0] == pytest.approx(
        np.exp([found.log_margins["decode"][band] for band in (0, 1, 2, 2)])
    )


def test_a_band_with_few_rows_takes_the_wider_margin():
    scores = np.concatenate([np.full(990, 0.1), np.full(10, 0.3), [0.0]])
    prefill = np.zeros(1001, dtype=int)
    prefill[-1] = 1
    found = calibrate(scores, prefill, np.ones(1001), 0.01)
    overall = conformal_quantile(scores, 0.01)
    assert found.log_margins["prefill"] == (overall, overall, overall)
    assert found.rows_counts["prefill"] == (0, 0, 1)


def test_a_phase_with_few_rows_takes_the_largest_error_seen_in_it():
    rng = np.random.default_rng(5)
    scores = np.concatenate([rng.normal(0.0, 0.01, 2000), rng.normal(0.0, 0.2, 60)])
    prefill = (np.arange(2060) >= 2000).astype(int)
    found = calibrate(scores, prefill, np.ones(2060), 0.01)
    assert found.log_margins["prefill"] == (scores[2000:].max(),) * 3
    assert found.log_margins["decode"][2] < 0.05  # the band that holds the rows


def test_a_bound_is_never_below_the_prediction():
    found = calibrate(np.full(500, -0.2), np.zeros(500, dtype=int), np.ones(500), 0.01)
    assert all(margin >= 0.0 for margins in found.log_margins.values() for margin in margins)


def test_too_few_rows_overall_are_refused():
    with pytest.raises(PredictorsError, match=r"50 rows; .* needs 99 or more"):
        calibrate(np.zeros(50), np.zeros(50, dtype=int), np.ones(50), 0.01)
