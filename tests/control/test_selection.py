from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from throttle.control.selection import Hysteresis, Reason, Selector

CLOCKS = np.arange(600, 2000, 100)
COUNT = len(CLOCKS)
POWER = np.linspace(200.0, 500.0, COUNT)
EAGER = Hysteresis(
    dwell_seconds=0.0, least_dwell_seconds=0.0, least_gain_ratio=0.0, raise_step_ratio=0.0
)
STEADY = Hysteresis(
    dwell_seconds=1.0, least_dwell_seconds=0.2, least_gain_ratio=0.01, raise_step_ratio=0.1
)


def _above(index):
    return np.arange(COUNT) >= index


_masks = st.lists(st.booleans(), min_size=COUNT, max_size=COUNT).map(np.array)
_powers = st.lists(
    st.one_of(st.floats(50, 700), st.just(np.inf)), min_size=COUNT, max_size=COUNT
).map(np.array)


@given(
    steps=st.lists(
        st.tuples(_masks, st.one_of(st.none(), _powers), st.floats(0, 2)), min_size=1, max_size=8
    ),
    eager=st.booleans(),
)
def test_an_infeasible_clock_is_never_picked_while_a_feasible_one_exists(steps, eager):
    selector = Selector(CLOCKS, EAGER if eager else STEADY)
    now = 0.0
    for feasible, power, elapsed in steps:
        now += elapsed
        index, reason = selector.choose(feasible, power, now)
        assert feasible[index] or not feasible.any()
        if not feasible.any():
            assert (index, reason) == (COUNT - 1, Reason.INFEASIBLE)


def test_the_least_long_run_power_wins_when_every_clock_is_feasible():
    power = POWER.copy()
    power[4] = 100.0
    assert Selector(CLOCKS, EAGER).choose(_above(0), power, 0.0) == (4, Reason.CRUISE)


def test_the_cheapest_feasible_clock_is_named_slack_when_a_cheaper_one_is_not_feasible():
    assert Selector(CLOCKS, EAGER).choose(_above(6), POWER, 0.0) == (6, Reason.SLACK)


def test_raising_is_immediate_and_lowering_for_a_small_gain_waits_for_the_dwell():
    selector = Selector(CLOCKS, STEADY)
    power = np.linspace(294.0, 300.0, COUNT)  # 2 % from the lowest to the highest
    assert selector.choose(_above(0), power, 10.0) == (0, Reason.CRUISE)
    raised, reason = selector.choose(_above(COUNT - 1), power, 10.1)
    assert (raised, reason) == (COUNT - 1, Reason.SLACK)
    assert selector.choose(_above(0), power, 10.6) == (COUNT - 1, Reason.HELD)
    assert selector.choose(_above(0), power, 11.2) == (0, Reason.CRUISE)


def test_a_lower_clock_that_saves_much_comes_sooner_but_never_at_once():
    selector = Selector(CLOCKS, STEADY)
    selector.choose(_above(0), POWER, 10.0)
    selector.choose(_above(9), POWER, 10.1)  # a step of 10 % above the first clock, or the ninth
    current = selector.current
    assert selector.choose(_above(0), POWER, 10.25) == (current, Reason.HELD)
    assert selector.choose(_above(0), POWER, 10.35) == (0, Reason.CRUISE)


@given(elapsed_seconds=st.floats(0.0, 3.0), gain_ratio=st.floats(0.0, 0.9))
def test_what_lowers_the_clock_after_a_time_lowers_it_ever_after(elapsed_seconds, gain_ratio):
    def lowered(after_seconds):
        selector = Selector(CLOCKS, STEADY)
        selector.jump(0, 0.0)
        selector.jump(COUNT - 1, 1.0)
        power = np.full(COUNT, 100.0)
        power[0] = 100.0 * (1.0 - gain_ratio)
        return selector.choose(_above(0), power, 1.0 + after_seconds)[0] == 0

    if lowered(elapsed_seconds):
        assert lowered(elapsed_seconds + 0.5)


def test_a_gain_too_small_to_be_worth_a_change_is_left():
    selector = Selector(CLOCKS, STEADY)
    power = np.full(COUNT, 300.0)
    power[3] = 298.0
    assert selector.choose(_above(0), power, 5.0) == (COUNT - 1, Reason.HELD)


def test_a_raise_forced_by_slack_is_a_whole_step():
    selector = Selector(CLOCKS, STEADY)
    selector.choose(_above(0), POWER, 0.0)
    index, _ = selector.choose(_above(1), POWER, 0.1)
    assert CLOCKS[index] >= 1.1 * CLOCKS[0]


def test_before_the_load_is_known_the_fastest_feasible_clock_is_kept():
    selector = Selector(CLOCKS, EAGER)
    assert selector.choose(_above(0), None, 0.0) == (COUNT - 1, Reason.POOR_INFORMATION)


def test_a_load_that_no_feasible_clock_carries_runs_at_the_fastest():
    power = np.where(_above(5), np.inf, POWER)
    result = Selector(CLOCKS, EAGER).choose(_above(5), power, 0.0)
    assert result == (COUNT - 1, Reason.INFEASIBLE)
