"""The controller's end of the channel, against the real privileged process."""

from __future__ import annotations

import time

import pytest

from tests.safety.conftest import UUIDS
from throttle.actuation.actuator import ClockAnswer
from throttle.actuation.remote import ActuatorEndedError, RemoteActuator
from throttle.actuation.simulated import SimulatedBackend
from throttle.errors import ActuationError, ConflictError, NotFoundError

DEADLINE_SECONDS = 60.0


class Reader:
    """What the controller reads of two GPUs like those of the fake driver."""

    def supported_clocks_mhz(self, uuid):
        return tuple(range(345, 1981, 15))


def remote(world, backend=None, on_change=lambda _: None, **settings):
    settings = {"lease_seconds": 60.0, "lowering_interval_seconds": 0.0} | settings
    process, channel = world.start_actuator(**settings)
    reader = backend or Reader()
    orders = world.orders(**settings)
    return process, RemoteActuator(channel, reader, UUIDS, orders.settings, on_change)


def until(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def test_a_lease_sets_its_gpus_and_gives_them_back(simulated_world):
    changes = []
    backend = SimulatedBackend(simulated_world.machine)
    process, actuator = remote(simulated_world, backend, changes.append)
    lease = actuator.acquire("engine", ["GPU-1", "GPU-0"])
    assert lease.set_clock(700, "cruise") == ClockAnswer(600, applied=True)
    assert simulated_world.locks() == {"GPU-0": 600, "GPU-1": 600}
    assert [actuator.target_mhz(uuid) for uuid in UUIDS] == [600, 600]
    assert actuator.owner("GPU-0") == "engine"
    writes = simulated_world.machine.read_write_count("GPU-0")
    assert lease.set_clock(700, "cruise") == ClockAnswer(600, applied=True)
    assert simulated_world.machine.read_write_count("GPU-0") == writes
    lease.release()
    lease.release()
    assert simulated_world.locks() == {"GPU-0": 0, "GPU-1": 0}
    assert actuator.owner("GPU-0") == ""
    with pytest.raises(ConflictError, match="no longer in force"):
        lease.set_clock(600)
    told = {(change.owner, change.from_mhz, change.to_mhz) for change in changes}
    assert told == {("engine", 0, 600), ("", 600, 0)}
    actuator.close()
    assert process.wait(DEADLINE_SECONDS) == 0


def test_refusals_come_back_as_the_errors_that_they_are(simulated_world):
    _, actuator = remote(simulated_world)
    actuator.acquire("first", ["GPU-0"])
    with pytest.raises(ConflictError, match="GPU-0 is held by 'first'"):
        actuator.acquire("second", UUIDS)
    with pytest.raises(NotFoundError, match="'GPU-9' is not among the configured ones"):
        actuator.acquire("second", ["GPU-9"])


def test_an_answer_that_cannot_wait_for_the_driver_says_the_clock_before(nvml_world):
    _, actuator = remote(nvml_world, answer_wait_seconds=0.0)
    lease = actuator.acquire("engine", UUIDS)
    nvml_world.machine.inject("nvmlDeviceSetGpuLockedClocks", delay_seconds=(0.2, 0.2))
    assert lease.set_clock(900) == ClockAnswer(0, applied=False)
    assert until(lambda: lease.set_clock(900).applied)
    assert lease.set_clock(900) == ClockAnswer(900, applied=True)
    assert lease.set_clock(600) == ClockAnswer(900, applied=False)
    lease.release()
    assert actuator._answers == {}  # nobody waits for the last one any more


def test_a_failure_reaches_the_lease_and_its_gpus_go_to_default(nvml_world):
    _, actuator = remote(nvml_world)
    lease = actuator.acquire("engine", UUIDS)
    lease.set_clock(900)
    nvml_world.machine.inject("nvmlDeviceSetGpuLockedClocks", code=999, gpu_uuid="GPU-1", times=1)
    with pytest.raises(ActuationError, match="GPU-1"):
        lease.set_clock(600)
    assert until(lambda: not any(nvml_world.locks().values()))
    assert lease.set_clock(600) == ClockAnswer(600, applied=True)


def test_a_lease_that_the_actuator_ends_is_known_to_be_lost(simulated_world):
    _, actuator = remote(simulated_world, lease_seconds=0.5)
    lease = actuator.acquire("engine", UUIDS)
    lease.set_clock(600)
    assert until(lambda: lease.released)
    with pytest.raises(ConflictError):
        lease.set_clock(600)
    assert actuator.acquire("engine", UUIDS)


def test_what_the_kill_switch_undoes_is_asked_for_again(simulated_world):
    _, actuator = remote(simulated_world)
    lease = actuator.acquire("engine", UUIDS)
    lease.set_clock(600)
    switch = simulated_world.directory / "default-clocks"
    switch.touch()
    assert until(lambda: lease.set_clock(600) == ClockAnswer(0, applied=False))
    switch.unlink()
    assert lease.set_clock(600) == ClockAnswer(600, applied=True)


def test_an_actuator_that_is_killed_is_a_failure_of_everything_and_says_so(simulated_world):
    process, actuator = remote(simulated_world)
    lease = actuator.acquire("engine", UUIDS)
    assert actuator.problems() == {}
    process.kill()
    assert until(actuator.problems) == {"": "the actuator has ended"}
    assert lease.released
    with pytest.raises(ActuatorEndedError):
        actuator.acquire("engine", UUIDS)
    with pytest.raises(ActuatorEndedError):
        actuator.reset_all()
    actuator.close()


def test_an_actuator_that_ended_in_order_has_reset_everything(simulated_world):
    process, actuator = remote(simulated_world)
    actuator.acquire("engine", UUIDS).set_clock(600)
    process.terminate()
    assert process.wait(DEADLINE_SECONDS) == 0
    until(actuator.problems)
    actuator.reset_all()
    assert not any(simulated_world.locks().values())
