from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.scenes import make_live, make_profile, make_row
from throttle.control.lengths import LengthCurve
from throttle.control.projection import Successors, project, project_aggregates
from throttle.control.state import ScheduledRequests

BLOCK = 16

_generating = st.tuples(st.integers(1, 4000), st.integers(1, 2000), st.integers(1, 400))
_prompts = st.tuples(st.integers(1, 9000), st.integers(1, 400))


def _scene(generating, computing, waiting, **profile):
    running = [
        make_row(1 + i, prompt=prompt, generated=generated)
        for i, (prompt, generated, _) in enumerate(generating)
    ]
    running += [
        make_row(100 + i, prompt=prompt, computed=prompt // 3)
        for i, (prompt, _) in enumerate(computing)
    ]
    queue = [make_row(200 + i, prompt=prompt, computed=0) for i, (prompt, _) in enumerate(waiting)]
    planned_running = np.array([left for *_, left in generating] + [n for _, n in computing], float)
    planned_waiting = np.array([n for _, n in waiting], float)
    return project(
        make_live(running, queue),
        planned_running,
        planned_waiting,
        make_profile(**profile),
    )


scenes = st.builds(
    _scene,
    st.lists(_generating, max_size=20),
    st.lists(_prompts, max_size=3),
    st.lists(_prompts, max_size=20),
)


@given(
    generating=st.lists(_generating, max_size=20),
    computing=st.lists(_prompts, max_size=3),
    waiting=st.lists(_prompts, max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_the_projection_conserves_prompt_tokens(generating, computing, waiting):
    horizon = _scene(generating, computing, waiting)
    admitted = waiting[: len(waiting) - horizon.blocked_requests_count]
    wanted = sum(p - p // 3 for p, _ in computing) + sum(p for p, _ in admitted)
    planned = (horizon.shapes[:, 1] * horizon.iterations).sum() if not horizon.empty else 0
    assert planned == pytest.approx(wanted)


@given(
    generating=st.lists(_generating, max_size=20),
    computing=st.lists(_prompts, max_size=3),
    waiting=st.lists(_prompts, max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_the_projection_generates_each_planned_token_once(generating, computing, waiting):
    horizon = _scene(generating, computing, waiting)
    if horizon.empty:
        return
    end = horizon.iterations.sum()
    admitted = waiting[: len(waiting) - horizon.blocked_requests_count]
    wanted = sum(min(left, end) for *_, left in generating)
    starts = horizon.iterations_at(horizon.first_tokens)
    planned = [n for _, n in computing] + [n for _, n in admitted]
    wanted += sum(max(min(n - 1, end - start), 0) for n, start in zip(planned, starts, strict=True))
    assert (horizon.shapes[:, 3] * horizon.iterations).sum() == pytest.approx(wanted)


@given(
    generating=st.lists(_generating, max_size=20),
    computing=st.lists(_prompts, max_size=3),
    waiting=st.lists(_prompts, max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_the_projection_never_holds_more_kv_than_prompts_and_lengths_allow(
    generating, computing, waiting
):
    horizon = _scene(generating, computing, waiting)
    admitted = waiting[: len(waiting) - horizon.blocked_requests_count]
    most = sum(math.ceil((p + g + left) / BLOCK) for p, g, left in generating)
    most += sum(math.ceil((p + n) / BLOCK) for p, n in [*computing, *admitted])
    assert (horizon.kv_blocks <= most).all()
    longest = sum(p + g + left for p, g, left in generating)
    longest += sum(p + n for p, n in [*computing, *admitted])
    assert (horizon.shapes[:, 4] <= longest).all()


@given(
    generating=st.lists(_generating, max_size=20),
    computing=st.lists(_prompts, max_size=3),
    waiting=st.lists(_prompts, max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_the_projection_conserves_attention_pairs(generating, computing, waiting):
    horizon = _scene(generating, computing, waiting)
    admitted = waiting[: len(waiting) - horizon.blocked_requests_count]
    # however a prompt is cut into chunks, each token attends to all before it
    wanted = sum(p**2 - (p // 3) ** 2 for p, _ in computing) + sum(p**2 for p, _ in admitted)
    planned = (horizon.shapes[:, 6] * horizon.iterations).sum() if not horizon.empty else 0
    assert planned == pytest.approx(wanted / 2)


@given(waiting=st.lists(_prompts, min_size=1, max_size=20))
@settings(deadline=None)
def test_first_tokens_come_in_order_of_arrival_and_within_the_prompt_segments(waiting):
    horizon = _scene([], [], waiting)
    starts = horizon.iterations_at(horizon.first_tokens)
    assert (np.diff(starts) >= 0).all()
    assert (starts <= horizon.iterations[: horizon.prefill_segments_count].sum()).all()
    assert (starts >= 1).all()


def test_no_prompt_iteration_exceeds_the_token_budget():
    horizon = _scene([(10, 5, 300)] * 20, [], [(3000, 10)] * 12)
    prompt_tokens = horizon.shapes[: horizon.prefill_segments_count, 1]
    assert (prompt_tokens <= 2048 - 20).all()


def test_prompts_without_a_free_slot_or_free_blocks_are_blocked():
    slots = _scene([(10, 5, 300)] * 4, [], [(100, 10)] * 5, running_requests_limit=6)
    assert slots.blocked_requests_count == 3
    blocks = _scene([], [], [(160, 10)] * 5, kv_blocks_count=25)
    assert blocks.blocked_requests_count == 3


def test_a_prompt_chunk_joins_the_generating_requests_in_one_iteration():
    horizon = _scene([(100, 10, 50)], [], [(500, 20)])
    assert horizon.prefill_segments_count == 1
    assert horizon.iterations[0] == 1
    assert horizon.shapes[0].tolist() == [1, 500, 0, 1, 110, 1, 500 * 250]
    assert horizon.shapes[1, 3] == 2


def test_positions_reach_past_the_end_at_the_last_shape():
    horizon = _scene([(100, 10, 50)], [], [])
    beyond = horizon.positions(np.array([1000.0]))
    assert beyond.segments[0] == len(horizon.iterations) - 1
    assert horizon.iterations_at(beyond)[0] == 1000


def test_aggregates_alone_hold_the_present_shape():
    work = ScheduledRequests(
        num_decode_requests=12, sum_decode_kv_tokens=9000, num_decode_tokens=24
    )
    horizon = project_aggregates(work, 32.0)
    assert horizon.shapes.tolist() == [[0, 0, 0, 12, 9000, 24, 0]]
    assert project_aggregates(ScheduledRequests(), 32.0).empty


@pytest.mark.parametrize(("told", "pairs"), [(None, 200 * (1000 + 100) / 2), (123.0, 123.0)])
def test_attention_pairs_are_those_that_the_engine_tells_else_estimated(told, pairs):
    work = ScheduledRequests(
        num_prefill_requests=2,
        sum_prefill_tokens=200,
        sum_prefill_kv_tokens=1000,
        prefill_attention_pairs=told,
    )
    assert project_aggregates(work, 32.0).shapes[0, 6] == pairs


def test_successors_keep_a_steady_batch_steady():
    lengths = LengthCurve()
    for length in np.random.default_rng(5).geometric(1 / 100, size=4000):
        lengths.add(int(length), censored=False)
    running = [make_row(1 + i, generated=10) for i in range(40)]
    # What is left of a geometric answer has the same mean at any age; those alive thin out.
    planned = np.random.default_rng(6).geometric(1 / 100, size=40).astype(float)
    nobody = np.empty(0)
    alone = project(make_live(running), planned, nobody, make_profile())
    successors = Successors(lengths, 40.0, 500.0)
    joined = project(make_live(running), planned, nobody, make_profile(), successors)
    assert alone.shapes[-1, 3] < 25
    assert joined.shapes[:, 3] == pytest.approx(40, rel=0.2)
    added = joined.shapes - alone.shapes
    np.testing.assert_allclose(added[:, 4], 500.0 * added[:, 3])
    np.testing.assert_allclose(added[:, 5], added[:, 3])
