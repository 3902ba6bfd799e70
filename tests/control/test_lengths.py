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


def test_classes_are_learned_apart():
    beliefs = LengthBeliefs()
    for _ in range(500):
        beliefs.add("short", 10, censored=False)
        beliefs.add("long", 2000, censored=False)
    none = np.full(2, np.nan)
    requests = RequestLengths(
        ["short", "long"], np.array([0.0, 1.0]), np.zeros(2), np.full(2, math.inf), none
    )
    planned = beliefs.beliefs(requests).planned_tokens
    assert planned[0] < 40
    assert planned[1] > 1000


@given(
    generated=st.floats(0, 5000),
    limit=st.floats(1, 5000),
    predicted=st.one_of(st.just(math.nan), st.floats(1, 5000)),
)
def test_planned_tokens_are_whole_positive_and_within_the_limit(generated, limit, predicted):
    generated, limit = math.floor(generated), math.floor(limit)
    belief = LengthBeliefs().beliefs(
        RequestLengths(
            [""],
            np.zeros(1),
            np.array([float(generated)]),
            np.array([float(limit)]),
            np.array([predicted]),
        )
    )
    (planned,), (early,) = belief.planned_tokens, belief.early_tokens
    assert planned >= 1
    assert planned == math.floor(planned)
    assert planned <= max(limit - generated, 1)
    assert 1 <= early <= planned


def test_one_answer_in_fifty_ends_within_its_early_tokens():
    curve = LengthCurve()
    random = np.random.default_rng(3)
    for length in random.geometric(1 / 1000, size=4000):
        curve.add(int(length), censored=False)
    (early,) = curve.early_remaining_tokens(np.array([0.0]))
    assert early == pytest.approx(1000 * math.log(50 / 49), rel=0.25)


def test_an_engines_prediction_is_used_until_it_is_outlived():
    beliefs = LengthBeliefs()
    requests = RequestLengths(
        [""], np.zeros(2), np.array([10.0, 60.0]), np.full(2, math.inf), np.array([50.0, 50.0])
    )
    planned = beliefs.beliefs(requests).planned_tokens
    assert planned[0] == 40
    assert planned[1] > 1
