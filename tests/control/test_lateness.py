from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.scenes import make_live, make_profile, make_row
from throttle.control.lateness import (
    EndingShares,
    LateBudget,
    Newcomers,
    PromptDelay,
    expect_lateness,
)
from throttle.control.lengths import LengthBeliefs, LengthCurve, RequestLengths
from throttle.control.projection import project
from throttle.control.prompt_work import PromptWork
from throttle.control.scoreboard import Column
from throttle.testing import FormulaPredictor

PREDICTOR = FormulaPredictor()
CLOCKS = len(PREDICTOR.clocks_mhz)
#: Per window: prompts come four times a second, 500 tokens each.
WINDOWS = np.geomspace(0.02, 8.0, 8)
WORK = PromptWork(
    np.log(WINDOWS),
    1.0 - np.exp(-4.0 * WINDOWS),
    np.log(500.0 * np.maximum(4.0 * WINDOWS, 1.0)),
    np.log(500.0**2 * np.maximum(4.0 * WINDOWS, 1.0)),
)


def _ending(rows, ahead):
    requests = RequestLengths(
        [""],
        rows[:, Column.LENGTH_CLASS],
        rows[:, Column.GENERATED],
        rows[:, Column.MAX_OUTPUT],
        rows[:, Column.PREDICTED_OUTPUT],
    )
    return LengthBeliefs().ending_shares(requests, ahead)


def _lateness(
    running, waiting=(), *, now=1.0, planned=100, work=WORK, newcomers=None, widening=1.0
):
    live = make_live(running, waiting)
    horizon = project(
        live,
        np.full(len(live.running), float(planned)),
        np.full(len(live.waiting), float(planned)),
        make_profile(),
    )
    prediction = PREDICTOR.predict(horizon.shapes)
    latency = prediction.latency_seconds
    ends = np.cumsum(horizon.iterations)
    first = horizon.iterations_at(horizon.first_tokens)
    prompts = horizon.prompts.copy()
    prompts[:, Column.GENERATED] = 1.0
    ending = EndingShares(
        _ending(horizon.decodes, np.broadcast_to(ends, (len(horizon.decodes), len(ends)))),
        _ending(prompts, np.maximum(ends - first[:, None], 0.0)),
    )
    token_seconds = np.broadcast_to(1e-4 * latency[-1] / latency[-1, -1], latency.shape)
    return expect_lateness(
        horizon,
        latency,
        latency * (1.0 + 0.02 * widening),
        now_seconds=now,
        ending=ending,
        delay=PromptDelay(work, token_seconds),
        newcomers=newcomers,
        clocks=(0, CLOCKS - 1),
    )


_requests = st.lists(
    st.tuples(st.integers(2, 300), st.floats(0.0, 4.9), st.floats(0.005, 0.1)),
    min_size=1,
    max_size=12,
)


@given(running=_requests, newcomers=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_slower_clock_never_makes_fewer_answers_late(running, newcomers):
    rows = [
        make_row(i + 1, generated=g, first_token=t, tpot=tpot)
        for i, (g, t, tpot) in enumerate(running)
    ]
    coming = Newcomers(LengthCurve(), 0.05, 5.0, 2500.0) if newcomers else None
    lateness = _lateness(rows, now=5.0, newcomers=coming)
    assert (np.diff(lateness.excess_ratio) <= 1e-12).all()
    assert lateness.excess_ratio[-1] == pytest.approx(0.0, abs=1e-9)
    assert (lateness.excess_ratio <= 1.0).all()


def test_an_answer_with_time_in_the_bank_bears_a_slower_clock_than_one_without():
    limit = 1.2 * float(
        PREDICTOR.predict(np.array([[0, 0, 0, 1, 300, 1, 0.0]])).latency_seconds[0, -1]
    )
    rich = make_row(1, generated=101, first_token=4.99, tpot=limit)
    poor = make_row(1, generated=101, first_token=5.0 - 0.98 * 100 * limit, tpot=limit)
    slower = CLOCKS // 4
    banked = _lateness([rich], now=5.0).excess_ratio[slower]
    spent = _lateness([poor], now=5.0).excess_ratio[slower]
    assert banked < 1e-3
    assert spent > 0.01


def test_an_answer_that_is_late_at_every_clock_holds_no_clock_up():
    lost = make_row(1, generated=101, first_token=-1000.0, tpot=0.01)
    lateness = _lateness([lost])
    np.testing.assert_allclose(lateness.excess_ratio, 0.0, atol=1e-9)


def test_prompts_in_between_make_answers_late_that_alone_would_not_be():
    row = make_row(1, generated=3, first_token=0.96, tpot=0.02)
    alone = _lateness([row], work=None)
    among = _lateness([row])
    assert alone.excess_ratio[CLOCKS // 2] == pytest.approx(0.0, abs=1e-9)
    assert among.excess_ratio[CLOCKS // 2] > 1e-5


def test_short_answers_are_more_easily_late_than_long_ones():
    def coming(length):
        lengths = LengthCurve()
        for _ in range(2000):
            lengths.add(length, censored=False)
        return Newcomers(lengths, 0.03, 50.0, 2500.0)

    row = make_row(1, generated=3, first_token=0.99)
    short = _lateness([row], newcomers=coming(3)).excess_ratio
    long = _lateness([row], newcomers=coming(100)).excess_ratio
    assert short[0] > 3 * long[0]


def test_the_answer_named_is_the_one_with_the_least_time_left():
    rows = [
        make_row(7, generated=50, first_token=0.9, tpot=0.05),
        make_row(8, generated=50, first_token=-1.2, tpot=0.05),
    ]
    lateness = _lateness(rows)
    assert lateness.request_number == 8
    assert (np.diff(lateness.request_slack_seconds) >= 0).all()


def test_a_planned_prompt_counts_from_its_own_first_token():
    waiting = [make_row(1, prompt=1500, computed=0, arrival=-100.0, tpot=0.05)]
    lateness = _lateness([], waiting)
    # Its long wait is a matter of TTFT; its answer can still be on time.
    assert lateness.excess_ratio[CLOCKS // 2] < 0.01


def test_without_limits_there_is_no_lateness():
    assert _lateness([make_row(1, generated=3)]) is None


def test_the_budget_falls_at_once_and_recovers_slowly():
    budget = LateBudget(0.001)
    budget.learn(late=True)
    after_one = budget.ratio
    assert after_one < 0.9 * 0.001
    for _ in range(200):
        budget.learn(late=False)
    assert after_one < budget.ratio < 0.001


@given(late=st.lists(st.booleans(), max_size=300))
def test_the_budget_stays_within_its_bounds(late):
    budget = LateBudget(0.001)
    for each in late:
        budget.learn(late=each)
    assert 0.001 / 8 * 0.999 <= budget.ratio <= 0.002 * 1.001


def test_lateness_at_the_target_keeps_the_budget_where_it_is():
    budget = LateBudget(0.01)
    for step in range(20_000):
        budget.learn(late=step % 100 == 0)
    assert budget.ratio == pytest.approx(0.01, rel=0.6)
