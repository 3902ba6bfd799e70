from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.scenes import make_live, make_profile, make_row
from throttle.control.lateness import (
    EndingShares,
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
    coming = Newcomers(LengthCurve(), 0.05, 5.0) if newcomers else None
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
        return Newcomers(lengths, 0.03, 50.0)

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


def _ending_at(row, tokens):
    row[Column.MAX_OUTPUT] = tokens
    return row


def test_the_next_iteration_has_only_the_prompts_that_are_planned():
    # A prompt comes at any time: 0.1 s at the fastest clock, more than is left at the slowest.
    often = PromptWork(
        np.log(WINDOWS), np.ones(8), np.full(8, np.log(1000.0)), np.full(8, np.log(1e4))
    )
    row = make_row(1, generated=2, first_token=0.98, tpot=0.05)
    next_token = _lateness([_ending_at(row.copy(), 3)], work=often).excess_ratio[0]
    the_one_after = _lateness([_ending_at(row.copy(), 4)], work=often).excess_ratio[0]
    assert next_token < 1e-3
    assert the_one_after > 0.01


def test_what_ends_far_ahead_counts_less_than_what_ends_soon():
    slowest, fastest = PREDICTOR.predict(np.array([[0, 0, 0, 2, 300, 2, 0.0]])).latency_seconds[
        0, [0, -1]
    ]
    between = 0.5 * (slowest + fastest)  # what is granted per token
    rich = _ending_at(make_row(2, generated=9, first_token=4.9, tpot=1.0), 10)

    def excess(tokens):
        spent = make_row(1, generated=10, first_token=5.0 - 9 * between, tpot=between)
        rows = [_ending_at(spent, 10 + tokens), rich]
        return _lateness(rows, now=5.0, work=None).excess_ratio[0]

    assert excess(1) == pytest.approx(0.5, abs=0.01)
    assert 0.0 < excess(128) < 0.45
