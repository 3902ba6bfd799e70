"""An engine's states from a process beside it, and what the end of either costs the other."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_client import (
    ARRIVED,
    DEADLINE_SECONDS,
    FINISHED,
    Server,
    events_of,
    registration,
    state,
)
from throttle.client import ReconnectBackoff, ThrottleClient
from throttle.engines import sender_process
from throttle.engines.options import EngineOptions
from throttle.engines.sender import IDLE_SECONDS, chunks, messages
from throttle.engines.sender_process import SenderProcess, connect_aside, framed
from throttle.v1 import engine_pb2

STEADY = ReconnectBackoff(initial_seconds=1.0, maximum_seconds=8.0, jitter_ratio=0.0)


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "throttle.sock")
    yield server
    server.stop()


@pytest.fixture
def aside(server):
    sinks = []

    def make(**options):
        sink = SenderProcess(EngineOptions(server.target), registration(), **options)
        sinks.append(sink)
        return sink

    yield make
    for sink in sinks:
        sink.close(timeout_seconds=0.1)


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


class Launcher:
    """Starts nothing: the test reads the other end of each socket."""

    def __init__(self):
        self.ends, self.killed_count, self.fails = [], 0, False

    def __call__(self):
        if self.fails:
            raise OSError("no more processes")
        ours, theirs = socket.socketpair()
        ours.settimeout(0.0)
        theirs.settimeout(DEADLINE_SECONDS)
        self.ends.append(theirs)
        return self, ours

    def kill(self):
        self.killed_count += 1

    def wait(self, timeout=None):
        return 0

    def close(self):
        for end in self.ends:
            end.close()


@pytest.fixture
def launcher():
    launcher = Launcher()
    yield launcher
    launcher.close()


def told(end, count):
    """The first states that the other end of a socket was told."""
    found = messages(iter(lambda: end.recv(1 << 16), b""))
    next(found)
    assert engine_pb2.EngineRegistration.FromString(next(found)) == registration()
    return [engine_pb2.IterationState.FromString(next(found)) for _ in range(count)]


def started_again(sink, launcher, count):
    """A sender is started on a thread of its own."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(launcher.ends) < count or sink._starting:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def completed(number, *events):
    message = state(number, *events)
    message.phase = engine_pb2.ITERATION_PHASE_COMPLETED
    return message


def big(number, *events):
    message = completed(number, *events)
    message.progress.request_numbers.extend(range(1 << 40, (1 << 40) + 2000))
    return message


# Real processes.


def test_states_reach_the_daemon_through_a_process_of_their_own(server, aside):
    server.start()
    sink = aside()
    stream = server.stream()
    assert stream.registration.engine_id == "engine"
    stream.accept()
    sink.submit(state(1, (ARRIVED, 7, 0.5)))
    assert events_of(stream.read()) == [(ARRIVED, 7, 0.5)]
    for number in range(2, 40):
        sink.submit(big(number))
    # Where the socket was full the newest state waits for the next call, as an engine makes one.
    number, read = 40, stream.read()
    while read.sequence_number < 39:
        sink.submit(big(number))
        number, read = number + 1, stream.read()
    assert sink.refused_count == sink.failures_count == 0


def test_the_stream_ends_when_the_engine_closes(server, aside):
    server.start()
    sink = aside()
    stream = server.stream().accept()
    closing = threading.Thread(target=sink.close, args=(DEADLINE_SECONDS,))
    closing.start()
    with pytest.raises(StopIteration):
        stream.read()
    stream.end()
    closing.join(DEADLINE_SECONDS)
    assert sink._child.returncode == 0


ENGINE = """
import sys, time
from tests.engines.test_sender_process import *
sink = SenderProcess(EngineOptions(sys.argv[1]), registration())
sink.submit(state(1))
time.sleep(600)
"""


def test_the_stream_ends_when_the_engine_is_killed(server):
    server.start()
    engine = subprocess.Popen([sys.executable, "-c", ENGINE, server.target])
    try:
        stream = server.stream().accept()
        assert stream.read().sequence_number == 1
    finally:
        engine.kill()
        engine.wait()
    with pytest.raises(StopIteration):
        stream.read()
    stream.end()


def test_a_killed_sender_is_replaced_and_the_new_one_tells_of_live_requests(server, aside):
    server.start()
    clock = Clock()
    sink = aside(clock=clock, backoff=STEADY)
    first = server.stream().accept()
    sink.submit(completed(1, (ARRIVED, 7, 0.0), (ARRIVED, 8, 0.0)))
    sink.submit(completed(2, (FINISHED, 8, 0.0)))
    while first.read().sequence_number < 2:  # the first may have been overtaken by the second
        pass
    sink._child.kill()
    sink._child.wait()
    first.end()
    number = 3
    while sink.failures_count == 0:  # the write that finds the socket closed
        sink.submit(completed(number))
        number += 1
    clock.seconds += STEADY.maximum_seconds
    sink.submit(completed(number))
    read = server.stream().accept().read()
    assert [event[:2] for event in events_of(read)] == [(ARRIVED, 7)]


def test_a_stopped_sender_holds_nobody_and_no_event_is_lost(server, aside):
    server.start()
    sink = aside()
    stream = server.stream().accept()
    sink.submit(state(1))
    assert stream.read().sequence_number == 1
    os.kill(sink._child.pid, signal.SIGSTOP)
    longest, count = 0.0, 400
    for number in range(2, count):  # some five megabytes
        before = time.monotonic()
        sink.submit(big(number, (ARRIVED, number, 0.0)))
        longest = max(longest, time.monotonic() - before)
    assert longest < 2.0
    os.kill(sink._child.pid, signal.SIGCONT)
    arrived, read = [], None
    number = count
    while number not in arrived:
        sink.submit(state(count + len(arrived), (ARRIVED, count, 0.0)))
        read = stream.read()
        arrived += [event.request_number for event in read.request_events]
    assert set(range(2, count)) <= set(arrived)


def test_a_sender_ends_by_itself_when_it_cannot_connect_as_told(tmp_path):
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen(
            [sys.executable, "-m", "throttle.engines.sender", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    with ours, child:
        settings = f'{{"address": "localhost:1", "token_file": "{tmp_path}/none"}}'
        ours.sendall(framed(settings.encode()) + framed(registration().SerializeToString()))
        assert child.wait(DEADLINE_SECONDS) == 1
        assert "ends: " in child.stderr.read()


# The engine's side, without processes.


def test_a_lost_sender_is_replaced_after_a_pause_that_grows(launcher, caplog):
    clock = Clock()
    sink = SenderProcess(
        EngineOptions("unix:/none"), registration(), launch=launcher, clock=clock, backoff=STEADY
    )
    for failures, pause in ((1, 1.0), (2, 2.0), (3, 4.0)):
        launcher.ends[-1].close()
        sink.submit(state(10 * failures))
        assert sink.failures_count == failures
        clock.seconds += 0.9 * pause
        sink.submit(state(10 * failures + 1))
        assert len(launcher.ends) == failures
        clock.seconds += 0.2 * pause
        sink.submit(state(10 * failures + 2))
        started_again(sink, launcher, failures + 1)
    assert told(launcher.ends[-1], 1)[0].sequence_number == 32
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    sink.close()


def test_senders_that_cannot_be_started_are_tried_again_later(launcher):
    clock = Clock()
    sink = SenderProcess(
        EngineOptions("unix:/none"), registration(), launch=launcher, clock=clock, backoff=STEADY
    )
    sink.submit(state(1, (ARRIVED, 1, 0.0)))
    launcher.ends[-1].close()
    sink.submit(state(2))
    launcher.fails = True
    clock.seconds += 2.0
    sink.submit(state(3))
    deadline = time.monotonic() + DEADLINE_SECONDS
    while sink.failures_count < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    launcher.fails = False
    clock.seconds += 2.5
    sink.submit(state(4))
    started_again(sink, launcher, 2)
    assert told(launcher.ends[-1], 1)[0].request_events[0].request_number == 1
    sink.close()


def test_what_is_no_state_is_refused_and_after_the_end_nothing_is_taken(launcher):
    sink = SenderProcess(EngineOptions("unix:/none"), registration(), launch=launcher)
    sink.submit("no state")
    sink.submit(state(1))
    sink.close()
    sink.close()
    sink.submit(state(2))
    assert sink.refused_count == 1
    assert [each.sequence_number for each in told(launcher.ends[0], 1)] == [1]
    assert launcher.ends[0].recv(1) == b""


def test_without_a_process_the_engines_own_reports(server, monkeypatch):
    def fail():
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr(sender_process, "_launch", fail)
    sink = connect_aside(EngineOptions(server.target), registration())
    assert isinstance(sink, ThrottleClient)
    sink.close()


def test_unusable_credentials_are_told_before_a_sender_is_started(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        connect_aside(
            EngineOptions("localhost:1", token_file=str(tmp_path / "none")), registration()
        )


# The sender's side.


@given(
    bodies=st.lists(st.binary(max_size=40), max_size=10),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=10),
    lost=st.integers(0, 3),
)
def test_messages_come_out_whole_however_the_stream_is_cut(bodies, cuts, lost):
    text = b"".join(map(framed, bodies))
    text = text[: len(text) - lost]
    pieces, at = [], 0
    while at < len(text):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(text[at : at + size])
        at += size
    whole = list(messages(iter(pieces)))
    assert whole == (bodies[:-1] if lost and bodies else bodies)


def test_a_sender_polls_an_engine_at_work_and_waits_for_an_idle_one():
    clock, flags, pauses = Clock(), [], []

    class Socket:
        def recv(self, _size, flag):
            flags.append(flag)
            if flag:
                raise BlockingIOError
            return b"a" if len(flags) == 1 else b""

    def pause(seconds):
        pauses.append(seconds)
        clock.seconds += seconds

    assert list(chunks(Socket(), clock, pause)) == [b"a"]
    assert flags == [0, *[socket.MSG_DONTWAIT] * len(pauses), 0]
    assert sum(pauses) == pytest.approx(IDLE_SECONDS, rel=0.02)
