from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttle.control.late_price import LatePrice


def _expecting(ratio, seconds, *, target=0.001, step=0.02):
    price = LatePrice(target)
    for index in range(round(seconds / step)):
        price.expect(ratio, step * index)
    return price


def test_the_price_rises_while_more_is_expected_late_than_the_target_and_falls_while_less():
    first = LatePrice(0.001).answers
    assert _expecting(0.003, 30.0).answers > 1.5 * first
    assert _expecting(0.0003, 30.0).answers < 0.8 * first
    assert _expecting(0.001, 30.0).answers == pytest.approx(first)


def test_where_lateness_falls_with_its_price_the_target_is_what_comes_out():
    price = LatePrice(0.001)
    shares = []
    for step in range(60_000):
        share = 0.1 / price.answers  # three times the target at the first price
        shares.append(share)
        price.expect(share, 0.02 * step)
    assert sum(shares[-5000:]) / 5000 == pytest.approx(0.001, rel=0.02)


def test_one_surprise_or_one_pause_moves_the_price_little():
    surprised, paused = LatePrice(0.001), LatePrice(0.001)
    first = surprised.answers
    for price, ratio, seconds in ((surprised, 1.0, 0.02), (paused, 0.0, 1000.0)):
        price.expect(0.001, 0.0)
        price.expect(ratio, seconds)
    assert first < surprised.answers < 1.01 * first
    assert 0.98 * first < paused.answers < first


def test_the_target_falls_at_once_and_recovers_slowly():
    price = LatePrice(0.001)
    price.learn(late=True)
    after_one = price.target_ratio
    assert after_one < 0.9 * 0.001
    for _ in range(200):
        price.learn(late=False)
    assert after_one < price.target_ratio < 0.001


@given(
    late=st.lists(st.booleans(), max_size=300),
    shares=st.lists(st.floats(0.0, 1.0), max_size=100),
    pause=st.floats(-1.0, 1e6),
)
def test_target_and_price_stay_within_their_bounds(late, shares, pause):
    price = LatePrice(0.001)
    for each in late:
        price.learn(late=each)
    for step, share in enumerate(shares):
        price.expect(share, step * pause)
    assert 0.001 / 8 * 0.999 <= price.target_ratio <= 0.002 * 1.001
    assert math.isfinite(price.answers)
    assert 9.9 < price.answers < 401.0


def test_lateness_at_the_target_keeps_the_target_where_it_is():
    price = LatePrice(0.01)
    for step in range(20_000):
        price.learn(late=step % 100 == 0)
    assert price.target_ratio == pytest.approx(0.01, rel=0.6)
