from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from throttle.daemon.mailbox import WAITING_BYTES_LIMIT, WAITING_STATES_LIMIT, Mailbox
from throttle.errors import InvalidInputError, ThrottleError
from throttle.v1 import engine_pb2


@pytest.fixture
def mailbox(clock):
    return Mailbox(clock)


def test_everything_that_waits_is_taken_in_order(mailbox, arrival):
    arrivals = [arrival(), arrival(), arrival()]
    for each in arrivals:
        mailbox.put(each)
    assert mailbox.take(None) == arrivals
    assert mailbox.take(0.0) == []


def test_what_came_meanwhile_is_taken_without_waiting(mailbox, arrival):
    assert mailbox.waiting() == []
    one = arrival()
    mailbox.put(one)
    mailbox.end()  # orderly: what came before it counts
    assert mailbox.waiting() == [one]
    assert mailbox.take(None) is None


def test_nothing_that_came_before_an_error_is_taken(mailbox, arrival):
    mailbox.put(arrival())
    mailbox.end(ThrottleError("refused"))
    assert mailbox.waiting() == []


def test_a_waiting_taker_is_woken(mailbox, arrival):
    taken = []
    taker = threading.Thread(target=lambda: taken.append(mailbox.take(10.0)))
    taker.start()
    one = arrival()
    mailbox.put(one)
    taker.join(10.0)
    assert taken == [[one]]


def test_what_was_taken_without_waiting_wakes_nobody_later(mailbox, arrival):
    for _ in range(3):
        mailbox.put(arrival())
        assert len(mailbox.waiting()) == 1
    started = time.monotonic()
    assert mailbox.take(0.05) == []
    assert time.monotonic() - started >= 0.05


def test_an_end_wakes_a_waiting_taker(mailbox):
    taken = []
    taker = threading.Thread(target=lambda: taken.append(mailbox.take(None)))
    taker.start()
    mailbox.end()
    taker.join(10.0)
    assert taken == [None]


def test_an_orderly_end_delivers_what_waits_first(mailbox, arrival):
    one = arrival()
    mailbox.put(one)
    mailbox.end()
    assert mailbox.take(None) == [one]
    assert mailbox.take(None) is None
    assert mailbox.error is None


def test_an_error_ends_at_once_and_the_first_one_counts(mailbox, arrival):
    mailbox.put(arrival())
    error = InvalidInputError("state.phase", 0, "others")
    mailbox.end(error)
    mailbox.end(ThrottleError("later"))
    assert mailbox.take(None) is None
    assert mailbox.error is error


def test_it_tells_since_when_the_oldest_waits(mailbox, arrival, clock):
    assert mailbox.oldest_seconds is None
    mailbox.put(arrival())
    clock.seconds += 5.0
    mailbox.put(arrival())
    assert mailbox.oldest_seconds == 100.0
    mailbox.take(None)
    assert mailbox.oldest_seconds is None


def test_an_engine_that_never_reads_is_stopped(mailbox, arrival):
    one = arrival()
    for _ in range(WAITING_STATES_LIMIT):
        mailbox.put(one)
    with pytest.raises(ThrottleError, match="read the answers"):
        mailbox.put(one)


def test_an_engine_that_never_reads_is_stopped_sooner_when_its_states_are_large(mailbox, arrival):
    numbers = engine_pb2.RequestProgress(request_numbers=range(1_000_000, 1_800_000))
    large = replace(arrival(), message=engine_pb2.IterationState(progress=numbers))
    fit = WAITING_BYTES_LIMIT // large.message.ByteSize()
    assert 1 <= fit < 10
    for _ in range(2):  # what was taken waits no more
        for _ in range(fit):
            mailbox.put(large)
        with pytest.raises(ThrottleError, match="read the answers"):
            mailbox.put(large)
        mailbox.take(None)
