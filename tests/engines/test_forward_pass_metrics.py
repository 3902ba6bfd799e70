from __future__ import annotations

import msgspec
import pytest

from tests.engines.samples import DATA
from throttle.engines.forward_pass_metrics import ForwardPassReader, zmq_payloads
from throttle.v1 import engine_pb2

GPU = engine_pb2.TIMING_SOURCE_GPU_EVENT
MOCKER = [
    bytes.fromhex(line)
    for line in DATA.joinpath("dynamo-1.6.1", "mocker_forward_pass_metrics.hex").read_text().split()
]


def message(**changes):
    fields = {
        "version": 1,
        "worker_id": "w",
        "dp_rank": 0,
        "counter_id": 1,
        "wall_time": 0.02,
        "scheduled_requests": {"num_decode_requests": 3, "sum_decode_kv_tokens": 900},
        "queued_requests": {"num_prefill_requests": 1, "sum_prefill_tokens": 50},
    }
    return msgspec.msgpack.encode(fields | changes)


def test_every_pass_of_the_recorded_mocker_is_told_and_its_idle_heartbeats_are_not():
    reader = ForwardPassReader(GPU)
    decoded = [msgspec.msgpack.decode(payload) for payload in MOCKER]
    states = [state for payload in MOCKER if (state := reader.read(payload))]
    busy = [each for each in decoded if each["wall_time"] > 0]
    assert len(states) == len(busy) > 20
    assert len(busy) < len(decoded)
    for state, told in zip(states, busy, strict=True):
        assert state.phase == engine_pb2.ITERATION_PHASE_COMPLETED
        assert state.iteration_duration_seconds == told["wall_time"]
        for name, value in told["scheduled_requests"].items():
            assert getattr(state.scheduled, name) == pytest.approx(value)
        for name, value in told["queued_requests"].items():
            assert getattr(state.queued, name) == pytest.approx(value)
    assert (reader.messages_count, reader.missed_count) == (len(MOCKER), 0)


def test_the_first_worker_that_is_heard_is_followed_and_no_other():
    reader = ForwardPassReader(GPU)
    assert reader.read(message(worker_id="a")) is not None
    assert reader.read(message(worker_id="b", counter_id=2)) is None
    assert reader.refused_count == 1


def test_other_ranks_are_left_out():
    reader = ForwardPassReader(GPU, dp_rank=1)
    assert reader.read(message()) is None
    assert reader.read(message(dp_rank=1)) is not None
    assert reader.messages_count == 1


def test_missing_messages_are_counted():
    reader = ForwardPassReader(GPU)
    for counter in (5, 6, 9):
        reader.read(message(counter_id=counter))
    assert reader.missed_count == 2


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\xff" * 40, msgspec.msgpack.encode([1, 2]), message(version=2),
     message(wall_time="soon"), message(scheduled_requests=7)],
)  # fmt: skip
def test_what_cannot_be_read_is_counted_and_raises_nothing(payload):
    reader = ForwardPassReader(GPU)
    assert reader.read(payload) is None
    assert reader.refused_count == 1


def test_fields_to_come_are_no_obstacle():
    reader = ForwardPassReader(GPU)
    state = reader.read(message(timing_scope="execute_model_cuda"))
    assert state.scheduled.num_decode_requests == 3


def test_messages_are_heard_over_zmq():
    zmq = pytest.importorskip("zmq")
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        payloads = zmq_payloads(f"tcp://127.0.0.1:{port}", poll_seconds=0.05)
        heard = None
        for counter in range(1, 200):  # a subscription takes a moment to arrive
            publisher.send_multipart([b"", counter.to_bytes(8, "big"), message()])
            heard = next(payloads)
            if heard is not None:
                break
        assert heard == message()
        payloads.close()
