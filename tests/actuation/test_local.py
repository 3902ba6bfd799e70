from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from throttle.actuation.backend import ClockReading, GpuReading
from throttle.actuation.leases import UNKNOWN_CLOCKS
from throttle.actuation.local import LocalActuator
from throttle.errors import ActuationError, ConflictError, NotFoundError

CLOCKS = (300, 600, 900, 1200)
GPUS = ("GPU-a", "GPU-b", "GPU-c")


class MemoryBackend:
    """GPUs in memory; those in `broken` do not obey."""

    def __init__(self, gpus=GPUS):
        self.locks = dict.fromkeys(gpus, 0)
        self.writes = []
        self.broken = set()

    def uuids(self):
        return tuple(self.locks)

    def name(self, uuid):
        return "memory"

    def refusal(self, uuid):
        return ""

    def supported_clocks_mhz(self, uuid):
        return CLOCKS

    def set_maximum_clock(self, uuid, clock_mhz):
        self._write(uuid, clock_mhz)

    def reset_clock(self, uuid):
        self._write(uuid, 0)

    def read_clock(self, uuid):
        return ClockReading(self.locks[uuid] or CLOCKS[-1])

    def read(self, uuid):
        return GpuReading(self.locks[uuid] or CLOCKS[-1], 100.0, 1.0)

    def _write(self, uuid, clock_mhz):
        if uuid in self.broken:
            raise ActuationError(f"{uuid} does not obey")
        self.writes.append((uuid, clock_mhz))
        self.locks[uuid] = clock_mhz


@pytest.fixture
def backend():
    return MemoryBackend()


@pytest.fixture
def changes():
    return []


@pytest.fixture
def actuator(backend, changes):
    ticks = iter(range(10_000))
    return LocalActuator(backend, GPUS, lambda: next(ticks), changes.append)


def test_a_lease_sets_all_its_gpus_and_gives_them_back_at_default_clocks(actuator, backend):
    lease = actuator.acquire("engine", GPUS[:2])
    assert lease.set_clock(900).clock_mhz == 900
    assert backend.locks == {"GPU-a": 900, "GPU-b": 900, "GPU-c": 0}
    assert actuator.owner("GPU-a") == "engine"
    lease.release()
    lease.release()
    assert backend.locks == dict.fromkeys(GPUS, 0)
    assert actuator.owner("GPU-a") == ""


def test_acquiring_takes_all_or_none_and_names_the_holder(actuator, backend):
    actuator.acquire("first", ["GPU-b"])
    with pytest.raises(ConflictError, match=r"GPU-b is held by 'first'.*throttle release first"):
        actuator.acquire("second", GPUS)
    assert actuator.owner("GPU-a") == actuator.owner("GPU-c") == ""


def test_a_gpu_outside_the_allow_list_is_never_written(backend):
    actuator = LocalActuator(backend, ["GPU-a"])
    with pytest.raises(NotFoundError, match="'GPU-b' is not among the configured ones: GPU-a"):
        actuator.acquire("engine", ["GPU-a", "GPU-b"])
    actuator.reset_all()
    assert {uuid for uuid, _ in backend.writes} == {"GPU-a"}


def test_an_allowed_gpu_must_exist(backend):
    with pytest.raises(NotFoundError, match="'GPU-x' is not on this machine"):
        LocalActuator(backend, ["GPU-x"])


@pytest.mark.parametrize(
    ("asked", "applied"), [(1, 300), (300, 300), (899, 600), (900, 900), (5000, 1200), (0, 0)]
)
def test_clocks_snap_down_to_a_supported_one(actuator, backend, asked, applied):
    lease = actuator.acquire("engine", ["GPU-a"])
    assert lease.set_clock(asked).clock_mhz == applied
    assert backend.locks["GPU-a"] == applied


def test_a_clock_in_force_is_not_written_again(actuator, backend, changes):
    lease = actuator.acquire("engine", ["GPU-a"])
    lease.set_clock(900)
    written = len(backend.writes)
    lease.set_clock(900)
    lease.set_clock(1000)  # snaps to the same
    assert len(backend.writes) == written
    assert [(change.from_mhz, change.to_mhz) for change in changes] == [(0, 900)]


def test_changes_tell_owner_gpu_and_duration(actuator, changes):
    lease = actuator.acquire("engine", ["GPU-a"])
    lease.set_clock(900)
    lease.release()
    assert [(c.owner, c.gpu_uuid, c.from_mhz, c.to_mhz) for c in changes] == [
        ("engine", "GPU-a", 0, 900),
        ("engine", "GPU-a", 900, 0),
    ]
    assert all(change.duration_seconds > 0 for change in changes)


def test_a_released_lease_cannot_write(actuator, backend):
    stale = actuator.acquire("engine", ["GPU-a"])
    stale.release()
    fresh = actuator.acquire("engine", ["GPU-a"])
    fresh.set_clock(600)
    with pytest.raises(ConflictError, match="was released"):
        stale.set_clock(300)
    stale.release()
    assert backend.locks["GPU-a"] == 600
    assert actuator.owner("GPU-a") == "engine"


def test_a_write_that_waits_while_its_lease_is_released_comes_too_late(actuator, backend):
    lease = actuator.acquire("engine", ["GPU-a"])
    lease.set_clock(600)
    arrived, go_on = threading.Event(), threading.Event()
    reset = backend.reset_clock

    def slow_reset(uuid):
        arrived.set()
        assert go_on.wait(10)
        reset(uuid)

    backend.reset_clock = slow_reset
    releasing = threading.Thread(target=lease.release)
    releasing.start()
    assert arrived.wait(10)
    refused = []

    def write_late():
        try:
            actuator.set_clock(
                lease._grant, 300, ""
            )  # past the lease's own check, as a racing thread
        except ConflictError as error:
            refused.append(error)

    writing = threading.Thread(target=write_late)
    writing.start()
    go_on.set()
    for thread in (releasing, writing):
        thread.join(10)
    assert refused
    assert backend.locks["GPU-a"] == 0


def test_a_gpu_that_fails_takes_the_whole_lease_to_default_clocks(actuator, backend):
    lease = actuator.acquire("engine", GPUS)
    lease.set_clock(600)
    backend.broken = {"GPU-b"}
    with pytest.raises(ActuationError, match="GPU-b does not obey"):
        lease.set_clock(300)
    assert backend.locks["GPU-a"] == backend.locks["GPU-c"] == 0
    assert actuator.target_mhz("GPU-b") == UNKNOWN_CLOCKS


def test_a_gpu_that_cannot_be_reset_is_reset_when_it_is_next_leased(actuator, backend):
    lease = actuator.acquire("engine", ["GPU-a"])
    lease.set_clock(600)
    backend.broken = {"GPU-a"}
    with pytest.raises(ActuationError):
        lease.release()
    with pytest.raises(ActuationError):
        actuator.acquire("next", ["GPU-a"])
    assert actuator.owner("GPU-a") == ""
    backend.broken = set()
    actuator.acquire("next", ["GPU-a"])
    assert backend.locks["GPU-a"] == 0


def test_reset_all_writes_even_what_seems_to_be_at_default_and_tries_every_gpu(actuator, backend):
    actuator.reset_all()
    backend.locks["GPU-c"] = 300  # another agent, or an earlier daemon
    backend.broken = {"GPU-a"}
    with pytest.raises(ActuationError, match="GPU-a"):
        actuator.reset_all()
    assert backend.locks["GPU-c"] == 0


def test_reset_all_leaves_leases_in_force(actuator, backend):
    lease = actuator.acquire("engine", ["GPU-a"])
    lease.set_clock(600)
    actuator.reset_all()
    assert backend.locks["GPU-a"] == 0
    lease.set_clock(600)
    assert backend.locks["GPU-a"] == 600


def test_common_clocks_and_names_are_those_of_the_backend(actuator):
    assert actuator.supported_clocks_mhz(GPUS) == CLOCKS
    assert actuator.name("GPU-a") == "memory"
    assert actuator.read("GPU-a").power_watts == 100.0


class Leasing(RuleBasedStateMachine):
    """Engines come, set clocks, fail and go in any order."""

    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.backend = MemoryBackend()
        self.actuator = LocalActuator(self.backend, GPUS)
        self.actuator.reset_all()
        self.held = {}

    @rule(
        target=leases,
        owner=st.sampled_from(["x", "y", "z"]),
        gpus=st.sets(st.sampled_from(GPUS), min_size=1),
    )
    def acquire(self, owner, gpus):
        free = not any(gpu in self.held for gpu in gpus)
        try:
            lease = self.actuator.acquire(owner, sorted(gpus))
        except ConflictError:
            assert not free
            return None
        assert free
        self.held.update(dict.fromkeys(gpus, lease))
        return lease

    @rule(lease=leases, clock=st.integers(0, 1500))
    def set_clock(self, lease, clock):
        if lease is None:
            return
        in_force = lease in self.held.values()
        before = dict(self.backend.locks)
        try:
            applied = lease.set_clock(clock).clock_mhz
        except ConflictError:
            assert not in_force
            assert self.backend.locks == before
        else:
            assert in_force
            assert {self.backend.locks[gpu] for gpu in lease.gpu_uuids} == {applied}

    @rule(lease=leases, twice=st.booleans())
    def release(self, lease, twice):
        if lease is None:
            return
        for _ in range(1 + twice):
            lease.release()
        self.held = {gpu: holder for gpu, holder in self.held.items() if holder is not lease}

    @rule()
    def reset_all(self):
        self.actuator.reset_all()
        assert set(self.backend.locks.values()) == {0}

    @invariant()
    def every_gpu_has_the_owner_that_leased_it_or_none_and_default_clocks(self):
        for gpu in GPUS:
            lease = self.held.get(gpu)
            assert self.actuator.owner(gpu) == (lease.owner if lease else "")
            if lease is None:
                assert self.backend.locks[gpu] == 0


TestLeasing = Leasing.TestCase
TestLeasing.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
