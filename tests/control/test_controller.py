from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.control.scenes import Engine, make_profile
from throttle.control.advice import Verdict
from throttle.control.controller import Controller
from throttle.control.selection import Reason
from throttle.control.settings import ControlSettings
from throttle.control.slack import Slo
from throttle.control.state import KvCache, Phase, Slos
from throttle.testing import FormulaPredictor

PREDICTOR = FormulaPredictor()
FASTEST = 1980
LOWEST_WORKING = 405  # the first candidate at or above 0.2 of the fastest


def _controller(predictor=PREDICTOR, profile=None, **settings):
    return Controller(profile or make_profile(), predictor, ControlSettings(**settings))


def _run(controller, engine, iterations, *, clock=1980, batch=8, **fields):
    """Drive steady decoding and return the last decision."""
    if not engine.running:
        for number in range(1, batch + 1):
            engine.arrive(number)
            engine.running[number] = (100, 1)
    decision = None
    for _ in range(iterations):
        state = engine.state(**fields)
        controller.observe(state, clock)
        decision = controller.decide(state)
        engine.running = {n: (c, g + 1) for n, (c, g) in engine.running.items()}
    return decision


def test_before_the_load_is_known_the_clock_stays_at_the_fastest(engine):
    decision = _run(_controller(), engine, 5)
    assert decision.target_clock_mhz == FASTEST
    assert decision.reason is Reason.POOR_INFORMATION


def test_steady_light_work_settles_at_the_cruise_clock(engine):
    decision = _run(_controller(), engine, 800)
    assert decision.target_clock_mhz == decision.cruise_clock_mhz == LOWEST_WORKING
    assert decision.reason is Reason.CRUISE
    assert decision.predicted_power_watts < decision.predicted_default_power_watts
    assert decision.predicted_iteration_seconds > decision.predicted_default_iteration_seconds
    assert decision.binding.slo is Slo.TPOT
    assert decision.binding.slack_seconds > 0


def test_a_tight_limit_raises_the_clock_above_the_cruise_clock(engine):
    loose = _controller(profile=make_profile(default_slos=Slos(ttft_seconds=1.0)))
    _run(loose, engine, 800)
    for number in (50, 51, 52):
        engine.arrive(number, prompt=2000, slos=Slos(ttft_seconds=0.45))
    state = engine.state(Phase.HEARTBEAT, seconds=0.001)
    loose.observe(state, 795)
    decision = loose.decide(state)
    assert decision.reason is Reason.SLACK
    assert decision.target_clock_mhz > decision.cruise_clock_mhz
    assert decision.binding.slo is Slo.TTFT


def test_a_request_that_cannot_be_saved_is_reported_and_does_not_pin_the_clock(engine):
    controller = _controller()
    _run(controller, engine, 800)
    engine.arrive(50, prompt=1000, age=3.0)
    state = engine.state(Phase.HEARTBEAT, seconds=0.001)
    controller.observe(state, 795)
    decision = controller.decide(state)
    assert decision.lost_requests_count == 1
    assert decision.target_clock_mhz == decision.cruise_clock_mhz


def test_a_lost_request_hurries_the_engine_where_the_operator_asks_for_it(engine):
    controller = _controller(hurry_lost=True)
    _run(controller, engine, 800)
    engine.arrive(50, prompt=1000, age=3.0)
    state = engine.state(Phase.HEARTBEAT, seconds=0.001)
    controller.observe(state, 795)
    decision = controller.decide(state)
    assert (decision.target_clock_mhz, decision.reason) == (FASTEST, Reason.INFEASIBLE)


def test_advice_comes_only_to_those_who_asked(engine):
    assert _run(_controller(), engine, 20).advice is None
    asked = _controller(profile=make_profile(wants_advice=True))
    before = _run(asked, Engine(), 20)
    assert before.advice.load_headroom_ratio is None
    steady = Engine()
    settled = _run(asked, steady, 800)
    assert settled.advice.load_headroom_ratio > 0.0
    assert settled.advice.least_gpus_count is None  # no size has a predictor
    steady.arrive(50, prompt=1000, age=3.0)
    steady.arrive(51, prompt=1000)
    state = steady.state(Phase.HEARTBEAT, seconds=0.001)
    asked.observe(state, 795)
    admissions = asked.decide(state).advice.admissions
    assert [(each.request_number, each.verdict) for each in admissions] == [
        (50, Verdict.LOST),
        (51, Verdict.ADMIT),
    ]


def test_an_idle_engine_is_parked_after_the_delay_and_wakes_past_every_dwell(engine):
    controller = _controller(parking_delay_seconds=0.5)
    _run(controller, engine, 800)
    for number in list(engine.running):
        engine.end(number)
    reasons = []
    for _ in range(8):
        state = engine.state(Phase.HEARTBEAT, seconds=0.1)
        controller.observe(state, 795)
        decision = controller.decide(state)
        reasons.append(decision.reason)
    assert reasons[0] is Reason.HELD
    assert decision.reason is Reason.PARKED
    assert decision.target_clock_mhz == 345
    engine.arrive(90, prompt=500)
    state = engine.state(Phase.HEARTBEAT, seconds=0.01)
    controller.observe(state, 345)
    assert controller.decide(state).target_clock_mhz >= LOWEST_WORKING


def test_parking_can_be_switched_off(engine):
    controller = _controller(parking=False)
    for _ in range(20):
        state = engine.state(Phase.HEARTBEAT, seconds=0.1)
        controller.observe(state, 1980)
        decision = controller.decide(state)
    assert decision.target_clock_mhz == FASTEST


@pytest.mark.parametrize(
    "cache",
    [
        KvCache(used_blocks_count=98, total_blocks_count=100),
        KvCache(used_blocks_count=9_800),  # of the 10 000 registered
        KvCache(usage_ratio=0.98),
    ],
)
def test_a_full_kv_cache_means_the_fastest_clock(engine, cache):
    controller = _controller()
    _run(controller, engine, 800)
    decision = _run(controller, engine, 1, kv=cache)
    assert (decision.target_clock_mhz, decision.reason) == (FASTEST, Reason.KV_PRESSURE)


def test_work_that_finds_no_slot_means_the_fastest_clock(engine):
    controller = _controller(profile=make_profile(running_requests_limit=8))
    _run(controller, engine, 800)
    engine.arrive(60)
    decision = _run(controller, engine, 1)
    assert (decision.target_clock_mhz, decision.reason) == (FASTEST, Reason.KV_PRESSURE)


def test_outside_the_training_range_the_clock_is_the_fastest(engine):
    controller = _controller(dataclasses.replace(PREDICTOR, covered=False))
    decision = _run(controller, engine, 800)
    assert (decision.target_clock_mhz, decision.reason) == (FASTEST, Reason.OUT_OF_ENVELOPE)


def test_aggregates_alone_still_save_while_nothing_waits(engine):
    decision = _run(_controller(), engine, 800, progress=False)
    assert decision.target_clock_mhz < FASTEST


def test_aggregates_with_a_queue_and_a_ttft_limit_are_too_little(engine):
    controller = _controller()
    _run(controller, engine, 800, progress=False)
    decision = _run(controller, engine, 1, progress=False, queued=3)
    assert (decision.target_clock_mhz, decision.reason) == (FASTEST, Reason.POOR_INFORMATION)


def test_a_slower_gpu_than_predicted_is_noticed(engine):
    controller = _controller()
    _run(controller, engine, 800, seconds=0.012)
    # The formula expects 4 ms + 8 * (40 us + 40 us) + context at the fastest clock.
    assert controller.latency_bias_ratio > 1.5
    assert controller.coverage_ratio < 0.9


def test_iterations_across_a_clock_change_teach_nothing(engine):
    controller = _controller()
    for number in range(1, 9):
        engine.arrive(number)
        engine.running[number] = (100, 1)
    for step in range(100):
        state = engine.state(seconds=0.05)
        controller.observe(state, 1980 if step % 2 else 1200)
        controller.decide(state)
    assert controller.latency_bias_ratio == 1.0


def test_the_same_states_give_the_same_decisions():
    def decisions():
        engine, controller = Engine(), _controller()
        return [_run(controller, engine, 1) for _ in range(700)]

    assert decisions() == decisions()


def test_the_table_holds_every_clock_and_agrees_with_the_decision(engine):
    engine.arrive(1, prompt=1500)
    state = engine.state(Phase.HEARTBEAT)
    controller = _controller()
    controller.observe(state, 0)
    evaluation = controller.evaluate(state)
    assert [row.clock_mhz for row in evaluation.rows] == PREDICTOR.clocks_mhz.tolist()
    seconds = [row.iteration_seconds for row in evaluation.rows]
    assert seconds == sorted(seconds, reverse=True)
    feasible = [row.feasible for row in evaluation.rows]
    assert feasible == sorted(feasible)  # once feasible, feasible at every higher clock
    assert evaluation.decision.target_clock_mhz == FASTEST


def test_the_ceiling_holds_even_under_guards(engine):
    controller = _controller(ceiling_clock_ratio=0.8)
    decision = _run(controller, engine, 5)
    assert decision.target_clock_mhz == 1575
    full = _run(controller, engine, 1, kv=KvCache(usage_ratio=0.99))
    assert full.target_clock_mhz == 1575


@pytest.mark.parametrize("limit", [0.006, 0.01, 0.02])
def test_the_chosen_clock_keeps_the_mean_gap_in_the_long_run(engine, limit):
    """Closed loop: the engine really runs at the clock that was chosen."""
    profile = make_profile(default_slos=Slos(tpot_seconds=limit))
    controller = _controller(profile=profile)
    clocks = PREDICTOR.clocks_mhz
    seconds, clock, gaps = 0.01, 1980, []
    for number in range(1, 17):
        engine.arrive(number)
        engine.running[number] = (100, 1)
    for _ in range(3000):
        state = engine.state(seconds=seconds)
        controller.observe(state, clock)
        clock = controller.decide(state).target_clock_mhz
        scheduled = state.scheduled
        shape = np.array([[0, 0, 0, 16, scheduled.sum_decode_kv_tokens, 16.0, 0.0]])
        index = int(np.searchsorted(clocks, clock))
        seconds = float(PREDICTOR.predict(shape).latency_seconds[0, index])
        gaps.append(seconds)
        engine.running = {n: (c, g + 1) for n, (c, g) in engine.running.items()}
    if seconds_at_fastest(3000) <= limit:
        assert np.mean(gaps) <= limit


def seconds_at_fastest(generated):
    shape = np.array([[0, 0, 0, 16, 16 * (100 + generated), 16.0, 0.0]])
    return float(PREDICTOR.predict(shape).latency_seconds[0, -1])


def test_the_ceiling_holds_where_no_clock_is_feasible(engine):
    """A TTFT that is savable only without its guard leaves no clock feasible."""
    controller = _controller(ceiling_clock_ratio=0.8, ttft_guard_ratio=0.1)
    _run(controller, engine, 800)
    engine.arrive(50, prompt=1500, slos=Slos(ttft_seconds=0.3))
    state = engine.state(Phase.HEARTBEAT, seconds=0.001)
    controller.observe(state, 795)
    decision = controller.decide(state)
    assert decision.reason is Reason.INFEASIBLE
    assert decision.target_clock_mhz == 1575


@pytest.mark.parametrize(("idle_seconds", "ratio"), [(0.0, 1.3), (0.005, 1.0)])
def test_only_power_of_windows_that_the_iteration_fills_corrects_predictions(
    engine, idle_seconds, ratio
):
    controller = _controller()
    truth = float(PREDICTOR.predict(np.ones((1, 7))).power_watts[0, -1])
    for number in range(1, 9):
        engine.arrive(number)
        engine.running[number] = (100, 1)
    for _ in range(1500):
        engine.now += idle_seconds
        state = engine.state()
        controller.observe(state, FASTEST, 1.3 * truth)
        decision = controller.decide(state)
        engine.running = {n: (c, g + 1) for n, (c, g) in engine.running.items()}
    assert controller.power_bias_ratio == pytest.approx(ratio, rel=0.01)
    assert decision.predicted_default_power_watts == pytest.approx(ratio * truth, rel=0.01)
