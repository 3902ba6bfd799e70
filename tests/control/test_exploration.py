from __future__ import annotations

import numpy as np
import pytest

from throttle.control.exploration import ExplorationPlan
from throttle.control.selection import Reason
from throttle.errors import ThrottleError

CLOCKS = list(range(345, 1981, 15))


def _clocks(engine, plan, states, seconds):
    chosen = []
    for _ in range(states):
        decision = plan.decide(engine.state(seconds=seconds))
        assert decision.reason is Reason.EXPLORATION
        chosen.append(decision.target_clock_mhz)
    return chosen


def test_each_clock_is_held_for_its_time(engine):
    chosen = _clocks(engine, ExplorationPlan(CLOCKS, hold_seconds=0.3), 300, seconds=0.01)
    changes = np.flatnonzero(np.diff(chosen))
    assert np.diff(changes).min() >= 30


def test_even_a_short_stretch_covers_the_range(engine):
    chosen = _clocks(engine, ExplorationPlan(CLOCKS, hold_seconds=0.3), 20, seconds=0.3)
    gaps = np.diff([CLOCKS[0], *sorted(chosen), CLOCKS[-1]])
    assert gaps.max() < 0.15 * (CLOCKS[-1] - CLOCKS[0])


def test_a_plan_predicts_nothing(engine):
    with pytest.raises(ThrottleError, match="predicts nothing"):
        ExplorationPlan(CLOCKS, 0.3).evaluate(engine.state())


def test_a_clock_is_held_until_enough_iterations_ran(engine):
    plan = ExplorationPlan(CLOCKS, hold_seconds=0.3, hold_iterations=4)
    chosen = _clocks(engine, plan, 40, seconds=1.0)
    changes = np.flatnonzero(np.diff(chosen))
    assert np.diff(changes).min() >= 4


def test_clocks_that_weigh_more_come_more_often(engine):
    weights = [3.0 if clock < 1000 else 1.0 for clock in CLOCKS]
    plan = ExplorationPlan(CLOCKS, hold_seconds=0.0, weights=weights)
    chosen = np.array(_clocks(engine, plan, 400, seconds=0.1))
    wanted = sum(weights[: sum(clock < 1000 for clock in CLOCKS)]) / sum(weights)
    assert np.mean(chosen < 1000) == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize(("clocks", "weights"), [((), None), ((345, 360), [1.0]), ((345,), [0.0])])
def test_clocks_and_weights_that_do_not_fit_are_refused(clocks, weights):
    with pytest.raises(ThrottleError, match="one weight for each clock"):
        ExplorationPlan(clocks, 0.3, weights=weights)
