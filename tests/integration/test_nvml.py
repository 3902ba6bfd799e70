"""A daemon as an operator runs it, on pretended NVIDIA GPUs."""

from __future__ import annotations

import time

import pytest

from tests.integration.engines import DEADLINE_SECONDS, park, registration, state
from throttle.actuation.fake_nvml.library import environment
from throttle.v1 import throttle_service_pb2


@pytest.fixture
def machine(machine_of, nvml_library, monkeypatch):
    """Two H200 with a process on each, which daemons started in this test see."""
    machine = machine_of("h200", "h200", virtual_time=False)
    for name, value in environment(nvml_library, machine.path).items():
        monkeypatch.setenv(name, value)
    for index in range(2):
        machine.gpu(f"GPU-{index}").set_processes(1)
    return machine


@pytest.fixture
def start(start_daemon, tmp_path):
    """Starts a daemon on the machine."""

    def start(*arguments):
        return start_daemon(
            "--backend", "nvml", "--gpus", "GPU-0,GPU-1",
            "--actuation-state-directory", tmp_path / "actuator", *arguments,
        )  # fmt: skip

    return start


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def unreadable(daemon):
    return [gpu for gpu in daemon.status().gpus if gpu.reading_problem]


def test_an_engines_clock_reaches_the_driver_and_returns_to_default(machine, start):
    machine.gpu("GPU-0").lock_as_another_agent(345, 600)  # left behind by a killed daemon
    daemon = start()
    assert machine.gpu("GPU-0").lock_mhz is None
    stream = daemon.stream(registration(gpu_uuids=["GPU-0"]))
    assert stream.accepted().candidate_clocks_mhz[-1] == 1980
    park(stream)
    assert machine.gpu("GPU-0").lock_mhz == (345, 345)
    assert machine.gpu("GPU-1").lock_mhz is None
    stream.close()
    assert machine.gpu("GPU-0").lock_mhz is None
    assert daemon.terminate() == 0


def test_the_status_tells_what_became_of_the_clock_asked_for(machine, start):
    machine.gpu("GPU-1").set_mig(enabled=True)
    daemon = start(
        "--actuation-settle-seconds", "0.05", "--actuation-lowering-interval-seconds", "0"
    )

    def clock_state():
        first, second = daemon.status().gpus
        assert second.clock_state == throttle_service_pb2.CLOCK_STATE_UNSUPPORTED
        return throttle_service_pb2.ClockState.Name(first.clock_state)

    assert clock_state() == "CLOCK_STATE_DEFAULT"
    stream = daemon.stream(registration(gpu_uuids=["GPU-0"]))
    stream.accepted()
    park(stream)
    assert clock_state() == "CLOCK_STATE_REQUESTED"  # idle, as far as the driver says
    machine.gpu("GPU-0").set_load(1.0)
    wait_for(lambda: clock_state() == "CLOCK_STATE_CONVERGED")
    stream.close()
    assert clock_state() == "CLOCK_STATE_DEFAULT"


def test_the_status_tells_what_the_sampler_read_and_whose_energy_it_was(machine, start):
    machine.gpu("GPU-0").set_temperature(52)
    machine.gpu("GPU-0").set_load(0.5)
    daemon = start("--telemetry-interval-seconds", "0.02")
    stream = daemon.stream(registration(gpu_uuids=["GPU-0"]))
    stream.accepted()
    start_seconds = time.monotonic()
    number = 0

    def energy():
        nonlocal number
        number += 1
        stream.decide(state(number, engine_time_seconds=time.monotonic() - start_seconds))
        (engine,) = daemon.status().engines
        return engine.energy if engine.energy.requests_joules > 5.0 else None

    parts = wait_for(energy)
    assert parts.idle_joules > 0
    status = daemon.status()
    first, second = status.gpus
    assert (first.temperature_celsius, first.power_scope, first.reading_problem) == (52, "gpu", "")
    assert first.power_watts > 100
    assert list(second.clock_event_reasons) == ["idle"]
    assert second.unattributed_energy_joules == second.energy_joules > 0
    assert 0 < first.unattributed_energy_joules < first.energy_joules
    (engine,) = status.engines
    total = sum(
        getattr(engine.energy, f"{part}_joules")
        for part in ("requests", "idle", "unassigned", "pending")
    )
    # engine and GPU are asked one after the other, and a reading may come between
    assert total == pytest.approx(first.energy_joules - first.unattributed_energy_joules, rel=0.2)
    stream.close()


def test_a_reading_that_hangs_leaves_other_gpus_and_the_status_alone(machine, start):
    daemon = start("--telemetry-stale-seconds", "0.5")
    stream = daemon.stream(registration(gpu_uuids=["GPU-0"]))
    stream.accepted()
    hang = machine.inject("nvmlDeviceGetClockInfo", gpu_uuid="GPU-1", hang=True)
    try:
        (second,) = wait_for(lambda: unreadable(daemon))
        assert second.gpu_uuid == "GPU-1"
        asked = time.monotonic()
        decision = stream.decide(state(1))
        assert time.monotonic() - asked < 5.0
        assert decision.sequence_number == 1
    finally:
        hang.remove()
    wait_for(lambda: not unreadable(daemon))
    stream.close()


def test_observing_daemons_read_and_set_nothing(machine, start_daemon, tmp_path):
    daemon = start_daemon(
        "--backend", "observe", "--actuation-state-directory", tmp_path / "actuator"
    )
    assert [gpu.gpu_uuid for gpu in daemon.status().gpus] == ["GPU-0", "GPU-1"]
    wait_for(lambda: all(gpu.power_watts > 0 for gpu in daemon.status().gpus))
    assert daemon.terminate() == 0
    assert machine.writes() == ()
