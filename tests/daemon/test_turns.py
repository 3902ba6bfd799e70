from __future__ import annotations

import contextlib
import threading
import time

from throttle.daemon.turns import Turns


def _run(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_a_second_decision_waits_until_the_first_is_done():
    turns = Turns(patience_seconds=30.0)
    inside, leave, order = threading.Event(), threading.Event(), []

    def first():
        with turns.turn():
            inside.set()
            leave.wait(10.0)
            order.append("first")

    def second():
        inside.wait(10.0)
        with turns.turn():
            order.append("second")

    threads = [_run(first), _run(second)]
    inside.wait(10.0)
    threads[1].join(0.05)
    assert order == []
    leave.set()
    for thread in threads:
        thread.join(10.0)
    assert order == ["first", "second"]


def test_a_turn_that_is_never_given_back_holds_nobody_up_for_good():
    turns = Turns(patience_seconds=0.01)
    with turns.turn(), turns.turn():
        pass


def test_a_turn_taken_out_of_patience_frees_none():
    turns = Turns(patience_seconds=0.05)
    entered_seconds = []
    with turns.turn():
        with turns.turn():
            pass
        started = time.monotonic()
        with turns.turn():  # nobody has given one back: waits as long again
            entered_seconds.append(time.monotonic() - started)
    assert entered_seconds[0] >= 0.05


def test_a_failed_decision_gives_its_turn_back():
    turns = Turns(patience_seconds=30.0)
    started = time.monotonic()
    for _ in range(2):
        with contextlib.suppress(ZeroDivisionError), turns.turn():
            _ = 1 / 0
    assert time.monotonic() - started < 15.0
