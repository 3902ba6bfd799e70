from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from tests.engines.samples import lines, namespace
from throttle.control.state import Phase
from throttle.daemon.messages import StateReader
from throttle.engines.vllm_statistics import StatisticsReader
from throttle.v1 import engine_pb2

SAMPLES = lines("vllm-0.32.0", "stat_logger.jsonl")
ARRIVED = engine_pb2.REQUEST_EVENT_KIND_ARRIVED
FIRST_TOKEN = engine_pb2.REQUEST_EVENT_KIND_FIRST_TOKEN
FINISHED = engine_pb2.REQUEST_EVENT_KIND_FINISHED
ABORTED = engine_pb2.REQUEST_EVENT_KIND_ABORTED


def play(samples, *, details=True, trust_elapsed=True):
    reader = StatisticsReader(trust_elapsed=trust_elapsed)
    states = []
    for sample in samples:
        scheduler = namespace(sample["scheduler"])
        if not details and scheduler is not None:
            scheduler.iteration_details = None
        read = reader.read(scheduler, namespace(sample["iteration"]), sample["seconds"])
        if read is not None:
            state, idle = read
            state.sequence_number = len(states) + 1
            state.engine_time_seconds = sample["seconds"]
            states.append((state, idle))
    return states


def events(states, kind):
    return [event for state, _ in states for event in state.request_events if event.kind == kind]


def total(key, holder="iteration"):
    return sum(sample[holder].get(key, 0) for sample in SAMPLES if sample[holder] is not None)


def test_every_step_of_the_recording_becomes_a_completed_state():
    states = play(SAMPLES)
    steps = [
        s["scheduler"]["iteration_details"]
        for s in SAMPLES
        if "iteration_details" in s["scheduler"]
    ]
    completed = [s for s, _ in states if s.phase == engine_pb2.ITERATION_PHASE_COMPLETED]
    assert len(completed) == len(steps)
    for state, step in zip(completed, steps, strict=True):
        assert state.scheduled.num_prefill_requests == step.get("num_ctx_requests", 0)
        assert state.scheduled.sum_prefill_tokens == step.get("num_ctx_tokens", 0)
        assert state.scheduled.num_decode_requests == step.get("num_generation_requests", 0)
        assert state.iteration_duration_seconds == pytest.approx(step["elapsed_ms"] / 1e3)


def test_requests_and_tokens_of_the_recording_are_told_exactly():
    states = play(SAMPLES)
    finished = [
        f for s in SAMPLES if s["iteration"] for f in s["iteration"].get("finished_requests", ())
    ]
    arrived = events(states, ARRIVED)
    assert len(arrived) == sum(
        len(s["iteration"].get("time_to_first_tokens_iter", ())) for s in SAMPLES if s["iteration"]
    )
    assert sum(event.prompt_tokens for event in arrived) == total("num_prompt_tokens")
    told = events(states, FINISHED)
    assert sorted(e.generated_tokens for e in told) == sorted(
        f["num_generation_tokens"] for f in finished
    )
    # nobody is left behind: the client that went away is told as aborted
    assert len(told) + len(events(states, ABORTED)) == len(arrived)
    assert {e.request_number for e in told} <= {e.request_number for e in arrived}


def test_the_daemon_accepts_every_state_of_the_recording(vllm_profile):
    reader = StateReader(vllm_profile)
    phases = [reader.read(state).phase for state, _ in play(SAMPLES)]
    assert phases.count(Phase.COMPLETED) > 50


def test_the_context_of_generating_requests_is_prompts_and_answers_so_far():
    states = play(SAMPLES)
    # recomputed from the finished requests: a lone request's context is its own
    alone = [
        state
        for state, _ in states
        if state.scheduled.num_decode_requests == 1 and not state.scheduled.num_prefill_requests
    ]
    assert alone
    for earlier, later in itertools.pairwise(alone):
        if later.sequence_number == earlier.sequence_number + 1 and not earlier.request_events:
            assert (
                later.scheduled.sum_decode_kv_tokens == earlier.scheduled.sum_decode_kv_tokens + 1
            )
    assert all(state.scheduled.sum_decode_kv_tokens >= 0 for state, _ in states)


def test_without_iteration_details_decodes_are_counted_by_their_gaps():
    states = play(SAMPLES, details=False)
    decodes = sum(state.scheduled.num_decode_requests for state, _ in states)
    assert decodes == sum(
        len(s["iteration"].get("inter_token_latencies_iter", ())) for s in SAMPLES if s["iteration"]
    )
    prefills = sum(state.scheduled.sum_prefill_tokens for state, _ in states)
    assert prefills == sum(
        s["iteration"].get("prompt_token_stats", {}).get("computed", 0)
        for s in SAMPLES
        if s["iteration"]
    )


def test_where_steps_overlap_their_duration_is_the_time_between_them():
    states = play(SAMPLES, trust_elapsed=False)
    for (earlier, idle), (later, _) in itertools.pairwise(states):
        if not idle and later.phase == engine_pb2.ITERATION_PHASE_COMPLETED:
            assert later.iteration_duration_seconds <= (
                later.engine_time_seconds - earlier.engine_time_seconds + 1e-9
            )


def step(now, *, running=1, waiting=0, ttfts=(), gaps=0, prompt=0, finished=()):
    scheduler = SimpleNamespace(num_running_reqs=running, num_waiting_reqs=waiting)
    iteration = SimpleNamespace(
        iteration_timestamp=1000.0 + now,
        num_generation_tokens=len(ttfts) + gaps,
        num_prompt_tokens=prompt,
        time_to_first_tokens_iter=list(ttfts),
        inter_token_latencies_iter=[0.01] * gaps,
        finished_requests=[
            SimpleNamespace(e2e_latency=e2e, num_generation_tokens=tokens, finish_reason=reason)
            for e2e, tokens, reason in finished
        ],
    )
    return scheduler, iteration, now


def test_a_version_without_most_fields_is_read_all_the_same():
    reader = StatisticsReader(trust_elapsed=True)
    reader.read(*step(1.0, ttfts=[0.5], prompt=100))
    state, idle = reader.read(*step(1.01, gaps=1))
    assert not idle
    assert state.scheduled.num_decode_requests == 1
    assert state.scheduled.sum_decode_kv_tokens == 101
    assert state.iteration_duration_seconds == pytest.approx(0.01)
    assert reader.read(None, None, 1.02) is None


def test_requests_that_arrived_together_end_each_once():
    reader = StatisticsReader(trust_elapsed=True)
    first, _ = reader.read(*step(1.0, running=2, ttfts=[0.5, 0.5], prompt=201))
    assert [e.prompt_tokens for e in first.request_events if e.kind == ARRIVED] == [100, 101]
    ended, idle = reader.read(
        *step(2.0, running=0, gaps=2, finished=[(1.5, 2, "length"), (1.5, 2, "abort")])
    )
    assert idle
    assert [(e.kind, e.request_number) for e in ended.request_events] == [
        (FINISHED, 1),
        (ABORTED, 2),
    ]


def test_a_client_that_went_away_is_aborted_when_the_engine_is_idle():
    reader = StatisticsReader(trust_elapsed=True)
    reader.read(*step(1.0, running=2, ttfts=[0.5, 0.4], prompt=200))
    state, idle = reader.read(*step(1.2, running=0, finished=[(0.7, 5, "stop")]))
    assert idle
    assert [(e.kind, e.request_number) for e in state.request_events] == [
        (FINISHED, 1),
        (ABORTED, 2),
    ]


def test_the_followed_requests_stay_bounded_under_endless_load():
    reader = StatisticsReader(trust_elapsed=True)
    for number in range(2000):
        reader.read(*step(float(number), running=4, ttfts=[0.001 * number + 0.1], prompt=10))
    assert len(reader._requests) <= 4 + 64


def test_statistics_without_a_step_say_nothing_and_their_events_come_with_the_next_step():
    reader = StatisticsReader(trust_elapsed=True)
    reader.read(*step(1.0, running=2, ttfts=[0.5, 0.4], prompt=200))
    assert reader.read(*step(1.1, running=1, finished=[(0.6, 3, "stop")])) is None
    state, _ = reader.read(*step(1.2, running=1, gaps=1))
    assert [(e.kind, e.request_number) for e in state.request_events] == [(FINISHED, 1)]
    assert state.request_events[0].age_seconds == pytest.approx(0.1)


def test_an_arrival_is_one_more_than_the_engine_said():
    reader = StatisticsReader(trust_elapsed=True)
    reader.read(*step(1.0, running=0, finished=[]))
    state = reader.arrival()
    assert state.phase == engine_pb2.ITERATION_PHASE_HEARTBEAT
    assert state.queued.num_prefill_requests == 1
    assert reader.arrival().queued.num_prefill_requests == 2
