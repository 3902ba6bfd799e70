"""Active experts: formula, fitted skew, and what latency tells."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictors.active_experts import (
    ActiveExperts,
    ActiveExpertsEstimator,
    Routing,
    chosen_skew,
    expected_active_experts,
    fit_reported_skew,
    selection_probabilities,
)
from predictors.dataset import read_records
from predictors.errors import PredictorsError
from predictors.predictor import fastest_predictor
from predictors.training import train

TOKENS = np.geomspace(1.0, 4096.0, 60)


def test_skew_zero_is_the_uniform_formula():
    uniform = expected_active_experts(TOKENS, 128, 8)
    assert ActiveExperts(128, 8, 0.0)(TOKENS) == pytest.approx(uniform)
    assert ActiveExperts(128, 8, 0.1)(TOKENS) == pytest.approx(uniform, rel=0.03)


@given(st.floats(0.1, 1.5), st.sampled_from([(128, 8), (8, 2), (256, 8), (16, 1)]))
def test_skew_activates_fewer_and_never_too_few(skew, experts):
    count, per_token = experts
    chosen = selection_probabilities(count, per_token, skew)
    assert chosen.sum() == pytest.approx(per_token)
    assert (chosen <= 1.0).all()
    active = ActiveExperts(count, per_token, skew)(TOKENS)
    assert (np.diff(active) >= -1e-9).all()
    assert (active <= expected_active_experts(TOKENS, count, per_token) * 1.005).all()
    assert (active >= per_token * 0.999).all()


def test_reported_counts_give_the_skew_back():
    reported = ActiveExperts(128, 8, 0.7)(TOKENS)
    assert fit_reported_skew(TOKENS, reported, 128, 8) == Routing(0.7, "reported")


def test_a_skew_that_explains_hardly_more_is_not_taken():
    assert chosen_skew({0.0: 0.1, 0.5: 0.0999}) == Routing()
    assert chosen_skew({0.0: 0.1, 0.5: 0.05}) == Routing(0.5, "residuals")


def test_routing_refuses_what_no_fit_gives():
    with pytest.raises(PredictorsError, match="skew_exponent is 9"):
        Routing(9.0)
    with pytest.raises(PredictorsError, match="source of routing is 'guess'"):
        Routing(0.1, "guess")


def test_latency_tells_active_experts_back():
    estimator = ActiveExpertsEstimator()
    assert (estimator.ratio, estimator.source) == (1.0, "formula")
    rng = np.random.default_rng(0)
    for _ in range(400):  # the truth reads 30 % fewer experts than the formula says
        predicted, experts = 0.020, 0.012
        observed = (predicted - 0.3 * experts) * np.exp(rng.normal(0, 0.02))
        estimator.observe(observed, predicted, experts)
    assert estimator.source == "inverted"
    assert estimator.ratio == pytest.approx(0.7, abs=0.03)
    assert estimator.active_experts(100.0, 128, 8) == pytest.approx(70.0, abs=3.0)
    assert estimator.active_experts(1000.0, 128, 8) == 128.0


def test_iterations_that_hardly_read_experts_tell_nothing():
    estimator = ActiveExpertsEstimator()
    estimator.observe(0.05, 0.02, 0.001)
    assert (estimator.ratio, estimator.source) == (1.0, "formula")


def test_reported_counts_decide_the_routing_of_a_bundle(invented, tmp_path):
    frame = invented.records_frame(1500)
    tokens = (frame["sum_prefill_tokens"] + frame["num_decode_requests"]).to_numpy(float)
    frame["mean_active_experts_count"] = ActiveExperts(128, 8, 0.6)(np.maximum(tokens, 1.0))
    path = invented.write_parquet(frame, tmp_path / "a.parquet")
    bundle = train(read_records([path]), invented.QUICK)
    assert bundle.manifest.routing == Routing(0.6, "reported")
    predictor = fastest_predictor(bundle)
    assert predictor.active_experts_source == "reported"
    shapes = np.array([[0.0, 0.0, 0.0, 8.0, 8000.0, 8.0, 0.0]])
    fewer = predictor.with_active_experts(0.5)
    assert fewer.active_experts_source == "inverted"
    assert fewer.expert_seconds(shapes)[0] == pytest.approx(
        0.5 * predictor.expert_seconds(shapes)[0]
    )
    assert predictor.active_experts_source == "reported"
