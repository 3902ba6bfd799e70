"""One GPU's hand on a clock of its own: failures, retries, and what reading back shows."""

from __future__ import annotations

import pytest

from throttle.actuation.backend import ClockReading, EventReason
from throttle.actuation.hand import ClockState, Hand
from throttle.actuation.journal import NoRecord
from throttle.actuation.leases import DEFAULT_CLOCKS, UNKNOWN_CLOCKS
from throttle.actuation.settings import ActuationSettings
from throttle.errors import ActuationError, GpuLostError, GpuPermissionError


class Gpu:
    """A GPU that runs at its lock unless told otherwise."""

    def __init__(self):
        self.lock, self.error, self.writes = 0, None, []
        self.clock, self.reasons, self.refused = None, EventReason.NONE, ""

    def refusal(self, uuid):
        return self.refused

    def set_maximum_clock(self, uuid, clock_mhz):
        self._write(clock_mhz)

    def reset_clock(self, uuid):
        self._write(0)

    def read_clock(self, uuid):
        clock = self.clock if self.clock is not None else self.lock or 1980
        return ClockReading(clock, self.reasons)

    def _write(self, clock_mhz):
        self.writes.append(clock_mhz)
        if self.error is not None:
            raise self.error
        self.lock = clock_mhz


class Scene:
    def __init__(self):
        self.gpu, self.now, self.changes = Gpu(), 0.0, []
        self.record = NoRecord()

    def hand(self):
        hand = Hand(
            "GPU-a",
            self.gpu,
            self.record,
            settings=ActuationSettings(settle_seconds=1.0),
            clock=lambda: self.now,
            tell=self.changes.append,
        )
        hand.work()
        return hand

    def slowed(self):
        hand = self.hand()
        hand.want(900, "engine", "test")
        hand.work()
        assert self.gpu.lock == 900
        return hand

    def later(self, hand, seconds=1.0):
        self.now += seconds
        hand.work()


@pytest.fixture
def scene():
    return Scene()


def test_only_the_newest_order_is_carried_out(scene):
    hand = scene.hand()
    hand.want(600, "engine", "first")
    hand.want(900, "engine", "second")
    hand.work()
    assert scene.gpu.writes == [0, 900]


def test_a_clock_is_requested_until_it_is_read_back_and_default_once_it_is_reset(scene):
    hand = scene.hand()
    assert hand.clock_state is ClockState.DEFAULT
    hand.want(900, "engine", "test")
    hand.work()
    assert hand.clock_state is ClockState.REQUESTED
    scene.later(hand)
    assert hand.clock_state is ClockState.CONVERGED
    hand.want(0, "engine", "test")
    hand.work()
    assert hand.clock_state is ClockState.DEFAULT


def test_a_clock_that_a_write_has_left_in_doubt_is_unknown(scene):
    hand = scene.slowed()
    scene.gpu.error = ActuationError("GPU-a is busy")
    hand.want(0, "engine", "test")
    hand.work()
    assert hand.clock_state is ClockState.UNKNOWN


def test_the_clock_of_a_gpu_that_must_not_be_written_is_unsupported(scene):
    scene.gpu.refused = "GPU-a is in MIG mode"
    assert scene.hand().clock_state is ClockState.UNSUPPORTED


@pytest.mark.parametrize(
    ("clock", "reasons", "state"),
    [
        (700, EventReason.POWER_CAP, ClockState.CAPPED),
        (345, EventReason.IDLE, ClockState.REQUESTED),
        (900, EventReason.NONE, ClockState.CONVERGED),
    ],
)
def test_a_clock_below_the_target_is_capped_or_idle_and_left_alone(scene, clock, reasons, state):
    hand = scene.slowed()
    scene.gpu.clock, scene.gpu.reasons = clock, reasons
    scene.later(hand)
    assert hand.read_back is state
    assert scene.gpu.writes == [0, 900]


def test_a_lock_that_was_lost_is_set_again_and_given_up_after_two_tries(scene):
    hand = scene.slowed()
    scene.gpu.clock = 1980
    for _ in range(2):
        scene.later(hand)
        assert (hand.read_back, hand.target_mhz) == (ClockState.DRIFTED, 900)
    scene.later(hand)
    assert scene.gpu.writes == [0, 900, 900, 900, 0]
    assert hand.drifts_count == 3
    assert hand.target_mhz == DEFAULT_CLOCKS
    assert hand.stays_at_default(scene.now)
    assert not hand.stays_at_default(scene.now + 61.0)


def test_a_gpu_that_protects_itself_is_released_at_once(scene):
    hand = scene.slowed()
    scene.gpu.reasons = EventReason.HARDWARE_THERMAL
    scene.later(hand)
    assert scene.gpu.lock == 0
    assert hand.stays_at_default(scene.now)


def test_devices_with_a_time_of_their_own_are_judged_only_once_it_has_passed(scene):
    hand = scene.slowed()
    scene.gpu.read_clock = lambda uuid: ClockReading(1980, time_seconds=5.0)
    for _ in range(5):
        scene.later(hand)
    assert hand.read_back is ClockState.REQUESTED
    assert scene.gpu.writes == [0, 900]


def test_a_reset_that_fails_is_tried_until_it_works_less_and_less_often(scene):
    hand = scene.slowed()
    scene.gpu.error = ActuationError("GPU-a is busy")
    hand.want(0, "engine", "release")
    due = hand.work()
    assert (hand.problem, hand.target_mhz) == ("GPU-a is busy", UNKNOWN_CLOCKS)
    pauses = []
    for _ in range(3):
        pauses.append(due - scene.now)
        scene.now = due
        due = hand.work()
    assert pauses == [0.5, 1.0, 2.0]
    scene.gpu.error, scene.now = None, due
    hand.work()
    assert (hand.problem, scene.gpu.lock) == ("", 0)


def test_a_lost_gpu_is_never_tried_again_soon(scene):
    hand = scene.slowed()
    scene.gpu.error = GpuLostError("GPU-a fell off the bus")
    hand.want(0, "engine", "release")
    assert hand.work() - scene.now == 30.0


def test_a_gpu_without_permission_is_observed_only_and_not_retried(scene):
    scene.gpu.error = GpuPermissionError("GPU-a: it takes CAP_SYS_ADMIN")
    hand = scene.hand()
    assert "CAP_SYS_ADMIN" in hand.denial
    assert hand.problem == ""
    hand.want(900, "engine", "test")
    hand.work()
    scene.later(hand, 100.0)
    assert scene.gpu.writes == [0]


def test_a_gpu_that_must_not_be_written_is_not(scene):
    scene.gpu.refused = "GPU-a is in MIG mode"
    hand = scene.hand()
    hand.want(900, "engine", "test")
    hand.work()
    assert scene.gpu.writes == []
    assert hand.denial == "GPU-a is in MIG mode"


def test_a_set_that_fails_is_followed_by_a_reset(scene):
    hand = scene.hand()

    def refuse(uuid, clock_mhz):
        raise ActuationError("no")

    scene.gpu.set_maximum_clock = refuse
    hand.want(900, "engine", "test")
    hand.work()
    assert (hand.failure, hand.target_mhz, scene.gpu.lock) == ("no", DEFAULT_CLOCKS, 0)


def test_a_journal_that_cannot_be_written_means_no_slow_gpu(scene):
    class Full(NoRecord):
        def intend(self, clock_mhz):
            raise OSError(28, "No space left on device")

    scene.record = Full()
    hand = scene.hand()
    hand.want(900, "engine", "test")
    hand.work()
    assert "No space left" in hand.failure
    assert 900 not in scene.gpu.writes


def test_every_write_is_told_with_owner_reason_and_problem(scene):
    hand = scene.slowed()
    scene.gpu.error = ActuationError("no")
    hand.want(600, "engine", "cruise")
    hand.work()
    told = [
        (each.owner, each.from_mhz, each.to_mhz, each.why, each.problem) for each in scene.changes
    ]
    assert told == [
        ("", -1, 0, "start", ""),
        ("engine", 0, 900, "test", ""),
        ("engine", 900, -1, "cruise", "no"),
        ("engine", -1, -1, "set_failed", "no"),
    ]
