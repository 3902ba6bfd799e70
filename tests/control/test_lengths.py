from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttle.control.lengths import LengthBeliefs, LengthCurve, RequestLengths


def _remaining(curve, generated):
    return float(curve.expected_remaining_tokens(np.array([float(generated)]))[0])


def test_the_curve_learns_the_mean_of_answers_seen():
    curve = LengthCurve()
    random = np.random.default_rng(1)
    for length in random.geometric(1 / 200, size=3000):
        curve.add(int(length), censored=False)
    assert _remaining(curve, 0) == pytest.approx(200, rel=0.08)
    # A geometric length has no memory: the same is left after 150 tokens.
    assert _remaining(curve, 150) == pytest.approx(200, rel=0.15)


def test_answers_cut_short_do_not_shorten_the_belief():
    cut, whole = LengthCurve(), LengthCurve()
    random = np.random.default_rng(2)
    for length in random.geometric(1 / 300, size=3000):
        whole.add(int(length), censored=False)
        limit = int(random.integers(1, 600))
        cut.add(min(int(length), limit), censored=length > limit)
    assert _remaining(cut, 0) == pytest.approx(_remaining(whole, 0), rel=0.2)


def test_answers_that_still_go_on_lengthen_the_mean():
    curve = LengthCurve()
    for _ in range(20):
        curve.add(100, censored=False)
    nobody = curve.mean_tokens(np.empty(0))
    assert curve.mean_tokens(np.full(20, 1000.0)) > 3.0 * nobody
    assert curve.mean_tokens(np.full(20, 5.0)) == pytest.approx(nobody, rel=0.1)


def test_classes_are_learned_apart():
    beliefs = LengthBeliefs()
    for _ in range(500):
        beliefs.add("short", 10, censored=False)
        beliefs.add("long", 2000, censored=False)
    none = np.full(2, np.nan)
    requests = RequestLengths(
        ["short", "long"], np.array([0.0, 1.0]), np.zeros(2), np.full(2, math.inf), none
    )
    planned = beliefs.planned_tokens(requests)
    assert planned[0] < 40
    assert planned[1] > 1000


@given(
    generated=st.floats(0, 5000),
    limit=st.floats(1, 5000),
    predicted=st.one_of(st.just(math.nan), st.floats(1, 5000)),
)
def test_planned_tokens_are_whole_positive_and_within_the_limit(generated, limit, predicted):
    generated, limit = math.floor(generated), math.floor(limit)
    (planned,) = LengthBeliefs().planned_tokens(
        RequestLengths(
            [""],
            np.zeros(1),
            np.array([float(generated)]),
            np.array([float(limit)]),
            np.array([predicted]),
        )
    )
    assert planned >= 1
    assert planned == math.floor(planned)
    assert planned <= max(limit - generated, 1)


def _one(generated, limit=math.inf, predicted=math.nan):
    return RequestLengths(
        [""], np.zeros(1), np.array([generated]), np.array([limit]), np.array([predicted])
    )


def test_an_answer_ends_within_a_stretch_as_often_as_answers_did():
    beliefs = LengthBeliefs()
    for length in np.random.default_rng(3).geometric(1 / 100, size=4000):
        beliefs.add("", int(length), censored=False)
    (shares,) = beliefs.ending_shares(_one(50.0), np.array([[10.0, 40.0, 100.0]]))
    stretches = np.diff(1.0 - 0.99 ** np.array([0.0, 10.0, 40.0, 100.0]))
    np.testing.assert_allclose(shares, stretches, rtol=0.12)


@given(
    generated=st.integers(1, 3000),
    limit=st.integers(1, 3000),
    ends=st.lists(st.integers(1, 500), min_size=1, max_size=8, unique=True),
)
def test_ending_shares_are_probabilities_and_an_answer_ends_at_its_limit(generated, limit, ends):
    ahead = np.array([sorted(float(each) for each in ends)])
    shares = LengthBeliefs().ending_shares(_one(float(generated), float(limit)), ahead)
    assert (shares >= -1e-12).all()
    assert shares.sum() <= 1.0 + 1e-9
    if generated + ahead[0, -1] >= limit:
        assert shares.sum() == pytest.approx(1.0)


def test_a_predicted_answer_ends_where_the_engine_says():
    ahead = np.array([[5.0, 10.0, 20.0]])
    shares = LengthBeliefs().ending_shares(_one(40.0, predicted=48.0), ahead)
    assert shares.tolist() == [[0.0, 1.0, 0.0]]


def test_successors_of_a_geometric_batch_come_as_fast_as_its_requests_go():
    curve = LengthCurve()
    for length in np.random.default_rng(4).geometric(1 / 100, size=4000):
        curve.add(int(length), censored=False)
    joined = curve.successor_ratio(np.array([0.0, 50.0, 200.0]))
    np.testing.assert_allclose(joined, 1.0 - 0.99 ** np.array([0.0, 50.0, 200.0]), atol=0.03)


def test_an_engines_prediction_is_used_until_it_is_outlived():
    beliefs = LengthBeliefs()
    requests = RequestLengths(
        [""], np.zeros(2), np.array([10.0, 60.0]), np.full(2, math.inf), np.array([50.0, 50.0])
    )
    planned = beliefs.planned_tokens(requests)
    assert planned[0] == 40
    assert planned[1] > 1
