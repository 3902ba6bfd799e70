"""What engines send, and one engine's stream message by message."""

from __future__ import annotations

import queue

import grpc
import pytest

from throttle.v1 import decision_pb2, engine_pb2, throttle_service_pb2

DEADLINE_SECONDS = 60.0
MODEL_NAME = "qwen3-30b-a3b"


def registration(engine_id="engine", gpu_uuids=("GPU-a",), **changes):
    fields = {
        "engine_name": "test",
        "model": engine_pb2.ModelDescriptor(name=MODEL_NAME),
        "limits": engine_pb2.EngineLimits(
            running_requests_count=256,
            batched_tokens_count=8192,
            kv_blocks_count=40_000,
            kv_block_tokens=16,
        ),
        "default_slos": engine_pb2.ServiceLevelObjectives(ttft_seconds=5.0, tpot_seconds=0.5),
        "mode": engine_pb2.CONTROL_MODE_ACT,
        "lease_timeout_seconds": 30.0,
    } | changes
    return engine_pb2.EngineRegistration(engine_id=engine_id, gpu_uuids=gpu_uuids, **fields)


def state(number, *, decode=16, engine_time_seconds=None, **changes):
    """A decode iteration of requests 1 to `decode`; the first state tells of their arrival."""
    numbers = range(1, decode + 1)
    fields = {
        "phase": engine_pb2.ITERATION_PHASE_COMPLETED,
        "iteration_duration_seconds": 0.01,
        "scheduled": engine_pb2.ScheduledRequests(
            num_decode_requests=decode, sum_decode_kv_tokens=(200 + number) * decode
        ),
        "kv_cache": engine_pb2.KvCache(used_blocks_count=15 * decode),
        "progress": engine_pb2.RequestProgress(
            request_numbers=numbers,
            computed_prompt_tokens=[200] * decode,
            generated_tokens=[number] * decode,
        ),
    } | changes
    if number == 1 and "request_events" not in changes:
        fields["request_events"] = [
            engine_pb2.RequestEvent(
                kind=engine_pb2.REQUEST_EVENT_KIND_ARRIVED,
                request_number=request,
                age_seconds=0.01,
                prompt_tokens=200,
                max_output_tokens=10_000,
            )
            for request in numbers
        ]
    return engine_pb2.IterationState(
        sequence_number=number,
        engine_time_seconds=number * 0.01 if engine_time_seconds is None else engine_time_seconds,
        **fields,
    )


class EngineStream:
    """One engine's stream, message by message."""

    def __init__(self, stub, first):
        self._requests = queue.SimpleQueue()
        self.call = stub.StreamIterations(iter(self._requests.get, None), timeout=DEADLINE_SECONDS)
        if isinstance(first, engine_pb2.IterationState):
            self.send(first)
        elif first is not None:
            self.send_raw(throttle_service_pb2.StreamIterationsRequest(registration=first))

    def send_raw(self, request):
        self._requests.put(request)

    def send(self, message):
        self.send_raw(throttle_service_pb2.StreamIterationsRequest(state=message))

    def accepted(self):
        return next(self.call).accepted

    def decide(self, message):
        self.send(message)
        return next(self.call).decision

    def error(self):
        """The status that the daemon ends the stream with."""
        with pytest.raises(grpc.RpcError) as raised:
            next(self.call)
        return raised.value

    def close(self):
        """End the stream in order and wait until the daemon has taken note."""
        self._requests.put(None)
        for _ in self.call:
            continue

    def cancel(self):
        self.call.cancel()
        self._requests.put(None)


def idle(number, engine_time_seconds):
    """A heartbeat of an engine without work."""
    return engine_pb2.IterationState(
        sequence_number=number,
        phase=engine_pb2.ITERATION_PHASE_HEARTBEAT,
        engine_time_seconds=engine_time_seconds,
    )


def park(stream):
    """Stay idle until the GPUs are parked at their lowest clock; the stream's first states."""
    stream.decide(idle(1, 0.0))
    decision = stream.decide(idle(2, 100.0))
    assert decision.reason == decision_pb2.DECISION_REASON_PARKED
    assert decision.applied
    return decision
