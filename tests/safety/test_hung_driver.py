"""A driver call that hangs, seen from outside of the whole daemon."""

from __future__ import annotations

import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.integration.engines import EngineStream, idle, registration, state
from tests.safety.test_fuzz import one_bundle
from throttle.v1 import throttle_service_pb2, throttle_service_pb2_grpc

DEADLINE_SECONDS = 60.0
#: An engine is answered in milliseconds; a call that hangs here would hang for ever.
ANSWER_SECONDS = 5.0


def test_r09_a_hung_gpu_delays_no_other_engine_and_readiness_alone_goes_down(nvml_world, tmp_path):
    bundles = one_bundle(tmp_path, "h100-sxm__qwen3-30b-a3b__tp1ep1")
    process = nvml_world.serve(tmp_path / "socket", bundles, actuation_call_deadline_seconds=0.5)
    with grpc.insecure_channel(f"unix:{tmp_path / 'socket'}") as channel:
        grpc.channel_ready_future(channel).result(DEADLINE_SECONDS)
        stub = throttle_service_pb2_grpc.ThrottleServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)

        def status(name):
            answer = health.Check(
                health_pb2.HealthCheckRequest(service=name), timeout=ANSWER_SECONDS
            ).status
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer)

        def wait_for_status(name, wanted):
            deadline = time.monotonic() + DEADLINE_SECONDS
            while status(name) != wanted:
                assert time.monotonic() < deadline, f"{name!r} is not {wanted}"
                time.sleep(0.05)

        wait_for_status("", "SERVING")
        hung = EngineStream(stub, registration("hung", ["GPU-0"]))
        other = EngineStream(stub, registration("other", ["GPU-1"]))
        hung.accepted()
        other.accepted()
        fault = nvml_world.machine.inject(
            "nvmlDeviceSetGpuLockedClocks", gpu_uuid="GPU-0", hang=True
        )
        hung.send(idle(1, 0.0))
        hung.send(idle(2, 100.0))  # parked, if its GPU would obey
        wait_for_status("", "NOT_SERVING")
        for number in range(1, 50):
            started = time.monotonic()
            other.decide(state(number))
            assert time.monotonic() - started < ANSWER_SECONDS
        assert status("live") == "SERVING"
        told = stub.GetStatus(throttle_service_pb2.GetStatusRequest(), timeout=ANSWER_SECONDS)
        problems = {gpu.gpu_uuid: gpu.problem for gpu in told.gpus}
        assert "a driver call has been hanging" in problems["GPU-0"]
        assert problems["GPU-1"] == ""
        fault.remove()
        wait_for_status("", "SERVING")
        assert nvml_world.locks()["GPU-0"] == 0
        hung.cancel()
        other.close()
    process.terminate()
    assert process.wait(DEADLINE_SECONDS) == 0
    assert not any(nvml_world.locks().values())
