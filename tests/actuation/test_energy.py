from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from throttle.actuation.energy import EnergyCounter, SummedPower

WRAP_JOULES = 2**32 / 1e3


def test_a_rising_counter_is_followed_from_its_first_reading():
    counter = EnergyCounter(700.0)
    assert [counter.update(raw, second) for second, raw in enumerate([1000.0, 1600.0, 2300.0])] == [
        0.0,
        600.0,
        1300.0,
    ]


def test_a_counter_that_started_anew_counts_what_it_shows_if_that_is_possible():
    counter = EnergyCounter(700.0)
    counter.update(1e6, 0.0)
    assert counter.update(500.0, 1.0) == 500.0
    assert counter.restarts_count == 1


def test_a_fall_that_no_power_explains_is_no_energy():
    counter = EnergyCounter(700.0)
    counter.update(1e6, 0.0)
    assert counter.update(9e5, 1.0) == 0.0
    assert counter.update(9e5 + 600.0, 2.0) == pytest.approx(600.0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 60.0), st.floats(0.0, 700.0)), min_size=1, max_size=200),
    st.floats(0.0, WRAP_JOULES),
)
def test_no_energy_is_lost_over_wraps(steps, start):
    counter = EnergyCounter(700.0)
    true, seconds = start, 0.0
    counter.update(true % WRAP_JOULES, seconds)
    for length, watts in steps:
        true, seconds = true + length * watts, seconds + length
        joules = counter.update(true % WRAP_JOULES, seconds)
    assert joules == pytest.approx(true - start, abs=1e-3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 1e9)), max_size=100))
def test_whatever_a_counter_shows_the_energy_never_falls(readings):
    counter = EnergyCounter(700.0)
    seconds, before = 0.0, 0.0
    for length, raw in readings:
        seconds += length
        joules = counter.update(raw, seconds)
        assert joules >= before
        before = joules


def test_power_is_summed_by_the_mean_of_neighbours():
    summed = SummedPower()
    assert summed.update(100.0, 5.0) == 0.0
    assert summed.update(300.0, 6.0) == 200.0
    assert summed.update(300.0, 6.0) == 200.0
