from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from throttle.control.state import (
    EventKind,
    IterationState,
    Phase,
    RequestEvent,
    RequestProgress,
)
from throttle.daemon.attribution import EnergyBook, EngineLedger, GpuEnergy


def completed(number, duration, progress=None, events=()):
    """An iteration; progress maps a request to its prompt and generated tokens."""
    return IterationState(
        number,
        Phase.COMPLETED,
        float(number),
        duration,
        progress=None
        if progress is None
        else RequestProgress(
            tuple(progress),
            tuple(prompt for prompt, _ in progress.values()),
            tuple(generated for _, generated in progress.values()),
        ),
        request_events=tuple(events),
    )


def heartbeat(number, events=()):
    return IterationState(number, Phase.HEARTBEAT, float(number), request_events=tuple(events))


def finished(number, generated):
    return RequestEvent(EventKind.FINISHED, number, generated_tokens=generated)


def preempted(number, generated):
    return RequestEvent(EventKind.PREEMPTED, number, generated_tokens=generated)


def arrived(number, prompt, cached=0):
    return RequestEvent(EventKind.ARRIVED, number, prompt_tokens=prompt, cached_tokens=cached)


def test_energy_within_iterations_goes_to_requests_by_tokens_and_the_rest_is_idle():
    ledger = EngineLedger("e", ["a"])
    ledger.note(completed(1, 1.0, {1: (30, 0), 2: (10, 0)}), 2.0)
    ledger.add("a", 0.0, 3.0, 300.0)  # 100 W; the iteration ran from 1 to 2
    energy = ledger.energy()
    assert (energy.requests_joules, energy.idle_joules, energy.pending_joules) == (100, 100, 100)
    ledger.note(heartbeat(2, [finished(1, 0), finished(2, 0)]), 3.0)
    closed = ledger.close()
    assert [
        (r.request_number, r.energy_joules, r.tokens_count) for r in closed.recent_requests
    ] == [
        (1, 75.0, 30),
        (2, 25.0, 10),
    ]
    assert (closed.idle_joules, closed.pending_joules, closed.requests_count) == (200.0, 0.0, 2)


def test_an_iteration_waits_until_every_gpu_has_been_read_up_to_its_end():
    ledger = EngineLedger("e", ["a", "b"])
    ledger.note(completed(1, 1.0, {1: (1, 0)}), 1.0)
    ledger.add("a", 0.0, 1.0, 100.0)
    assert ledger.energy().requests_joules == 0.0
    ledger.add("b", 0.0, 2.0, 400.0)
    energy = ledger.energy()
    assert (energy.requests_joules, energy.pending_joules) == (300.0, 200.0)


def test_cached_tokens_are_nobodys_work_and_preempted_ones_are_done_again():
    ledger = EngineLedger("e", ["a"])
    ledger.note(completed(1, 1.0, {1: (100, 1), 2: (10, 0)}, [arrived(1, 100, 90)]), 1.0)
    ledger.note(
        completed(2, 1.0, {2: (11, 0)}, [preempted(1, 1)]),
        2.0,
    )
    ledger.note(completed(3, 1.0, {1: (40, 1)}, [finished(2, 0)]), 3.0)
    ledger.note(completed(4, 1.0, {}, [finished(1, 3)]), 4.0)
    ledger.add("a", 0.0, 4.0, 840.0)
    first, second = (
        {r.request_number: r for r in ledger.energy().recent_requests}[number] for number in (1, 2)
    )
    assert first.tokens_count == (10 + 1) + 40 + 2
    assert second.tokens_count == 10 + 1
    assert first.energy_joules == pytest.approx(210.0 * (11 / 21 + 2))
    assert second.energy_joules == pytest.approx(210.0 * (10 / 21 + 1))


def test_requests_that_run_together_for_long_are_shared_to_as_singly():
    ledger = EngineLedger("e", ["a"])
    ledger.note(heartbeat(1, [arrived(1, 30), arrived(2, 10)]), 0.0)
    for number in range(2, 8):  # the first computes 30 and 10 tokens, the others 1 and 1
        generated = number - 2
        ledger.note(completed(number, 1.0, {1: (30, generated), 2: (10, generated)}), number - 1.0)
    ledger.note(completed(8, 1.0, {1: (30, 9), 2: (10, 5)}), 7.0)  # 4 tokens and none
    ledger.note(completed(9, 1.0, {1: (30, 10), 2: (0, 5)}, [preempted(2, 5)]), 8.0)
    ledger.note(completed(10, 1.0, {1: (30, 10), 2: (10, 5)}), 9.0)  # computed anew
    ledger.note(heartbeat(11, [finished(1, 10), finished(2, 6)]), 9.0)
    ledger.add("a", 0.0, 9.0, 900.0)
    shares = [(r.request_number, r.tokens_count) for r in ledger.close().recent_requests]
    joules = [r.energy_joules for r in ledger.close().recent_requests]
    assert shares == [(1, 40), (2, 25)]
    assert joules == pytest.approx([75.0 + 250.0 + 100.0 + 100.0, 25.0 + 250.0 + 100.0])


def test_an_iteration_that_names_no_requests_is_unassigned():
    ledger = EngineLedger("e", ["a"])
    ledger.note(completed(1, 1.0), 1.0)
    ledger.add("a", 0.0, 1.0, 100.0)
    assert ledger.energy().unassigned_joules == 100.0


def test_requests_that_end_are_told():
    told = []
    ledger = EngineLedger("e", ["a"], told.append)
    ledger.note(completed(1, 0.5, {7: (4, 0)}, [finished(7, 2)]), 1.0)
    ledger.add("a", 0.0, 1.0, 100.0)
    assert [(r.request_number, r.energy_joules, r.tokens_count) for r in told] == [(7, 50.0, 6)]


def test_a_gpu_without_an_engine_is_unattributed_and_a_shared_one_is_halved():
    book = EnergyBook()
    book.sample("a", 0.0, 1000.0)
    book.sample("a", 1.0, 1100.0)
    first = book.open("first", ["a"])
    book.sample("a", 2.0, 1300.0)
    book.open("second", ["a"])
    book.sample("a", 3.0, 1400.0)
    assert book.gpu("a") == GpuEnergy(400.0, 100.0)
    assert book.engines() == {"first": 250.0, "second": 50.0}
    book.close(first)
    book.close(first)
    book.sample("a", 4.0, 1500.0)
    assert book.engines() == {"first": 250.0, "second": 150.0}
    assert book.gpu("never read") == GpuEnergy()


def test_the_same_update_read_twice_counts_once():
    book = EnergyBook()
    for joules in (0.0, 50.0, 50.0):
        book.sample("a", 1.0 if joules else 0.0, joules)
    assert book.gpu("a") == GpuEnergy(50.0, 50.0)


def test_an_engine_that_comes_back_goes_on_with_its_total():
    book = EnergyBook()
    book.sample("a", 0.0, 0.0)
    for second in range(3):
        ledger = book.open("e", ["a"])
        book.sample("a", second + 1.0, 100.0 * (second + 1))
        book.close(ledger)
    assert book.engines() == {"e": 300.0}


def test_more_stretches_than_are_kept_apart_lose_no_energy():
    ledger = EngineLedger("e", ["a"])
    for index in range(5000):
        ledger.add("a", float(index), index + 1.0, 2.0)
    assert ledger.energy().pending_joules == pytest.approx(10_000.0)


def test_iterations_of_a_gpu_that_is_never_read_do_not_pile_up():
    ledger = EngineLedger("e", ["a"])
    for number in range(10_000):
        ledger.note(completed(number, 0.5, {1: (number, 0)}), float(number))
    assert len(ledger._noted) < 600
    ledger.add("a", 0.0, 20_000.0, 300.0)
    energy = ledger.energy()
    assert energy.total_joules == pytest.approx(300.0)
    assert energy.requests_joules > 0


class Machine:
    """Two GPUs and two engines on both of them, which come and go; time passes with every step."""

    def __init__(self):
        self.book = EnergyBook()
        self.seconds = 0.0
        self.counters = dict.fromkeys("ab", 0.0)
        self.ledgers = {}
        self._sampled = dict.fromkeys("ab", 0.0)
        self._tokens = {}
        self._numbers = itertools.count(1)
        for uuid in self.counters:
            self.book.sample(uuid, 0.0, 0.0)

    def sample(self, uuid, watts):
        self.counters[uuid] += watts * (self.seconds - self._sampled[uuid])
        self._sampled[uuid] = self.seconds
        self.book.sample(uuid, self.seconds, self.counters[uuid])

    def iterate(self, duration, work):
        for number, grown in work.items():
            self._tokens[number] = self._tokens.get(number, 0) + grown
        progress = {number: (0, self._tokens[number]) for number in work}
        self._note(completed(next(self._numbers), duration, progress))

    def end(self, request):
        self._note(heartbeat(next(self._numbers), [finished(request, 0)]))

    def engine(self, name):
        if name in self.ledgers:
            self.book.close(self.ledgers.pop(name))
        else:
            self.ledgers[name] = self.book.open(name, ["a", "b"])

    def _note(self, state):
        for ledger in self.ledgers.values():
            ledger.note(state, self.seconds)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("sample"), st.sampled_from("ab"), st.floats(0.0, 700.0)),
        st.tuples(
            st.just("iterate"),
            st.floats(0.001, 2.0),
            st.dictionaries(st.integers(1, 6), st.integers(0, 50), max_size=6),
        ),
        st.tuples(st.just("end"), st.integers(1, 6)),
        st.tuples(st.just("engine"), st.sampled_from("xy")),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_the_parts_always_sum_to_the_counters(steps):
    machine = Machine()
    for kind, *arguments in steps:
        machine.seconds += 0.1
        getattr(machine, kind)(*arguments)
    book, total = machine.book, sum(machine.counters.values())
    parts = sum(book.gpu(uuid).unattributed_joules for uuid in "ab") + sum(book.engines().values())
    assert parts == pytest.approx(total, rel=1e-9, abs=1e-6)
    assert sum(book.gpu(uuid).counted_joules for uuid in "ab") == pytest.approx(total)
    for ledger in machine.ledgers.values():
        energy = ledger.energy()
        assert min(energy.requests_joules, energy.idle_joules, energy.pending_joules) >= 0
        ended = sum(request.energy_joules for request in energy.recent_requests)
        assert ended <= energy.requests_joules + 1e-6
