from __future__ import annotations

import math

import pytest

from throttle.control.state import EventKind, KvCache, Mode, Phase, Role, Slos, TimingSource
from throttle.daemon.messages import (
    StateReader,
    read_registration,
)
from throttle.errors import InvalidInputError
from throttle.v1 import engine_pb2

NAN, INF = math.nan, math.inf


def registration(**changes):
    message = engine_pb2.EngineRegistration(
        engine_id="engine",
        engine_name="vllm",
        engine_version="1.2",
        model=engine_pb2.ModelDescriptor(name="qwen3-30b-a3b"),
        gpu_uuids=["GPU-a", "GPU-b"],
        limits=engine_pb2.EngineLimits(
            running_requests_count=256,
            batched_tokens_count=8192,
            kv_blocks_count=1000,
            kv_block_tokens=16,
        ),
    )
    return changed(message, changes)


def state(**changes):
    message = engine_pb2.IterationState(
        sequence_number=1,
        phase=engine_pb2.ITERATION_PHASE_COMPLETED,
        engine_time_seconds=10.0,
        iteration_duration_seconds=0.02,
        scheduled=engine_pb2.ScheduledRequests(num_decode_requests=2, sum_decode_kv_tokens=300),
        kv_cache=engine_pb2.KvCache(used_blocks_count=500),
        progress=engine_pb2.RequestProgress(
            request_numbers=[1, 2], computed_prompt_tokens=[100, 150], generated_tokens=[20, 30]
        ),
        request_events=[
            engine_pb2.RequestEvent(
                kind=engine_pb2.REQUEST_EVENT_KIND_ARRIVED,
                request_number=3,
                age_seconds=0.5,
                prompt_tokens=100,
            ),
            engine_pb2.RequestEvent(
                kind=engine_pb2.REQUEST_EVENT_KIND_FINISHED, request_number=4, generated_tokens=9
            ),
        ],
    )
    return changed(message, changes)


def changed(message, changes):
    """The message with `a__b=value` set; None clears a field, a list replaces one."""
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = message
        for parent in parents:
            target = target[int(parent)] if parent.isdigit() else getattr(target, parent)
        if value is None or isinstance(value, list):
            target.ClearField(name)
        if isinstance(value, list):
            getattr(target, name).extend(value)
        elif value is not None:
            setattr(target, name, value)
    return message


@pytest.fixture
def reader():
    return StateReader(read_registration(registration()))


def test_a_registration_with_defaults_becomes_a_profile():
    profile = read_registration(registration())
    assert profile.gpu_uuids == ("GPU-a", "GPU-b")
    assert profile.mode is Mode.SHADOW
    assert profile.role is Role.MIXED
    assert profile.lease_seconds == 5.0
    assert profile.tensor_parallel_count == profile.expert_parallel_count == 1
    assert profile.default_slos == Slos()
    assert profile.kv_blocks_count == 1000


def test_a_registration_that_says_everything_is_kept():
    message = registration(
        mode=1, role=2, lease_timeout_seconds=0.5, parallelism__tensor_parallel_count=2,
        default_slos__ttft_seconds=1.0, default_slos__e2e_seconds=30.0, model__kv_dtype="fp8",
    )  # fmt: skip
    profile = read_registration(message)
    assert (profile.mode, profile.role, profile.lease_seconds) == (Mode.ACT, Role.DECODE, 0.5)
    assert profile.tensor_parallel_count == 2
    assert profile.default_slos == Slos(ttft_seconds=1.0, e2e_seconds=30.0)
    assert profile.kv_dtype == "fp8"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"engine_id": ""}, "engine_id"),
        ({"engine_id": "x" * 129}, "engine_id"),
        ({"engine_id": "a\nb"}, "engine_id"),
        ({"gpu_uuids": []}, "gpu_uuids"),
        ({"gpu_uuids": ["GPU-a", "GPU-a"]}, "gpu_uuids"),
        ({"gpu_uuids": ["GPU-a", ""]}, "gpu_uuids"),
        ({"model": None}, "model.name"),
        ({"model__weight_dtype": "int3"}, "model.weight_dtype"),
        ({"model__kv_dtype": "mxfp4"}, "model.kv_dtype"),
        ({"parallelism__tensor_parallel_count": -1}, "parallelism.tensor_parallel_count"),
        ({"parallelism__pipeline_parallel_count": -1}, "parallelism.pipeline_parallel_count"),
        ({"parallelism__data_parallel_count": -1}, "parallelism.data_parallel_count"),
        ({"parallelism__expert_parallel_count": -1}, "parallelism.expert_parallel_count"),
        ({"limits": None}, "limits.running_requests_count"),
        ({"limits__batched_tokens_count": 0}, "limits.batched_tokens_count"),
        ({"limits__kv_blocks_count": -5}, "limits.kv_blocks_count"),
        ({"limits__kv_block_tokens": 0}, "limits.kv_block_tokens"),
        ({"default_slos__ttft_seconds": 0.0}, "default_slos.ttft_seconds"),
        ({"default_slos__tbt_seconds": NAN}, "default_slos.tbt_seconds"),
        ({"default_slos__tpot_seconds": INF}, "default_slos.tpot_seconds"),
        ({"default_slos__e2e_seconds": -1.0}, "default_slos.e2e_seconds"),
        ({"mode": 9}, "mode"),
        ({"role": 9}, "role"),
        ({"lease_timeout_seconds": 0.05}, "lease_timeout_seconds"),
        ({"lease_timeout_seconds": 61.0}, "lease_timeout_seconds"),
        ({"lease_timeout_seconds": NAN}, "lease_timeout_seconds"),
    ],
    ids=str,
)
def test_a_bad_registration_names_the_field_and_what_is_allowed(changes, field):
    with pytest.raises(InvalidInputError, match="allowed: ") as raised:
        read_registration(registration(**changes))
    assert raised.value.field == f"registration.{field}"


def test_a_state_becomes_values(reader):
    value = reader.read(state())
    assert (value.sequence_number, value.phase) == (1, Phase.COMPLETED)
    assert value.timing_source is TimingSource.HOST_INTERVAL
    assert value.kv_cache == KvCache(used_blocks_count=500)
    assert list(value.progress.generated_tokens) == [20, 30]
    arrived, finished = value.request_events
    assert (arrived.kind, arrived.prompt_tokens, arrived.max_output_tokens) == (
        EventKind.ARRIVED,
        100,
        None,
    )
    assert (finished.kind, finished.generated_tokens) == (EventKind.FINISHED, 9)
    assert value.speculative_decoding is None


def test_what_an_engine_does_not_say_stays_unknown(reader):
    message = engine_pb2.IterationState(
        sequence_number=1, phase=engine_pb2.ITERATION_PHASE_HEARTBEAT
    )
    value = reader.read(message)
    assert value.iteration_duration_seconds is None
    assert value.progress is None
    assert value.scheduled.num_decode_tokens is None
    assert value.scheduled.prefill_attention_pairs is None
    assert value.kv_cache == KvCache()


def test_zero_is_not_unknown(reader):
    message = state(
        scheduled__num_decode_tokens=0, kv_cache__used_blocks_count=0, kv_cache__usage_ratio=0.0,
        expert_load__balancedness_ratio=0.0,
    )  # fmt: skip
    value = reader.read(message)
    assert value.scheduled.num_decode_tokens == 0
    assert value.kv_cache == KvCache(0, None, 0.0)
    assert value.expert_load.balancedness_ratio == 0.0
    assert value.expert_load.mean_active_experts_count is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sequence_number": -1}, "sequence_number"),
        ({"phase": 0}, "phase"),
        ({"phase": 77}, "phase"),
        ({"engine_time_seconds": NAN}, "engine_time_seconds"),
        ({"engine_time_seconds": INF}, "engine_time_seconds"),
        ({"iteration_duration_seconds": None}, "iteration_duration_seconds"),
        ({"iteration_duration_seconds": 0.0}, "iteration_duration_seconds"),
        ({"iteration_duration_seconds": NAN}, "iteration_duration_seconds"),
        ({"iteration_duration_seconds": -0.1}, "iteration_duration_seconds"),
        ({"timing_source": 9}, "timing_source"),
        ({"scheduled__num_prefill_requests": -1}, "scheduled.num_prefill_requests"),
        ({"scheduled__sum_prefill_tokens": -1}, "scheduled.sum_prefill_tokens"),
        ({"scheduled__var_prefill_length": NAN}, "scheduled.var_prefill_length"),
        ({"scheduled__sum_prefill_kv_tokens": -1}, "scheduled.sum_prefill_kv_tokens"),
        ({"scheduled__num_decode_requests": -1}, "scheduled.num_decode_requests"),
        ({"scheduled__sum_decode_kv_tokens": -1}, "scheduled.sum_decode_kv_tokens"),
        ({"scheduled__var_decode_kv_tokens": -0.5}, "scheduled.var_decode_kv_tokens"),
        ({"scheduled__num_decode_tokens": -1}, "scheduled.num_decode_tokens"),
        ({"scheduled__prefill_attention_pairs": -1.0}, "scheduled.prefill_attention_pairs"),
        ({"scheduled__prefill_attention_pairs": NAN}, "scheduled.prefill_attention_pairs"),
        ({"queued__num_prefill_requests": -1}, "queued.num_prefill_requests"),
        ({"queued__sum_prefill_tokens": -1}, "queued.sum_prefill_tokens"),
        ({"queued__var_prefill_length": INF}, "queued.var_prefill_length"),
        ({"queued__num_decode_requests": -1}, "queued.num_decode_requests"),
        ({"queued__sum_decode_kv_tokens": -1}, "queued.sum_decode_kv_tokens"),
        ({"queued__var_decode_kv_tokens": NAN}, "queued.var_decode_kv_tokens"),
        ({"kv_cache__used_blocks_count": 1001}, "kv_cache.used_blocks_count"),
        ({"kv_cache__used_blocks_count": -1}, "kv_cache.used_blocks_count"),
        ({"kv_cache__total_blocks_count": 0}, "kv_cache.total_blocks_count"),
        ({"kv_cache__total_blocks_count": 400}, "kv_cache.used_blocks_count"),
        ({"kv_cache__usage_ratio": 1.5}, "kv_cache.usage_ratio"),
        ({"kv_cache__usage_ratio": NAN}, "kv_cache.usage_ratio"),
        ({"progress__generated_tokens": [1]}, "progress"),
        ({"progress__request_numbers": [1, 1]}, "progress.request_numbers"),
        ({"progress__request_numbers": [0, 1]}, "progress.request_numbers"),
        ({"progress__computed_prompt_tokens": [5, -1]}, "progress.computed_prompt_tokens"),
        ({"progress__generated_tokens": [-1, 5]}, "progress.generated_tokens"),
        ({"request_events__0__kind": 0}, "request_events[0].kind"),
        ({"request_events__1__kind": 99}, "request_events[1].kind"),
        ({"request_events__1__request_number": 0}, "request_events[1].request_number"),
        ({"request_events__0__age_seconds": -0.1}, "request_events[0].age_seconds"),
        ({"request_events__0__age_seconds": NAN}, "request_events[0].age_seconds"),
        ({"request_events__0__prompt_tokens": 0}, "request_events[0].prompt_tokens"),
        ({"request_events__0__cached_tokens": 101}, "request_events[0].cached_tokens"),
        ({"request_events__0__cached_tokens": -1}, "request_events[0].cached_tokens"),
        ({"request_events__0__max_output_tokens": 0}, "request_events[0].max_output_tokens"),
        (
            {"request_events__0__predicted_output_tokens": -3},
            "request_events[0].predicted_output_tokens",
        ),
        ({"request_events__0__slos__ttft_seconds": NAN}, "request_events[0].slos.ttft_seconds"),
        ({"request_events__1__generated_tokens": -1}, "request_events[1].generated_tokens"),
        (
            {"speculative_decoding__draft_tokens_count": -1},
            "speculative_decoding.draft_tokens_count",
        ),
        (
            {"speculative_decoding__accepted_tokens_count": 1},
            "speculative_decoding.accepted_tokens_count",
        ),
        ({"work_counters__flops_count": NAN}, "work_counters.flops_count"),
        ({"work_counters__read_bytes": -1.0}, "work_counters.read_bytes"),
        ({"work_counters__write_bytes": INF}, "work_counters.write_bytes"),
        ({"expert_load__balancedness_ratio": 1.01}, "expert_load.balancedness_ratio"),
        ({"expert_load__mean_active_experts_count": NAN}, "expert_load.mean_active_experts_count"),
    ],
    ids=str,
)
def test_a_bad_state_names_the_field_and_what_is_allowed(reader, changes, field):
    with pytest.raises(InvalidInputError, match="allowed: ") as raised:
        reader.read(state(**changes))
    assert raised.value.field == f"state.{field}"


def test_a_capacity_of_its_own_replaces_the_registered_one(reader):
    value = reader.read(state(kv_cache__total_blocks_count=2000, kv_cache__used_blocks_count=1500))
    assert value.kv_cache == KvCache(1500, 2000)


def test_sequence_numbers_rise_and_time_never_falls(reader):
    reader.read(state(sequence_number=5, engine_time_seconds=10.0))
    with pytest.raises(InvalidInputError, match=r"sequence_number is 5; allowed: above the last"):
        reader.read(state(sequence_number=5, engine_time_seconds=11.0))
    with pytest.raises(InvalidInputError, match=r"engine_time_seconds is 9.0; allowed: .*10.0"):
        reader.read(state(sequence_number=6, engine_time_seconds=9.0))
    reader.read(state(sequence_number=6, engine_time_seconds=10.0))
