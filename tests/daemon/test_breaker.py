from __future__ import annotations

import pytest
import structlog

from throttle.control.state import EventKind, IterationState, Phase, RequestEvent, Slos
from throttle.daemon.brains import EngineBrain
from throttle.daemon.breaker import BreakerSettings, SloBreaker
from throttle.daemon.session import Session
from throttle.daemon.telemetry import GpuMeter
from throttle.v1 import decision_pb2, engine_pb2

SLOS = Slos(ttft_seconds=1.0, tpot_seconds=0.1, e2e_seconds=10.0)


class Engine:
    """Tells a breaker of requests, one after another."""

    def __init__(self, breaker, *, throttled):
        self.breaker, self.throttled = breaker, throttled
        self.now, self.number = 0.0, 0

    def say(self, *events, after=0.0):
        self.now += after
        state = IterationState(1, Phase.COMPLETED, self.now, request_events=events)
        self.breaker.observe(state, throttled=self.throttled)

    def serve(self, ttft=0.5, tpot=0.05, tokens=11):
        self.number += 1
        self.say(RequestEvent(EventKind.ARRIVED, self.number))
        self.say(RequestEvent(EventKind.FIRST_TOKEN, self.number), after=ttft)
        end = RequestEvent(EventKind.FINISHED, self.number, generated_tokens=tokens)
        self.say(end, after=tpot * (tokens - 1))

    @property
    def is_open(self):
        return self.breaker.is_open(self.now)


def engine_of(*, throttled=True, **settings):
    return Engine(SloBreaker(BreakerSettings(**settings), SLOS), throttled=throttled)


def test_requests_that_keep_their_limits_leave_it_closed():
    engine = engine_of()
    for _ in range(200):
        engine.serve()
    assert not engine.is_open


@pytest.mark.parametrize("missed", [{"ttft": 1.1}, {"tpot": 0.11}, {"tpot": 0.099, "tokens": 150}])
def test_r12_requests_that_miss_limits_under_throttling_open_it_for_a_while(missed):
    engine = engine_of(backoff_seconds=60.0)
    for _ in range(19):
        engine.serve(**missed)
    assert not engine.is_open  # too few to say
    engine.serve(**missed)
    assert engine.is_open
    assert engine.breaker.trips_count == 1
    engine.now += 60.0
    assert not engine.is_open


def test_requests_that_miss_at_the_highest_clock_say_nothing_of_throttling():
    engine = engine_of(throttled=False)
    for _ in range(100):
        engine.serve(ttft=9.0)
    assert not engine.is_open


def test_the_share_that_is_allowed_to_miss_is_the_operators():
    engine = engine_of(attainment_ratio=0.5)
    for index in range(100):
        engine.serve(ttft=2.0 if index % 5 == 0 else 0.5)
    assert not engine.is_open
    strict = engine_of(attainment_ratio=0.9)
    for index in range(100):
        strict.serve(ttft=2.0 if index % 5 == 0 else 0.5)
    assert strict.breaker.trips_count > 0
    never = engine_of(attainment_ratio=0.0)
    for _ in range(100):
        never.serve(ttft=2.0)
    assert not never.is_open


def test_an_aborted_request_is_not_judged_and_a_settings_problem_is_named():
    engine = engine_of()
    for number in range(1, 101):
        engine.say(RequestEvent(EventKind.ARRIVED, number))
        engine.say(RequestEvent(EventKind.ABORTED, number), after=100.0)
    assert not engine.is_open
    assert len(BreakerSettings(2.0, 0.0).problems()) == 2


def test_r12_an_engine_whose_breaker_is_open_is_at_default_clocks(
    registered, brain, actuator, metrics, *, clock, arrival, gpus, registry
):
    profile = registered()
    breaker = SloBreaker(BreakerSettings(), SLOS)
    session = Session(
        registration_id="r",
        profile=profile,
        engine_brain=EngineBrain(brain, "scripted", (600, 900, 1200, 1500)),
        actuator=actuator,
        meter=GpuMeter(actuator.read, profile.gpu_uuids, clock),
        recording=None,
        breaker=breaker,
        metrics=metrics,
        clock=clock,
        log=structlog.get_logger(),
    )
    assert session.handle([arrival()]).applied_clock_mhz == 900

    def events(kind):
        return [
            engine_pb2.RequestEvent(kind=kind, request_number=number, prompt_tokens=8)
            for number in range(1, 31)
        ]

    session.handle([arrival(request_events=events(engine_pb2.REQUEST_EVENT_KIND_ARRIVED))])
    for _ in range(20):  # seconds of engine time: far beyond the end-to-end limit
        session.handle([arrival()])
    finished = events(engine_pb2.REQUEST_EVENT_KIND_FINISHED)
    answer = session.handle([arrival(request_events=finished)])
    assert answer.reason == decision_pb2.DECISION_REASON_BREAKER_OPEN
    assert answer.applied_clock_mhz == gpus.read_lock_mhz("GPU-a") == 0
    assert registry.get_sample_value("throttle_slo_breaker_trips_total") == 1
    session.close()
