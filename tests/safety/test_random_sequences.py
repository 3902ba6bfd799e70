"""Claims, wishes, expiries, faults and crashes in any order, over the core without processes.

The hardware outlives every crash, as do the records on disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from throttle.actuation.arbiter import Arbiter
from throttle.actuation.backend import ClockReading, EventReason
from throttle.actuation.journal import GpuRecord, left_slow_uuids
from throttle.actuation.settings import ActuationSettings
from throttle.errors import ActuationError, ConflictError

GPUS = ("GPU-a", "GPU-b", "GPU-c")
SUPPORTED = (300, 600, 900, 1200, 1500)
FLOOR, CEILING = 500, 1300
ALLOWED = {600, 900, 1200}
EXAMPLES = 10_000 if os.environ.get("TEST_SAFETY") else 100


#: Mostly none.
CRASHES = st.sampled_from(
    [
        *("", "", "", ""),
        *("before_intent", "after_intent", "before_set", "after_set", "before_mark"),
        *("before_reset", "after_reset", "before_clear"),
    ]
)


class CrashError(BaseException):
    """The process is gone, in the middle of what it did."""


class Hardware:
    """GPUs whose locks outlive everything, and a driver that fails as it is told to."""

    def __init__(self):
        self.locks = dict.fromkeys(GPUS, 0)
        self.faults = dict.fromkeys(GPUS, "")
        self.crash_at = ""
        self.asked_mhz = set()

    def uuids(self):
        return GPUS

    def refusal(self, uuid):
        return ""

    def supported_clocks_mhz(self, uuid):
        return SUPPORTED

    def set_maximum_clock(self, uuid, clock_mhz):
        self.asked_mhz.add(clock_mhz)
        self.die_at("before_set")
        self._write(uuid, clock_mhz)
        self.die_at("after_set")

    def reset_clock(self, uuid):
        self.die_at("before_reset")
        self._write(uuid, 0)
        self.die_at("after_reset")

    def read_clock(self, uuid):
        drifted = self.faults[uuid] == "drift"
        return ClockReading(
            SUPPORTED[-1] if drifted else self.locks[uuid] or SUPPORTED[-1],
            EventReason.POWER_BRAKE if self.faults[uuid] == "brake" else EventReason.NONE,
        )

    def die_at(self, step):
        if self.crash_at == step:
            self.crash_at = ""
            raise CrashError(step)

    def _write(self, uuid, clock_mhz):
        fault = self.faults[uuid]
        if fault == "refuses" or (fault == "refuses_sets" and clock_mhz):
            raise ActuationError(f"{uuid} refuses")
        self.locks[uuid] = clock_mhz
        if fault == "lies":
            raise ActuationError(f"{uuid} did it, and says it did not")


class CrashingRecord(GpuRecord):
    """The real journal, in a process that may die around its writes."""

    hardware = None

    def intend(self, clock_mhz):
        self.hardware.die_at("before_intent")
        super().intend(clock_mhz)
        self.hardware.die_at("after_intent")

    def mark(self, clock_mhz):
        self.hardware.die_at("before_mark")
        super().mark(clock_mhz)

    def clear(self):
        self.hardware.die_at("before_clear")
        super().clear()


class Actuation(RuleBasedStateMachine):
    """One actuator after another on the same GPUs."""

    def __init__(self):
        super().__init__()
        memory = Path("/dev/shm")
        self.directory = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.hardware = Hardware()
        self.now = 1000.0
        self.records = {}
        self.hung = set()
        self.settings = ActuationSettings(
            floor_clock_mhz=FLOOR, ceiling_clock_mhz=CEILING, lease_seconds=2.0
        )

    @initialize()
    def start(self):
        for record in self.records.values():
            record.close()  # as the kernel does
        self.records = {uuid: CrashingRecord(self.directory, uuid, "test") for uuid in GPUS}
        for record in self.records.values():
            record.hardware = self.hardware
        self.owners = {}  # by epoch: owner and GPUs, as this machine thinks they must be
        self.ended = []
        self.hung.clear()
        self.hardware.faults = dict.fromkeys(GPUS, "")
        self.hardware.crash_at = ""
        self.arbiter = Arbiter(
            self.hardware,
            self.records,
            self.settings,
            lambda: self.now,
            tell_ended=lambda grant, _: self.owners.pop(grant.epoch),
            kill_switch=self.directory / "default-clocks",
        )
        for hand in self.arbiter.hands.values():
            hand.work()
        assert not any(self.hardware.locks.values()), "a start leaves no GPU slow"

    @rule(owner=st.sampled_from("xyz"), gpus=st.sets(st.sampled_from(GPUS), min_size=1))
    def claim(self, owner, gpus):
        held = {gpu for _, each in self.owners.values() for gpu in each}
        try:
            grant, _ = self.arbiter.claim(owner, gpus)
        except ConflictError:
            assert held & gpus
        except ActuationError:
            assert self.arbiter.problems().keys() & gpus
        else:
            assert not held & gpus, "two owners"
            assert grant.epoch not in self.owners
            self.owners[grant.epoch] = (owner, gpus)

    def chosen_epoch(self, pick):
        """Mostly a lease in force, sometimes one that has ended or never was."""
        living = sorted(self.owners)
        return living[pick % len(living)] if living and pick < 9 else pick

    @rule(
        pick=st.integers(0, 11),
        clock=st.sampled_from([0, 1, 300, 600, 800, 900, 1200, 2000]),
        obeyed=st.booleans(),
        crash_at=CRASHES,
    )
    def wish(self, pick, clock, obeyed, crash_at):
        epoch = self.chosen_epoch(pick)
        orders = {uuid: hand._order for uuid, hand in self.arbiter.hands.items()}
        try:
            pending = self.arbiter.set_clock(epoch, clock, "test")
        except ConflictError:
            assert epoch not in self.owners
            assert orders == {uuid: hand._order for uuid, hand in self.arbiter.hands.items()}
        except ActuationError:
            assert self.arbiter.problems().keys() & self.owners[epoch][1]
        else:
            assert {hand.uuid for hand, _ in pending.orders} == self.owners[epoch][1]
            if obeyed:
                self.hardware.crash_at = crash_at
                self.work(GPUS)

    @rule(pick=st.integers(0, 11))
    def release(self, pick):
        epoch = self.chosen_epoch(pick)
        self.arbiter.release(epoch)
        self.owners.pop(epoch, None)

    @rule(seconds=st.sampled_from([0.05, 0.5, 1.1, 2.5, 40.0]), renewed=st.booleans())
    def time_passes(self, seconds, renewed):
        self.now += seconds
        if renewed:
            self.arbiter.renew()
        self.arbiter.tick()

    @rule()
    def reset_all(self):
        self.arbiter.reset_all("test")

    @rule(owner=st.sampled_from("xyz"), gpus=st.sets(st.sampled_from(GPUS), min_size=1))
    def throttle(self, owner, gpus):
        """What engines mostly do: come, and be slowed."""
        self.claim(owner, gpus)
        for epoch in list(self.owners):
            if epoch in self.owners:  # a crash on the way ends them all
                self.now += 2.0
                self.arbiter.renew()
                self.wish(0, 600 if epoch % 2 else 900, obeyed=True, crash_at="")

    @rule(present=st.sampled_from([False, False, False, True]))
    def kill_switch(self, present):
        path = self.directory / "default-clocks"
        path.unlink(missing_ok=True)
        if present:
            path.touch()
        self.arbiter.tick()

    @rule(
        gpu=st.sampled_from(GPUS),
        fault=st.sampled_from(["", "refuses", "refuses_sets", "lies", "drift", "brake"]),
    )
    def fault(self, gpu, fault):
        self.hardware.faults[gpu] = fault

    @rule(gpu=st.sampled_from(GPUS), hangs=st.sampled_from([False, False, True]))
    def call_hangs_or_returns(self, gpu, hangs):
        self.hung.discard(gpu)
        if hangs:
            self.hung.add(gpu)
        self.arbiter.hands[gpu].busy_since_seconds = self.now if hangs else None

    @rule(
        gpus=st.lists(st.sampled_from(GPUS), unique=True),
        crash_at=CRASHES,
    )
    def hands_work(self, gpus, crash_at):
        self.hardware.crash_at = crash_at
        self.work(gpus)

    def work(self, gpus):
        try:
            for gpu in gpus:
                if gpu not in self.hung:
                    self.arbiter.hands[gpu].work()
        except CrashError:
            self.check_journal()
            self.start()
        self.hardware.crash_at = ""

    @precondition(lambda self: any(self.hardware.locks.values()))
    @rule()
    def crash(self):
        self.start()

    @invariant()
    def a_slow_gpu_is_leased_or_on_its_way_back(self):
        leased = {gpu for _, gpus in self.owners.values() for gpu in gpus}
        for uuid, lock in self.hardware.locks.items():
            hand = self.arbiter.hands[uuid]
            if lock and uuid not in leased:
                ordered = hand._order.number != hand.done_number and not hand._order.target_mhz
                retrying = hand._retry_at_seconds < float("inf")
                assert ordered or retrying, f"{uuid} is left at {lock} MHz without a lease"

    @invariant()
    def no_clock_is_outside_of_the_clamp(self):
        assert self.hardware.asked_mhz <= ALLOWED

    @invariant()
    def check_journal(self):
        """A GPU that is slow is on record, whatever moment the process dies at."""
        slow = {uuid for uuid, lock in self.hardware.locks.items() if lock}
        assert slow <= set(left_slow_uuids(self.directory))

    @invariant()
    def owners_are_those_of_the_leases_in_force(self):
        for uuid in GPUS:
            owners = [owner for owner, gpus in self.owners.values() if uuid in gpus]
            assert len(owners) <= 1
            assert self.arbiter.owner(uuid) == (owners[0] if owners else "")

    def teardown(self):
        if not self.records:
            return
        self.hung.clear()
        self.hardware.faults = dict.fromkeys(GPUS, "")
        for hand in self.arbiter.hands.values():
            hand.busy_since_seconds = None
        self.now += 100.0  # past every lease and every pause before a retry
        self.arbiter.tick()
        for hand in self.arbiter.hands.values():
            while hand.work() <= self.now or hand._order.number != hand.done_number:
                continue
        assert not self.owners
        assert not any(self.hardware.locks.values()), self.hardware.locks
        for record in self.records.values():
            record.close()
        assert list(left_slow_uuids(self.directory)) == []
        shutil.rmtree(self.directory)


@pytest.mark.timeout(1500)
class TestActuation(Actuation.TestCase):
    """Found by pytest."""


TestActuation.settings = settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None)
