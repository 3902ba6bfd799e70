from __future__ import annotations

import dataclasses

import pytest

from throttle.control.state import (
    EventKind,
    ExpertLoad,
    IterationState,
    KvCache,
    Mode,
    Phase,
    QueuedRequests,
    RequestEvent,
    RequestProgress,
    ScheduledRequests,
    Slos,
    SpeculativeDecoding,
    TimingSource,
    WorkCounters,
)
from throttle.simulation.messages import registration_message, state_message
from throttle.v1 import engine_pb2

RENAMED = {
    "model_name": "model.name",
    "model_config_json": "model.config_json",
    "weight_dtype": "model.weight_dtype",
    "kv_dtype": "model.kv_dtype",
    "tensor_parallel_count": "parallelism.tensor_parallel_count",
    "pipeline_parallel_count": "parallelism.pipeline_parallel_count",
    "data_parallel_count": "parallelism.data_parallel_count",
    "expert_parallel_count": "parallelism.expert_parallel_count",
    "running_requests_limit": "limits.running_requests_count",
    "batched_tokens_limit": "limits.batched_tokens_count",
    "kv_blocks_count": "limits.kv_blocks_count",
    "kv_block_tokens": "limits.kv_block_tokens",
    "lease_seconds": "lease_timeout_seconds",
}


def assert_same(message, value):
    """Every field of the dataclass equals the message's field of the same name."""
    for field in dataclasses.fields(value):
        expected = getattr(value, field.name)
        if expected is None:
            assert not message.HasField(field.name), field.name
        elif dataclasses.is_dataclass(expected):
            assert_same(getattr(message, field.name), expected)
        elif isinstance(expected, list | tuple):
            found = list(getattr(message, field.name))
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                if dataclasses.is_dataclass(other):
                    assert_same(one, other)
                else:
                    assert one == other
        else:
            assert getattr(message, field.name) == expected, field.name


FULL = IterationState(
    sequence_number=7,
    phase=Phase.COMPLETED,
    engine_time_seconds=12.5,
    iteration_duration_seconds=0.0213,
    timing_source=TimingSource.GPU_EVENT,
    scheduled=ScheduledRequests(1, 512, 3.5, 64, 2, 900, 1.25, 4),
    queued=QueuedRequests(3, 1000, 2.0, 1, 77, 0.5),
    kv_cache=KvCache(12, 100, 0.12),
    progress=RequestProgress([3, 5], [10, 20], [1, 2]),
    request_events=(
        RequestEvent(
            EventKind.ARRIVED, 9, 0.25, 100, 16, 0, 512, 200, Slos(1.0, 0.1, 0.05, 9.0), "chat"
        ),
        RequestEvent(EventKind.FINISHED, 3, generated_tokens=40),
    ),
    speculative_decoding=SpeculativeDecoding(8, 5),
    work_counters=WorkCounters(1e12, 2e9, 3e8),
    expert_load=ExpertLoad(0.9, 57.5),
)


def test_a_full_state_arrives_field_by_field():
    message = engine_pb2.IterationState.FromString(state_message(FULL).SerializeToString())
    assert_same(message, FULL)


def test_what_is_unknown_stays_unset():
    state = IterationState(1, Phase.HEARTBEAT, 0.0, kv_cache=KvCache(usage_ratio=0.0))
    message = state_message(state)
    assert_same(message, state)
    assert message.kv_cache.HasField("usage_ratio")
    assert not message.kv_cache.HasField("used_blocks_count")
    assert not message.HasField("progress")


def test_an_empty_progress_differs_from_an_unknown_one():
    state = IterationState(1, Phase.HEARTBEAT, 0.0, progress=RequestProgress([], [], []))
    assert state_message(state).HasField("progress")


def test_a_registration_arrives_field_by_field(bench, plant):
    profile = bench(plant, ()).engine.profile(
        "engine-1", ("GPU-a", "GPU-b"), Slos(ttft_seconds=1.0, tpot_seconds=0.05), Mode.RECORD, 3.0
    )
    message = registration_message(profile)
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        found = message
        for part in RENAMED.get(field.name, field.name).split("."):
            found = getattr(found, part)
        if field.name == "default_slos":
            assert_same(found, value)
        elif field.name == "gpu_uuids":
            assert tuple(found) == value
        else:
            assert found == value, field.name


@pytest.mark.parametrize("phase", list(Phase))
def test_phases_keep_their_values(phase):
    assert state_message(IterationState(1, phase, 0.0)).phase == int(phase)
