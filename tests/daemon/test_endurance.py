"""What stays of engines that have gone, whatever their end: nothing."""

from __future__ import annotations

import gc
import queue
import threading
import weakref

import grpc
import pytest

from tests.daemon.conftest import ScriptedBrain, ScriptedFactory
from throttle.daemon.assembly import build_server
from throttle.daemon.config import DaemonConfig
from throttle.v1 import engine_pb2, throttle_service_pb2, throttle_service_pb2_grpc

DEADLINE_SECONDS = 60.0
#: For threads that are ending.
ENDING_SECONDS = 10.0
POLL_SECONDS = 0.01
ENGINES_COUNT = 20


class FaultyBrain(ScriptedBrain):
    """Fails anew each time."""

    def decide(self, state):
        raise RuntimeError("a bug")


class WatchedFactory(ScriptedFactory):
    """A brain for each engine, of which only weak references are kept."""

    def __init__(self):
        super().__init__(None)
        self.alive = weakref.WeakSet()

    def build(self, profile, gpu):
        self.brain = FaultyBrain() if profile.engine_id == "faulty" else ScriptedBrain()
        self.alive.add(self.brain)
        made = super().build(profile, gpu)
        self.brain = None
        self.asked.clear()
        return made


@pytest.fixture
def factory():
    return WatchedFactory()


@pytest.fixture
def stub(tmp_path, gpus, factory):
    path = tmp_path / "gpus"
    config = DaemonConfig(socket=tmp_path / "socket", simulated_gpus=path, bundles=tmp_path)
    daemon = build_server(config, factory)
    daemon.start()
    with grpc.insecure_channel(daemon.target) as channel:
        yield throttle_service_pb2_grpc.ThrottleServiceStub(channel)
    daemon.stop()


@pytest.fixture(autouse=True)
def no_collector():
    """A ring of objects stays for ever: what the collector would find late is found at once."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def registration(engine_id):
    return engine_pb2.EngineRegistration(
        engine_id=engine_id,
        model=engine_pb2.ModelDescriptor(name="qwen3-30b-a3b"),
        gpu_uuids=["GPU-a"],
        limits=engine_pb2.EngineLimits(
            running_requests_count=8,
            batched_tokens_count=512,
            kv_blocks_count=1000,
            kv_block_tokens=16,
        ),
        mode=engine_pb2.CONTROL_MODE_ACT,
    )


def state(number, **changes):
    fields = {
        "sequence_number": number,
        "phase": engine_pb2.ITERATION_PHASE_COMPLETED,
        "engine_time_seconds": float(number),
        "iteration_duration_seconds": 0.02,
    } | changes
    message = engine_pb2.IterationState(**fields)
    return throttle_service_pb2.StreamIterationsRequest(state=message)


def crash(call, requests):
    call.cancel()
    requests.put(None)


def leave(call, requests):
    requests.put(None)
    assert not list(call)


def send_nonsense(call, requests):
    requests.put(state(3, iteration_duration_seconds=-1.0))
    with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
        next(call)
    requests.put(None)


def serve(stub, engine_id, end):
    """One engine's life; returns once its GPU is free."""
    requests = queue.SimpleQueue()
    requests.put(throttle_service_pb2.StreamIterationsRequest(registration=registration(engine_id)))
    call = stub.StreamIterations(iter(requests.get, None), timeout=DEADLINE_SECONDS)
    next(call)
    for number in (1, 2):
        requests.put(state(number))
        next(call)
    end(call, requests)
    wait_until(lambda: not stub.GetStatus(throttle_service_pb2.GetStatusRequest()).engines)


def wait_until(condition, seconds=DEADLINE_SECONDS):
    for _ in range(int(seconds / POLL_SECONDS)):
        if condition():
            return
        threading.Event().wait(POLL_SECONDS)
    pytest.fail("it does not come")


@pytest.mark.parametrize("engine_id", ["engine", "faulty"])
@pytest.mark.parametrize("end", [crash, leave, send_nonsense])
def test_engines_that_have_gone_leave_nothing_behind_without_a_collector(
    stub, factory, engine_id, end
):
    for _ in range(ENGINES_COUNT):
        serve(stub, engine_id, end)
    wait_until(lambda: not factory.alive, ENDING_SECONDS)
