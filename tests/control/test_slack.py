from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.scenes import make_live, make_profile, make_row
from throttle.control.projection import project, project_aggregates
from throttle.control.slack import Guards, Slo, measure_aggregate_slack, measure_slack
from throttle.control.state import ScheduledRequests, Slos
from throttle.testing import FormulaPredictor

PREDICTOR = FormulaPredictor()
EXACT = Guards(1.0, 1.0, 1.0, 1.0, 0.0)


def _planned(count, tokens):
    return np.full(count, float(tokens))


def _slack(running=(), waiting=(), planned=100, *, now=1.0, guards=EXACT):
    live = make_live(running, waiting)
    horizon = project(
        live,
        _planned(len(live.running), planned),
        _planned(len(live.waiting), planned),
        make_profile(),
    )
    prediction = PREDICTOR.predict(horizon.shapes)
    table = measure_slack(
        horizon, prediction.latency_seconds, prediction.latency_upper_seconds, now, guards
    )
    return horizon, prediction, table


_requests = st.lists(
    st.tuples(st.integers(1, 3000), st.integers(1, 500), st.floats(0.0, 5.0)),
    min_size=1,
    max_size=12,
)


@given(running=_requests, waiting=_requests, planned=st.integers(1, 300))
@settings(max_examples=150, deadline=None)
def test_slack_never_grows_as_the_clock_falls(running, waiting, planned):
    rows = [
        make_row(i + 1, prompt=p, generated=g, arrival=0.0, first_token=t, tpot=0.05, e2e=60.0)
        for i, (p, g, t) in enumerate(running)
    ]
    queue = [
        make_row(i + 100, prompt=p, computed=0, arrival=t, ttft=2.0, e2e=60.0)
        for i, (p, _, t) in enumerate(waiting)
    ]
    _, _, table = _slack(rows, queue, planned, now=5.0)
    assert (np.diff(table.slack_seconds, axis=1) >= -1e-9).all()


def test_a_first_token_has_what_its_limit_leaves_after_the_wait_and_the_prompt():
    waiting = [make_row(1, prompt=1000, computed=0, arrival=0.4, ttft=1.0)]
    _, prediction, table = _slack(waiting=waiting)
    expected = 0.4 - prediction.latency_upper_seconds[0]
    assert table.slos.tolist() == [Slo.TTFT]
    np.testing.assert_allclose(table.slack_seconds[0], expected)


def test_guards_and_reserve_shorten_what_may_be_planned_with():
    waiting = [make_row(1, prompt=1000, computed=0, arrival=0.4, ttft=1.0)]
    guards = Guards(ttft_ratio=0.5, reserve_seconds=0.05)
    _, prediction, table = _slack(waiting=waiting, guards=guards)
    np.testing.assert_allclose(
        table.slack_seconds[0], 0.4 * 0.5 - 0.05 - prediction.latency_upper_seconds[0]
    )


def test_single_gaps_are_judged_over_prompt_iterations_too():
    running = [make_row(1, generated=5, first_token=0.0, tbt=0.2)]
    waiting = [make_row(2, prompt=1500, computed=0, arrival=1.0, ttft=100.0)]
    _, prediction, table = _slack(running, waiting)
    rows = table.slack_seconds[table.slos == Slo.TBT]
    np.testing.assert_allclose(rows.min(axis=0), 0.2 - prediction.latency_upper_seconds[0])


def test_a_request_that_no_clock_can_save_is_counted_and_does_not_bind():
    waiting = [
        make_row(1, prompt=1000, computed=0, arrival=-5.0, ttft=1.0),
        make_row(2, prompt=1000, computed=0, arrival=0.9, ttft=1.0),
    ]
    _, _, table = _slack(waiting=waiting)
    assert table.lost_requests_count == 1
    assert table.request_numbers.tolist() == [2]


def test_prompts_still_to_come_shorten_the_slack():
    row = make_row(1, generated=5, first_token=0.9, e2e=20.0)
    live = make_live([row])
    horizon = project(live, _planned(1, 100), _planned(0, 1), make_profile())
    prediction = PREDICTOR.predict(horizon.shapes)
    latency = prediction.latency_seconds
    calm = measure_slack(horizon, latency, latency, 1.0, EXACT)
    stretch = np.full_like(latency, 1.5)
    busy = measure_slack(horizon, latency, latency, 1.0, EXACT, stretch_ratio=stretch)
    assert (busy.least() < calm.least()).all()


def test_end_to_end_counts_the_whole_planned_answer():
    running = [make_row(1, generated=10, first_token=0.0, arrival=0.0, e2e=30.0)]
    _, prediction, table = _slack(running, planned=300)
    slowest_step = prediction.latency_upper_seconds[0, -1]
    (e2e,) = table.slack_seconds[table.slos == Slo.E2E][:, -1]
    assert 29.0 - 300 * slowest_step * 1.2 < e2e < 29.0 - 300 * slowest_step * 0.8


def test_without_limits_nothing_binds():
    _, _, table = _slack([make_row(1, generated=3)])
    assert np.isinf(table.least()).all()


def test_aggregates_are_judged_by_the_default_limits_on_one_iteration():
    work = ScheduledRequests(num_decode_requests=30, sum_decode_kv_tokens=30_000)
    horizon = project_aggregates(work, 32.0)
    upper = PREDICTOR.predict(horizon.shapes).latency_upper_seconds
    table = measure_aggregate_slack(horizon, upper, Slos(tpot_seconds=0.02), EXACT)
    np.testing.assert_allclose(table.least(), 0.02 - upper[0])
    unreachable = measure_aggregate_slack(horizon, upper, Slos(tpot_seconds=1e-6), EXACT)
    assert np.isinf(unreachable.least()).all()


def test_the_row_kept_for_a_shared_moment_is_the_tightest():
    waiting = [
        make_row(1, prompt=100, computed=0, arrival=0.5, ttft=1.0),
        make_row(2, prompt=100, computed=0, arrival=0.2, ttft=1.0),
    ]
    _, _, table = _slack(waiting=waiting)
    assert table.request_numbers.tolist() == [2]
    assert table.slack_seconds[0, -1] == pytest.approx(
        0.2
        - PREDICTOR.predict(np.array([[2, 200, 0, 0, 0, 0.0, 0.0]])).latency_upper_seconds[0, -1]
    )
