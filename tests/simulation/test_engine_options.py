"""Roles, prefix cache and speculative decoding: one by one, then all together as properties."""

from __future__ import annotations

import copy
import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from throttle.control.state import EventKind, Phase, Role, Slos
from throttle.errors import InvalidInputError
from throttle.simulation.engine import Fidelity, SimulatedEngine
from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.messages import state_message
from throttle.simulation.requests import Request
from throttle.simulation.speculation import Speculation
from throttle.simulation.workload import OpenLoop, handed_over, load_trace

ROLES = ("prefill", "decode", "mixed")


def with_options(plant, **options):
    """The same physics under an engine with other options; preparing it anew would be slow."""
    changed = copy.copy(plant)
    engine = replace(plant.parameters.engine, **options)
    changed.parameters = replace(plant.parameters, engine=engine)
    return changed


def events_of(states, kind):
    return {
        event.request_number: event
        for state in states
        for event in state.request_events
        if event.kind is kind
    }


def completed(states):
    return [state for state in states if state.phase is Phase.COMPLETED]


# -- prefix cache ------------------------------------------------------------------------------


def test_cached_tokens_are_whole_blocks_that_need_not_be_computed(bench, noiseless_plant):
    world = bench(noiseless_plant, [Request(1, 0.0, 500, 2, cached_tokens=300)])
    states = list(world.engine.run())
    assert events_of(states, EventKind.ARRIVED)[1].cached_tokens == 288
    first = completed(states)[0]
    assert first.scheduled.sum_prefill_tokens == 212
    assert first.scheduled.sum_prefill_kv_tokens == 288
    assert first.scheduled.var_prefill_length == 0
    assert first.progress.computed_prompt_tokens == [500]
    assert first.kv_cache.used_blocks_count == 32


def test_a_prompt_found_whole_still_computes_its_last_block(bench, noiseless_plant):
    world = bench(noiseless_plant, [Request(1, 0.0, 512, 2, cached_tokens=512)])
    first = completed(world.engine.run())[0]
    assert first.scheduled.sum_prefill_tokens == 16


def test_the_hit_ratio_applies_where_a_request_does_not_say(bench, noiseless_plant):
    plant = with_options(noiseless_plant, prefix_cache_hit_ratio=0.5)
    requests = [Request(1, 0.0, 320, 1), Request(2, 0.0, 320, 1, cached_tokens=0)]
    arrived = events_of(bench(plant, requests).engine.run(), EventKind.ARRIVED)
    assert [arrived[1].cached_tokens, arrived[2].cached_tokens] == [160, 0]


def test_prefix_hits_save_time(bench, noiseless_plant):
    cold = bench(noiseless_plant, [Request(1, 0.0, 8000, 1)])
    warm = bench(noiseless_plant, [Request(1, 0.0, 8000, 1, cached_tokens=7000)])
    for world in (cold, warm):
        list(world.engine.run())
    (slow,), (fast,) = cold.engine.outcomes, warm.engine.outcomes
    assert fast.ttft_seconds < 0.4 * slow.ttft_seconds


def test_more_cached_tokens_than_the_prompt_has_are_refused(bench, noiseless_plant):
    world = bench(noiseless_plant, [Request(4, 0.0, 10, 1, cached_tokens=11)])
    with pytest.raises(InvalidInputError, match=r"request 4: cached_tokens is 11.*0 to 10"):
        list(world.engine.run())


def test_a_trace_may_tell_cached_tokens(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_seconds,prompt_tokens,output_tokens,cached_tokens\n0,9,1,4\n1,9,1,\n")
    assert [item.cached_tokens for item in load_trace(str(path)).requests] == [4, None]
    path.write_text("arrival_seconds,prompt_tokens,output_tokens,cached_tokens\n0,9,1,-4\n")
    with pytest.raises(InvalidInputError, match=r"row 1: cached_tokens"):
        load_trace(str(path))


# -- speculative decoding ----------------------------------------------------------------------


def test_accepted_drafts_are_told_and_shorten_the_answer(bench, noiseless_plant):
    plant = with_options(noiseless_plant, draft_tokens_count=3, draft_acceptance_ratio=1.0)
    world = bench(plant, [Request(1, 0.0, 100, 21)])
    decodes = completed(world.engine.run())[1:]
    assert len(decodes) == 5  # 20 tokens after the first, four at a time
    for state in decodes:
        assert state.scheduled.num_decode_requests == 1
        assert state.scheduled.num_decode_tokens == 4
        assert state.speculative_decoding.draft_tokens_count == 3
        assert state.speculative_decoding.accepted_tokens_count == 3
    message = state_message(decodes[0])
    assert message.speculative_decoding.accepted_tokens_count == 3
    assert message.scheduled.num_decode_tokens == 4


def test_rejected_drafts_cost_time_and_gain_nothing(bench, noiseless_plant):
    plain = bench(noiseless_plant, [Request(1, 0.0, 100, 11)])
    plant = with_options(noiseless_plant, draft_tokens_count=5, draft_acceptance_ratio=0.0)
    drafting = bench(plant, [Request(1, 0.0, 100, 11)])
    slow, fast = completed(drafting.engine.run()), completed(plain.engine.run())
    assert len(slow) == len(fast)
    assert slow[-1].engine_time_seconds > 1.05 * fast[-1].engine_time_seconds


def test_without_drafts_nothing_is_said_of_them(bench, noiseless_plant):
    for state in bench(noiseless_plant, [Request(1, 0.0, 10, 3)]).engine.run():
        assert state.speculative_decoding is None


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_drafts_are_accepted_in_order_with_one_chance_each(plant, ratio):
    engine = replace(plant.parameters.engine, draft_tokens_count=4, draft_acceptance_ratio=ratio)
    speculation = Speculation(engine, random.Random(3))
    draws = [speculation.accepted(4) for _ in range(20_000)]
    for count in range(1, 5):
        share = sum(draw >= count for draw in draws) / len(draws)
        assert share == pytest.approx(ratio**count, abs=0.015)


# -- roles -------------------------------------------------------------------------------------


def test_a_prefill_engine_hands_off_after_the_first_token(bench, noiseless_plant):
    plant = with_options(noiseless_plant, role="prefill")
    world = bench(plant, [Request(1, 0.0, 20_000, 50), Request(2, 0.0, 100, 50)])
    states = list(world.engine.run())
    assert not any(state.scheduled.num_decode_requests for state in states)
    assert events_of(states, EventKind.ARRIVED)[1].max_output_tokens == 1
    for event in events_of(states, EventKind.FINISHED).values():
        assert event.generated_tokens == 1
    assert [item.tpot_seconds for item in world.engine.outcomes] == [None, None]
    assert world.engine.profile("e", ("GPU-0",), Slos()).role is Role.PREFILL


def test_a_decode_engine_takes_a_prompts_kv_at_once_and_computes_only_its_last_token(
    bench, noiseless_plant
):
    plant = with_options(noiseless_plant, role="decode")
    world = bench(plant, [Request(1, 0.0, 20_000, 50)])
    states = list(world.engine.run())
    assert events_of(states, EventKind.ARRIVED)[1].cached_tokens == 20_000
    first = completed(states)[0]
    assert (first.scheduled.sum_prefill_tokens, first.scheduled.sum_prefill_kv_tokens) == (
        1,
        19_999,
    )
    assert first.kv_cache.used_blocks_count == 1250
    assert len(completed(states)) == 50
    (outcome,) = world.engine.outcomes
    assert outcome.output_tokens == 50
    assert outcome.ttft_seconds < 0.02
    assert world.engine.profile("e", ("GPU-0",), Slos()).role is Role.DECODE


def test_a_decode_engine_feeds_on_what_a_prefill_engine_hands_over(bench, noiseless_plant):
    requests = [Request(n, 0.01 * n, 1000, 30) for n in range(1, 8)]
    first = bench(with_options(noiseless_plant, role="prefill"), requests)
    list(first.engine.run())
    passed_on = handed_over(requests, first.engine.outcomes, 0.004)
    assert [item.arrival_seconds for item in passed_on] == sorted(
        item.arrival_seconds + item.e2e_seconds + 0.004 for item in first.engine.outcomes
    )
    second = bench(with_options(noiseless_plant, role="decode"), passed_on)
    list(second.engine.run())
    assert {item.request_number for item in second.engine.outcomes} == set(range(1, 8))
    assert second.engine.output_tokens_count == 7 * 30


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("role", "both", "prefill, decode, mixed"),
        ("prefix_cache_hit_ratio", 1.5, "0 to 1"),
        ("draft_acceptance_ratio", -0.1, "0 to 1"),
        ("draft_tokens_count", -1, "0 or more"),
        ("batched_tokens_limit", 0, "1 or more"),
        ("kv_block_tokens", 0, "1 or more"),
    ],
)
def test_an_option_that_is_not_allowed_is_refused_by_name(bench, plant, option, value, allowed):
    parameters = replace(
        plant.parameters, engine=replace(plant.parameters.engine, **{option: value})
    )

    class Holder:
        """Enough of a GPU to meet the check."""

        class plant:  # noqa: N801
            pass

    Holder.plant.parameters = parameters
    with pytest.raises(InvalidInputError, match=rf"engine\.{option} is .*allowed: {allowed}"):
        SimulatedEngine(Holder, OpenLoop([]))


# -- all together ------------------------------------------------------------------------------

options = st.fixed_dictionaries(
    {
        "role": st.sampled_from(ROLES),
        "prefix_cache_hit_ratio": st.sampled_from([0.0, 0.4, 1.0]),
        "draft_tokens_count": st.sampled_from([0, 1, 4]),
        "draft_acceptance_ratio": st.sampled_from([0.0, 0.6, 1.0]),
        "running_requests_limit": st.sampled_from([3, 1024]),
        "batched_tokens_limit": st.sampled_from([7, 64, 8192]),
    }
)
workloads = st.lists(
    st.tuples(
        st.integers(1, 150),
        st.integers(1, 120),
        st.floats(0, 1),
        st.one_of(st.none(), st.integers(0, 150)),
    ),
    min_size=1,
    max_size=20,
)


def workload_of(drawn):
    arrivals = sorted(arrival for _, _, arrival, _ in drawn)
    return [
        Request(
            number,
            arrival,
            prompt,
            output,
            cached_tokens=None if cached is None else min(cached, prompt),
        )
        for number, ((prompt, output, _, cached), arrival) in enumerate(
            zip(drawn, arrivals, strict=True), 1
        )
    ]


def run_tight(plant, workload, seed=1, fidelity=Fidelity.FULL):
    gpu = SimulatedGpu(plant, InProcessLock(), DiscardedTelemetry(), random.Random(seed))
    generator = random.Random(seed + 1)
    engine = SimulatedEngine(gpu, OpenLoop(workload), fidelity, generator=generator)
    return engine, list(engine.run())


@settings(max_examples=120, deadline=None)
@given(drawn=workloads, chosen=options)
def test_tokens_are_conserved_and_kv_keeps_its_capacity_whatever_the_options(
    drawn, chosen, tight_plant
):
    workload = workload_of(drawn)
    plant = with_options(tight_plant, **chosen)
    engine, states = run_tight(plant, workload)
    one = chosen["role"] == "prefill"
    expected = {item.request_number: 1 if one else item.output_tokens for item in workload}

    outcomes = {item.request_number: item.output_tokens for item in engine.outcomes}
    assert len(engine.outcomes) == len(workload)
    assert outcomes == expected
    assert engine.output_tokens_count == sum(expected.values())
    assert engine.gaps.count == sum(expected.values()) - len(workload)
    assert engine.used_blocks_count == 0

    generated, decoded, seen = defaultdict(int), 0, Counter()
    prefilled, due = 0, {}
    for state in states:
        scheduled, progress = state.scheduled, state.progress
        assert 0 <= state.kv_cache.used_blocks_count <= 25
        assert (
            scheduled.sum_prefill_tokens + (scheduled.num_decode_tokens or 0)
            <= chosen["batched_tokens_limit"]
        )
        assert scheduled.sum_prefill_tokens >= scheduled.num_prefill_requests
        prefilled += scheduled.sum_prefill_tokens
        assert len(progress.request_numbers) <= chosen["running_requests_limit"]
        drafted = 0
        if state.phase is Phase.COMPLETED and chosen["draft_tokens_count"]:
            speculation = state.speculative_decoding
            drafted = speculation.draft_tokens_count
            assert 0 <= speculation.accepted_tokens_count <= drafted
            decoded += speculation.accepted_tokens_count
        else:
            assert state.speculative_decoding is None
        assert (scheduled.num_decode_tokens or 0) == scheduled.num_decode_requests + drafted
        decoded += scheduled.num_decode_requests
        for number, computed, tokens in zip(
            progress.request_numbers,
            progress.computed_prompt_tokens,
            progress.generated_tokens,
            strict=True,
        ):
            assert 0 < computed <= workload[number - 1].prompt_tokens
            assert generated[number] <= tokens <= expected[number]
            generated[number] = tokens
        for event in state.request_events:
            if event.kind is EventKind.ARRIVED:
                assert 0 <= event.cached_tokens <= event.prompt_tokens
                cached = min(event.cached_tokens, event.prompt_tokens - 1)
                due[event.request_number] = event.prompt_tokens - cached
            if event.kind is not EventKind.PREEMPTED:
                seen[event.kind, event.request_number] += 1
            else:
                assert event.generated_tokens == generated[event.request_number]
                prompt = workload[event.request_number - 1].prompt_tokens
                due[event.request_number] = prompt + event.generated_tokens
    assert set(seen.values()) == {1}
    # What is not in KV is computed: all of it anew after the last preemption.
    assert prefilled >= sum(due.values())
    resumed = sum(item.preemptions_count > 0 for item in engine.outcomes)
    # Every token comes from a decode or ends a prompt; a preempted prompt may end again.
    assert sum(expected.values()) - decoded >= len(workload)
    assert resumed or prefilled == sum(due.values())
    assert resumed or sum(expected.values()) - decoded == len(workload)


@settings(max_examples=40, deadline=None)
@given(drawn=workloads, chosen=options, fidelity=st.sampled_from(list(Fidelity)))
def test_two_runs_with_one_seed_are_identical(drawn, chosen, fidelity, plant):
    # With noise, chip spread and drafts drawn: everything that is random.
    noisy, workload = with_options(plant, **chosen), workload_of(drawn)
    one, first = run_tight(noisy, workload, seed=5, fidelity=fidelity)
    other, second = run_tight(noisy, workload, seed=5, fidelity=fidelity)
    assert first == second
    assert one.outcomes == other.outcomes
    assert one._gpu.energy_joules == other._gpu.energy_joules


@settings(max_examples=40, deadline=None)
@given(drawn=workloads)
def test_the_options_defaults_change_nothing(drawn, tight_plant):
    plain = [replace(item, cached_tokens=None) for item in workload_of(drawn)]
    told = [replace(item, cached_tokens=0) for item in plain]
    first = run_tight(tight_plant, plain)[1]
    neutral = with_options(tight_plant, role="mixed", draft_acceptance_ratio=0.2)
    assert first == run_tight(neutral, told)[1]


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("role", ROLES)
def test_kv_pressure_is_survived_in_every_role(tight_plant, role, drafts):
    plant = with_options(
        tight_plant, role=role, draft_tokens_count=drafts, batched_tokens_limit=150
    )
    workload = [Request(n, 0.0, 130, 100) for n in range(1, 13)]
    engine, _ = run_tight(plant, workload)
    assert len(engine.outcomes) == 12
    # A prefill engine's prompts, computed in turn, never outgrow what is free.
    assert (engine.preemptions_count > 0) is (role != "prefill")


@pytest.mark.parametrize("role", ["decode", "mixed"])
def test_drafts_never_ask_for_more_than_the_kv_cache_holds(tight_plant, role):
    plant = with_options(tight_plant, role=role, draft_tokens_count=8, draft_acceptance_ratio=0.5)
    engine, _ = run_tight(plant, [Request(1, 0.0, 300, 100), Request(2, 0.0, 350, 50)])
    assert [item.output_tokens for item in engine.outcomes] == [100, 50]
