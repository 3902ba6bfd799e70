from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from throttle.control.state import EventKind, Mode, Phase, Slos
from throttle.errors import InvalidInputError
from throttle.simulation.engine import Fidelity
from throttle.simulation.operators import IterationWork
from throttle.simulation.plant import Plant
from throttle.simulation.requests import Request
from throttle.simulation.workload import ClosedLoop, Lengths


def burst(count, prompt=100, output=20, gap=0.0):
    return [Request(n, (n - 1) * gap, prompt, output) for n in range(1, count + 1)]


def test_a_lone_request_gets_its_tokens_one_iteration_each(bench, noiseless_plant):
    world = bench(noiseless_plant, [Request(1, 0.05, 500, 4)])
    states = list(world.engine.run())
    assert [state.phase for state in states[:2]] == [Phase.HEARTBEAT, Phase.HEARTBEAT]
    assert states[1].engine_time_seconds == 0.05
    completed = [state for state in states if state.phase is Phase.COMPLETED]
    assert len(completed) == 4
    first = noiseless_plant.iteration(IterationWork(((500, 0),), sampled_requests_count=1), 1980)
    assert completed[0].iteration_duration_seconds == pytest.approx(first.latency_seconds)
    (outcome,) = world.engine.outcomes
    assert outcome.ttft_seconds == pytest.approx(first.latency_seconds)
    rest = sum(state.iteration_duration_seconds for state in completed[1:])
    assert outcome.tpot_seconds == pytest.approx(rest / 3)
    assert outcome.e2e_seconds == pytest.approx(outcome.ttft_seconds + rest)


def test_a_completed_state_tells_what_ran_and_where_each_request_stands(bench, noiseless_plant):
    world = bench(noiseless_plant, [Request(1, 0.0, 500, 40), Request(2, 0.03, 300, 40)])
    states = list(world.engine.run())
    mixed = next(
        s for s in states if s.scheduled.num_prefill_requests and s.scheduled.num_decode_requests
    )
    scheduled = mixed.scheduled
    assert (scheduled.sum_prefill_tokens, scheduled.sum_prefill_kv_tokens) == (300, 0)
    assert scheduled.num_decode_requests == scheduled.num_decode_tokens == 1
    generated = mixed.progress.generated_tokens[0]
    assert scheduled.sum_decode_kv_tokens == 500 + generated - 2
    assert list(mixed.progress.request_numbers) == [1, 2]
    assert list(mixed.progress.computed_prompt_tokens) == [500, 300]
    assert mixed.progress.generated_tokens[1] == 1
    assert mixed.kv_cache.used_blocks_count == -(-(500 + generated - 1) // 16) + -(-300 // 16)
    kinds = [event.kind for event in mixed.request_events]
    assert kinds == [EventKind.FIRST_TOKEN]


def test_sequence_numbers_and_times_never_fall_and_events_come_once(bench, plant):
    world = bench(plant, burst(30, gap=0.07))
    seen, last = Counter(), None
    for state in world.engine.run():
        if last is not None:
            assert state.sequence_number == last.sequence_number + 1
            assert state.engine_time_seconds >= last.engine_time_seconds
        last = state
        for event in state.request_events:
            assert event.age_seconds >= 0
            seen[event.kind, event.request_number] += 1
            if event.kind is EventKind.FINISHED:
                assert event.request_number not in state.progress.request_numbers
    assert set(seen.values()) == {1}
    for kind in (EventKind.ARRIVED, EventKind.FIRST_TOKEN, EventKind.FINISHED):
        assert sum(key[0] is kind for key in seen) == 30


def test_an_arrivals_age_counts_from_its_own_arrival(bench, noiseless_plant):
    world = bench(noiseless_plant, [Request(1, 0.0, 8000, 2), Request(2, 0.02, 100, 1)])
    for state in world.engine.run():
        for event in state.request_events:
            if event.kind is EventKind.ARRIVED:
                arrival = state.engine_time_seconds - event.age_seconds
                assert arrival == pytest.approx(0.0 if event.request_number == 1 else 0.02)


def test_long_prompts_are_computed_in_chunks_within_the_token_budget(bench, noiseless_plant):
    world = bench(noiseless_plant, [Request(1, 0.0, 20_000, 3), Request(2, 0.0, 100, 3)])
    chunks = []
    for state in world.engine.run():
        scheduled = state.scheduled
        chunks.append((scheduled.sum_prefill_tokens, scheduled.sum_prefill_kv_tokens))
        assert scheduled.sum_prefill_tokens + scheduled.num_decode_requests <= 8192
    assert chunks[1:4] == [(8192, 0), (8192, 8192), (3616 + 100, 16384)]


def test_running_limit_makes_requests_wait(bench, plant):
    limited = Plant.load("h200-qwen3-30b-a3b", {"engine.running_requests_limit": 4})
    world = bench(limited, burst(10))
    waiting = [state.queued.num_prefill_requests for state in world.engine.run()]
    assert max(waiting) >= 6
    assert world.engine.running_count == 0
    assert len(world.engine.outcomes) == 10


requests = st.lists(
    st.tuples(st.integers(1, 150), st.integers(1, 120), st.floats(0, 1)), min_size=1, max_size=25
)


@settings(max_examples=60, deadline=None)
@given(drawn=requests)
def test_tokens_are_conserved_and_kv_never_exceeds_capacity(drawn, bench, tight_plant):
    arrivals = sorted(arrival for _, _, arrival in drawn)
    workload = [
        Request(number, arrival, prompt, output)
        for number, ((prompt, output, _), arrival) in enumerate(
            zip(drawn, arrivals, strict=True), 1
        )
    ]
    world = bench(tight_plant, workload)
    computed = Counter()
    for state in world.engine.run():
        assert 0 <= state.kv_cache.used_blocks_count <= 25
        progress = state.progress
        held = 0
        for number, done, generated in zip(
            progress.request_numbers,
            progress.computed_prompt_tokens,
            progress.generated_tokens,
            strict=True,
        ):
            request = workload[number - 1]
            assert 0 < done <= request.prompt_tokens
            assert 0 <= generated <= request.output_tokens
            assert generated >= computed[number]
            computed[number] = generated
            held += -(-done // 16)
        assert held <= state.kv_cache.used_blocks_count
        for moments in (
            state.queued.var_prefill_length,
            state.queued.var_decode_kv_tokens,
            state.scheduled.var_prefill_length,
            state.scheduled.var_decode_kv_tokens,
        ):
            assert moments >= 0
    outcomes = {item.request_number: item for item in world.engine.outcomes}
    assert len(outcomes) == len(world.engine.outcomes) == len(workload)
    for request in workload:
        assert outcomes[request.request_number].output_tokens == request.output_tokens
        assert outcomes[request.request_number].ttft_seconds > 0
    assert world.engine.output_tokens_count == sum(item.output_tokens for item in workload)
    assert world.engine.used_blocks_count == 0
    gaps = sum(item.output_tokens - 1 for item in workload)
    assert world.engine.gaps.count == gaps


def test_kv_pressure_preempts_the_last_admitted_request_and_computes_it_anew(bench, tight_plant):
    world = bench(tight_plant, burst(3, prompt=100, output=100))
    preempted, recomputed, waiting = [], 0, 0
    for state in world.engine.run():
        preempted.extend(
            (event.request_number, event.generated_tokens)
            for event in state.request_events
            if event.kind is EventKind.PREEMPTED
        )
        waiting = max(waiting, state.queued.num_decode_requests)
        recomputed += state.scheduled.sum_prefill_tokens
    assert preempted[0][0] == 3
    assert preempted[0][1] > 0
    assert waiting >= 1
    assert recomputed >= 300 + 100 + preempted[0][1]
    assert world.engine.preemptions_count == len(preempted)
    assert max(item.preemptions_count for item in world.engine.outcomes) >= 1


def test_a_request_that_can_never_fit_is_refused_by_name(bench, tight_plant):
    world = bench(tight_plant, [Request(7, 0.0, 300, 150)])
    with pytest.raises(InvalidInputError, match=r"request 7.*450.*at most 400"):
        list(world.engine.run())


def test_an_idle_engine_sends_heartbeats_and_wakes_at_once(bench, plant):
    world = bench(plant, [Request(1, 0.35, 10, 1)])
    times = [state.engine_time_seconds for state in world.engine.run()]
    assert times[:5] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.35])
    rested = [state.engine_time_seconds for state in world.engine.rest(1.0)]
    assert rested[-1] == 1.0


def test_aggregate_fidelity_hides_single_requests(bench, plant):
    full = bench(plant, burst(5), fidelity=Fidelity.FULL)
    aggregate = bench(plant, burst(5), fidelity=Fidelity.AGGREGATE)
    for one, other in zip(full.engine.run(), aggregate.engine.run(), strict=True):
        assert other.progress is None
        assert other.request_events == ()
        assert other.scheduled == one.scheduled
        assert other.iteration_duration_seconds == one.iteration_duration_seconds


def test_scrape_fidelity_tells_counts_and_kv_usage_now_and_then(bench, plant):
    world = bench(plant, burst(5, output=200), fidelity=Fidelity.SCRAPE)
    states = list(world.engine.run())
    assert world.engine.iterations_count > 5 * len(states)
    running = [state for state in states if state.scheduled.num_decode_requests]
    assert running
    for state in states:
        assert state.progress is None
        assert state.iteration_duration_seconds is None
        assert state.kv_cache.used_blocks_count is None
        assert 0 <= state.kv_cache.usage_ratio <= 1
        assert state.scheduled.sum_decode_kv_tokens == 0
    assert len(world.engine.outcomes) == 5


def test_a_closed_loop_holds_its_concurrency(bench, plant):
    source = ClosedLoop(12, 3.0, Lengths((50, 200), (5, 50)), random.Random(2))
    world = bench(plant, (), source=source)
    held = [
        state.scheduled.num_decode_requests + state.scheduled.num_prefill_requests
        for state in world.engine.run()
        if state.phase is Phase.COMPLETED and state.engine_time_seconds < 3.0
    ]
    assert set(held) == {12}
    assert world.engine.arrived_count == len(world.engine.outcomes) > 30


def test_a_profile_tells_the_engines_limits(bench, plant):
    profile = bench(plant, ()).engine.profile("e", ("GPU-0",), Slos(ttft_seconds=1.0), Mode.SHADOW)
    assert profile.model_name == "qwen3-30b-a3b"
    assert profile.kv_blocks_count == plant.kv_blocks_count
    assert (profile.running_requests_limit, profile.batched_tokens_limit) == (1024, 8192)
