from __future__ import annotations

import logging
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.samples import Sink
from throttle.engines.reporter import Reporter
from throttle.v1 import engine_pb2

HEARTBEAT = engine_pb2.ITERATION_PHASE_HEARTBEAT


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def state():
    return engine_pb2.IterationState(phase=engine_pb2.ITERATION_PHASE_COMPLETED)


def test_states_are_numbered_and_dated(clock):
    sink = Sink()
    reporter = Reporter(sink, tells_arrivals=False, clock=clock)
    reporter.send(state(), idle=False)
    clock.seconds += 2.0
    reporter.send(state(), idle=True, at_seconds=101.5)
    assert [(s.sequence_number, s.engine_time_seconds) for s in sink.states] == [
        (1, 100.0), (2, 101.5),
    ]  # fmt: skip
    assert reporter.idle


@given(times=st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_engine_time_never_falls_and_numbers_always_rise(times):
    sink = Sink()
    reporter = Reporter(sink, tells_arrivals=False, clock=lambda: 0.0)
    for seconds in times:
        reporter.send(state(), idle=False, at_seconds=seconds)
    told = [s.engine_time_seconds for s in sink.states]
    assert told == sorted(told)
    assert [s.sequence_number for s in sink.states] == list(range(1, len(times) + 1))


def test_an_idle_engine_that_tells_arrivals_beats_and_a_busy_one_does_not(clock):
    sink = Sink()
    reporter = Reporter(sink, tells_arrivals=True, heartbeat_seconds=3600.0, clock=clock)
    reporter.send(state(), idle=False)
    clock.seconds += 7200.0
    reporter.beat()
    assert len(sink.states) == 1
    reporter.send(state(), idle=True)
    reporter.beat()  # it has just spoken
    assert len(sink.states) == 2
    clock.seconds += 3600.0
    reporter.beat()
    assert sink.states[-1] == engine_pb2.IterationState(
        sequence_number=3, phase=HEARTBEAT, engine_time_seconds=clock.seconds
    )
    reporter.close()
    assert sink.closed


def test_heartbeats_come_by_themselves():
    beaten = threading.Event()

    class Waiting(Sink):
        def submit(self, state):
            super().submit(state)
            beaten.set()

    reporter = Reporter(Waiting(), tells_arrivals=True, heartbeat_seconds=0.01)
    assert beaten.wait(20.0)
    reporter.close()


def test_without_arrivals_an_idle_engine_is_silent_until_something_tells_them(clock):
    sink = Sink()
    reporter = Reporter(sink, tells_arrivals=False, heartbeat_seconds=3600.0, clock=clock)
    assert reporter._thread is None
    reporter.tell_arrivals()
    reporter.tell_arrivals()
    assert reporter._thread.is_alive()
    reporter.close()


def test_errors_are_counted_and_logged_once(clock, caplog):
    reporter = Reporter(Sink(), tells_arrivals=False, clock=clock)
    with caplog.at_level(logging.ERROR, "throttle.engines"):
        for _ in range(3):
            try:
                next(iter(()))
            except StopIteration:
                reporter.note_error()
    assert reporter.errors_count == 3
    assert len(caplog.records) == 1
