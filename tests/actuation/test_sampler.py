from __future__ import annotations

import threading

import pytest

from throttle.actuation.backend import GpuReading
from throttle.actuation.sampler import Sample, Sampler
from throttle.errors import ActuationError, GpuLostError, NotFoundError

PATIENCE_SECONDS = 20.0


class Gpus:
    """Two GPUs; each reading counts up, and those that hang wait to be let go."""

    def __init__(self):
        self.seconds = 100.0
        self.count = 0
        self.error = None
        self.hangs = {}
        self.entered = threading.Event()

    def clock(self):
        return self.seconds

    def read(self, uuid):
        if uuid in self.hangs:
            self.entered.set()
            self.hangs[uuid].wait(PATIENCE_SECONDS)
        if self.error is not None:
            raise self.error
        self.count += 1
        return GpuReading(900, 100.0, float(self.count))


@pytest.fixture
def gpus():
    return Gpus()


@pytest.fixture
def sampler(gpus):
    made = Sampler(gpus.read, ["a", "b"], gpus.clock, interval_seconds=0.001, stale_seconds=2.0)
    yield made
    made.stop()


def test_a_reading_is_given_out_until_it_is_stale(gpus, sampler):
    sampler.sample_once("a")
    gpus.seconds += 2.0
    assert sampler.latest("a") == Sample(GpuReading(900, 100.0, 1.0), 100.0)
    gpus.seconds += 0.5
    with pytest.raises(ActuationError, match="GPU a has no reading of the last 2 s"):
        sampler.latest("a")
    assert sampler.age_seconds("a") == 2.5


def test_before_the_first_reading_there_is_none(sampler):
    assert sampler.age_seconds("a") is None
    with pytest.raises(ActuationError, match="no reading"):
        sampler.latest("a")
    with pytest.raises(NotFoundError, match="'c' is not among those that are read: a, b"):
        sampler.latest("c")


def test_a_failure_is_what_who_asks_is_told_once_the_last_reading_is_stale(gpus, sampler):
    sampler.sample_once("a")
    gpus.error = GpuLostError("GPU a is lost")
    sampler.sample_once("a")
    assert sampler.read("a").clock_mhz == 900
    gpus.seconds += 3.0
    with pytest.raises(GpuLostError, match="GPU a is lost"):
        sampler.latest("a")
    gpus.error = None
    sampler.sample_once("a")
    assert sampler.read("a").energy_joules == 2.0


def test_a_surprise_is_a_failure_like_any_other(gpus, sampler):
    gpus.error = TypeError("odd")
    sampler.sample_once("a")
    with pytest.raises(ActuationError, match="GPU a: TypeError: odd"):
        sampler.latest("a")


def test_every_reading_is_told_with_its_gpu(gpus):
    told = []
    sampler = Sampler(
        gpus.read,
        ["a"],
        gpus.clock,
        interval_seconds=1.0,
        stale_seconds=2.0,
        on_sample=lambda uuid, sample: told.append((uuid, sample)),
    )
    sampler.sample_once("a")
    assert told == [("a", sampler.latest("a"))]


def test_a_gpu_that_hangs_stops_its_own_readings_only(gpus):
    reached = threading.Event()

    def note(uuid, sample):
        if uuid == "b" and sample.reading.energy_joules >= 20:
            reached.set()

    sampler = Sampler(
        gpus.read,
        ["a", "b"],
        gpus.clock,
        interval_seconds=0.001,
        stale_seconds=2.0,
        on_sample=note,
    )
    gpus.hangs["a"] = threading.Event()
    try:
        sampler.start()
        assert gpus.entered.wait(PATIENCE_SECONDS)
        assert reached.wait(PATIENCE_SECONDS)
        gpus.seconds += 5.0
        with pytest.raises(ActuationError, match=r"does not answer: .* running for 5\.0 s"):
            sampler.latest("a")
    finally:
        sampler.stop()
        gpus.hangs["a"].set()


def test_a_gpu_whose_clock_changes_is_read_at_once_and_often(gpus):
    read = threading.Semaphore(0)
    sampler = Sampler(
        gpus.read,
        ["a"],
        gpus.clock,
        interval_seconds=PATIENCE_SECONDS * 10,
        stale_seconds=PATIENCE_SECONDS * 100,
        on_sample=lambda uuid, sample: read.release(),
    )
    try:
        sampler.start()
        assert read.acquire(timeout=PATIENCE_SECONDS)
        sampler.hurry("a")
        for _ in range(5):  # the clock stands still, so it stays in a hurry
            assert read.acquire(timeout=PATIENCE_SECONDS)
    finally:
        sampler.stop()
