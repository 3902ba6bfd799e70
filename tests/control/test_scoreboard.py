from __future__ import annotations

import math

import numpy as np
import pytest

from throttle.control.scoreboard import Column, Scoreboard
from throttle.control.state import EventKind, Phase, RequestEvent, Slos

SLOS = Slos(ttft_seconds=1.0, tpot_seconds=0.05)


def test_an_arrival_waits_with_the_limits_it_states_and_the_defaults_for_the_rest(engine):
    board = Scoreboard(SLOS)
    engine.arrive(7, prompt=300, age=0.25, slos=Slos(ttft_seconds=0.5), cached_tokens=100)
    board.apply(engine.state(Phase.HEARTBEAT))
    (row,) = board.live().waiting
    assert row[Column.ARRIVAL] == pytest.approx(engine.now - 0.25)
    assert row[Column.TTFT] == 0.5
    assert row[Column.TPOT] == 0.05
    assert row[Column.E2E] == math.inf
    assert row[Column.COMPUTED] == 100


def test_progress_moves_a_request_from_waiting_to_running(engine):
    board = Scoreboard(SLOS)
    engine.arrive(1)
    engine.arrive(2)
    engine.running = {1: (60, 0)}
    board.apply(engine.state())
    live = board.live()
    assert live.running[:, Column.NUMBER].tolist() == [1]
    assert live.running[0, Column.COMPUTED] == 60
    assert live.waiting[:, Column.NUMBER].tolist() == [2]


def test_the_first_token_is_dated_by_the_iteration_that_completed_it(engine):
    board = Scoreboard(SLOS)
    engine.arrive(1)
    engine.running = {1: (100, 0)}
    board.apply(engine.state())
    engine.running = {1: (100, 1)}
    board.apply(engine.state())
    first = engine.now
    engine.running = {1: (100, 2)}
    board.apply(engine.state())
    assert board.live().running[0, Column.FIRST_TOKEN] == pytest.approx(first)


def test_a_repeated_arrival_does_not_reset_a_request(engine):
    board = Scoreboard(SLOS)
    engine.arrive(1)
    engine.running = {1: (100, 5)}
    board.apply(engine.state())
    engine.arrive(1, age=0.01)
    board.apply(engine.state())
    assert board.live().running[0, Column.GENERATED] == 5
    assert len(board.live().waiting) == 0


def test_a_finished_request_leaves_and_tells_its_length(engine):
    board = Scoreboard(SLOS)
    engine.arrive(1, length_class="chat")
    engine.running = {1: (100, 9)}
    board.apply(engine.state())
    engine.end(1)
    (ended,) = board.apply(engine.state())
    assert (ended.length_class, ended.generated_tokens, ended.censored) == ("chat", 9, False)
    assert len(board.live().running) == 0


@pytest.mark.parametrize("kind", [EventKind.ABORTED, EventKind.FINISHED])
def test_an_answer_cut_from_outside_or_by_its_limit_is_censored(engine, kind):
    board = Scoreboard(SLOS)
    engine.arrive(1, max_output_tokens=9 if kind is EventKind.FINISHED else None)
    engine.running = {1: (100, 9)}
    board.apply(engine.state())
    engine.end(1, kind)
    (ended,) = board.apply(engine.state())
    assert ended.censored


def test_a_preempted_request_waits_first_and_must_compute_its_answer_again(engine):
    board = Scoreboard(SLOS)
    engine.arrive(1)
    engine.running = {1: (100, 7)}
    board.apply(engine.state())
    engine.arrive(2)
    engine.preempt(1)
    board.apply(engine.state())
    waiting = board.live().waiting
    assert waiting[:, Column.NUMBER].tolist() == [1, 2]
    assert waiting[0, Column.TARGET] == 107
    assert waiting[0, Column.COMPUTED] == 0
    engine.running = {1: (107, 8)}
    board.apply(engine.state())
    resumed = board.live().running[0]
    assert resumed[Column.COMPUTED] >= resumed[Column.TARGET]


def test_a_request_met_late_is_judged_from_now_on(engine):
    board = Scoreboard(SLOS)
    engine.running = {5: (80, 12)}
    board.apply(engine.state())
    (row,) = board.live().running
    assert row[Column.FIRST_GENERATED] == 12
    assert row[Column.TTFT] == math.inf
    assert row[Column.TPOT] == 0.05


def test_a_request_that_vanishes_without_a_word_is_dropped_as_censored(engine):
    board = Scoreboard(SLOS)
    engine.arrive(1)
    engine.running = {1: (100, 3)}
    board.apply(engine.state())
    engine.running = {}
    (ended,) = board.apply(engine.state())
    assert ended.censored
    assert len(board.live().running) == 0


def test_events_of_unknown_requests_are_ignored(engine):
    board = Scoreboard(SLOS)
    engine.events.append(RequestEvent(EventKind.FINISHED, 99, generated_tokens=4))
    assert board.apply(engine.state()) == []


def test_more_requests_than_the_first_rows_are_kept_apart(engine):
    board = Scoreboard(SLOS)
    for number in range(1, 301):
        engine.arrive(number, prompt=number)
    board.apply(engine.state(Phase.HEARTBEAT))
    prompts = board.live().waiting[:, Column.PROMPT]
    assert np.array_equal(prompts, np.arange(1, 301))
