from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.control.scenes import Engine, make_profile
from throttle.control.scoreboard import Column
from throttle.control.state import IterationState, Phase, ScheduledRequests, Slos
from throttle.errors import NotFoundError
from throttle.simulation.engine import Fidelity
from throttle.simulation.experiment import play
from throttle.simulation.policies.catalogue import (
    ABLATION_NAMES,
    POLICY_NAMES,
    SEARCHED,
    fixed_policy,
    is_policy_name,
    make_policy,
    needs_predictor,
)
from throttle.simulation.policies.disturbed import BiasedPredictor, Interrupted, Outages
from throttle.simulation.policies.ecofreq import EcoFreq, EcoFreqKnobs
from throttle.simulation.policies.greedy import Greedy, GreedyKnobs
from throttle.simulation.policies.mpc import Mpc, MpcKnobs
from throttle.simulation.policies.outlook import EngineView
from throttle.simulation.policies.policy import PolicyInputs, locking
from throttle.simulation.policies.reactive import Aimd, AimdKnobs, Ondemand, OndemandKnobs
from throttle.simulation.policies.slack_test import SlackTest
from throttle.simulation.policies.static import FixedClock
from throttle.simulation.policies.throttllem import Throttllem, ThrottllemKnobs
from throttle.simulation.workload import load_trace
from throttle.testing import FormulaPredictor

PREDICTED = (
    *(name for name in POLICY_NAMES if name not in {"max", *SEARCHED}),
    *ABLATION_NAMES,
)
FASTEST = 1980


class Readings:
    clock_mhz = FASTEST
    energy_joules = 0.0


@pytest.fixture
def inputs():
    return PolicyInputs(make_profile(), FormulaPredictor(), Readings())


@pytest.fixture(scope="module")
def minute():
    return load_trace("azure2023_conv_10min").window(60.0, 90.0).requests


def run(bench, plant, requests, name, fidelity=Fidelity.FULL):
    scene = bench(plant, requests, fidelity=fidelity)
    profile = scene.engine.profile("engine", ("GPU-0",), Slos(ttft_seconds=1.0, tpot_seconds=0.05))
    inputs = PolicyInputs(profile, FormulaPredictor(), scene.gpu)
    policy = make_policy(name, inputs)
    return play(scene.engine, scene.gpu, locking(policy, scene.lock), rest_seconds=1.0)


@pytest.mark.parametrize("name", PREDICTED)
@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_every_policy_serves_everything_at_every_fidelity(bench, plant, minute, name, fidelity):
    result = run(bench, plant, minute, name, fidelity)
    assert len(result.outcomes) == len(minute)


@pytest.mark.parametrize("name", PREDICTED)
def test_every_policy_is_deterministic(bench, plant, minute, name):
    first, second = (run(bench, plant, minute[:40], name) for _ in range(2))
    assert first == second


def test_names_that_are_no_policies_are_refused(inputs):
    assert all(is_policy_name(name) for name in (*POLICY_NAMES, "fixed-1200"))
    assert not is_policy_name("fixed-fast")
    assert not needs_predictor("fixed-900")
    with pytest.raises(NotFoundError, match="no policy 'fastest'"):
        make_policy("fastest", inputs)
    with pytest.raises(NotFoundError, match="fixed-<MHz>"):
        fixed_policy("fixed-")
    assert fixed_policy("fixed-900").clock_mhz(IterationState(1, Phase.HEARTBEAT, 0.0)) == 900


# -- what the engine will do next ------------------------------------------------------------------


def test_the_outlook_is_what_the_engine_does_next(bench, plant, minute):
    scene = bench(plant, minute)
    view = EngineView(scene.engine.profile("e", ("GPU-0",), Slos()))
    expected = None
    compared = mixed = 0
    while (state := scene.engine.step()) is not None:
        if expected is not None and state.phase is Phase.COMPLETED:
            work = state.scheduled
            assert expected[1] == work.sum_prefill_tokens
            assert expected[3] == work.num_decode_requests
            assert expected[4] == pytest.approx(work.sum_decode_kv_tokens, abs=64)
            compared += 1
            mixed += bool(work.sum_prefill_tokens)
        view.observe(state)
        outlook = view.outlook(state)
        expected = None if outlook.idle else outlook.shapes[0]
    assert compared > 500
    assert mixed > 20


def test_long_prompts_are_planned_in_chunks(inputs):
    engine = Engine()
    engine.arrive(1, prompt=5000)
    state = engine.state()
    view = EngineView(inputs.profile)
    view.observe(state)
    outlook = view.outlook(state)
    assert outlook.shapes[:, 1].tolist() == [2048, 2048, 904]
    assert outlook.prompts_at.tolist() == [3]


# -- slack -----------------------------------------------------------------------------------------


def decode_row(generated, first_token, tpot=0.05):
    row = np.full(len(Column), np.inf)
    row[Column.GENERATED], row[Column.FIRST_GENERATED] = generated, 1
    row[Column.FIRST_TOKEN], row[Column.TPOT] = first_token, tpot
    return row


def test_banked_slack_pays_for_slower_tokens():
    test = SlackTest(tpot_guard_ratio=1.0, lookahead_tokens=20)
    ahead = np.array([decode_row(101, first_token=7.0)])  # 100 gaps in 3 s: 2 s banked
    assert test.gap_seconds(ahead, 10.0, 0.01) == pytest.approx((0.05 * 120 - 3.0) / 20)


def test_requests_that_cannot_be_saved_do_not_bind():
    test = SlackTest()
    rows = np.array([decode_row(101, first_token=-50.0), decode_row(11, first_token=9.5)])
    assert test.gap_seconds(rows[:1], 10.0, 0.01) == np.inf
    assert test.gap_seconds(rows, 10.0, 0.01) < 0.1


# -- each rule -------------------------------------------------------------------------------------


def busy(now, duration=0.01, rows=8):
    scheduled = ScheduledRequests(num_decode_requests=rows, sum_decode_kv_tokens=rows * 500)
    return IterationState(
        int(now * 1e4) + 1,
        Phase.COMPLETED,
        now,
        iteration_duration_seconds=duration,
        scheduled=scheduled,
    )


def test_ondemand_lowers_only_an_engine_that_rests(inputs):
    policy = Ondemand(inputs, OndemandKnobs())
    assert policy.clock_mhz(IterationState(1, Phase.HEARTBEAT, 0.2)) == 345
    clocks = [policy.clock_mhz(busy(0.2 + 0.01 * step)) for step in range(1, 30)]
    assert clocks[-1] == FASTEST


def test_aimd_approaches_the_clock_at_which_the_gap_is_on_target(inputs):
    policy = Aimd(inputs, AimdKnobs(target_ratio=0.9))
    clock, now = FASTEST, 0.0
    for _ in range(4000):
        duration = 0.03 * FASTEST / clock  # 45 ms at 1320 MHz
        now += duration
        clock = policy.clock_mhz(busy(now, duration))
    assert clock == pytest.approx(1320, abs=30)


def test_aimd_rises_at_once_when_a_request_waits_long(inputs):
    policy = Aimd(inputs, AimdKnobs(wait_ratio=0.4))
    engine = Engine()
    engine.now = 1.0
    engine.arrive(1, age=0.1)
    policy.clock_mhz(engine.state())
    engine.now = 1.35
    assert policy.clock_mhz(engine.state()) == FASTEST


def running(count, prompt=200):
    engine = Engine()
    for number in range(1, count + 1):
        engine.arrive(number, prompt=prompt)
        engine.running[number] = (prompt, 1)
    return engine


def test_lowest_feasible_rules_go_to_their_floor_when_nothing_binds(inputs):
    loose = dataclasses.replace(
        inputs, profile=make_profile(default_slos=Slos(ttft_seconds=100.0, tpot_seconds=10.0))
    )
    for policy in (
        EcoFreq(loose, EcoFreqKnobs(floor_ratio=0.5)),
        Throttllem(loose, ThrottllemKnobs(floor_ratio=0.5)),
        Mpc(loose, MpcKnobs(floor_ratio=0.5)),
    ):
        assert policy.clock_mhz(running(4).state()) == 990, policy.name


def test_limits_that_nothing_keeps_mean_full_speed(inputs):
    tight = dataclasses.replace(
        inputs, profile=make_profile(default_slos=Slos(ttft_seconds=1.0, tpot_seconds=1e-4))
    )
    for policy in (EcoFreq(tight, EcoFreqKnobs()), Throttllem(tight, ThrottllemKnobs())):
        assert policy.clock_mhz(running(4).state()) == FASTEST, policy.name


def test_greedy_takes_the_clock_of_least_energy_and_a_price_keeps_it(inputs):
    state = running(8).state()
    chosen = Greedy("greedy", inputs, GreedyKnobs()).clock_mhz(state)
    view = EngineView(inputs.profile)
    view.observe(state)
    prediction = inputs.predictor.predict(view.outlook(state).shapes)
    energy = (prediction.power_watts * prediction.latency_seconds)[0]
    assert chosen == inputs.predictor.clocks_mhz[np.argmin(energy)]
    dear = Greedy("switching-aware", inputs, GreedyKnobs(change_joules=1e6))
    assert dear.clock_mhz(state) == FASTEST


# -- faults ----------------------------------------------------------------------------------------


def test_a_biased_predictor_scales_durations_and_nothing_else():
    fair = FormulaPredictor()
    biased = BiasedPredictor(fair, 0.85)
    shapes = np.array([[0.0, 0.0, 0.0, 8.0, 4000.0, 8.0, 0.0]])
    one, other = fair.predict(shapes), biased.predict(shapes)
    assert other.latency_seconds == pytest.approx(0.85 * one.latency_seconds)
    assert other.latency_upper_seconds == pytest.approx(0.85 * one.latency_upper_seconds)
    assert (other.power_watts == one.power_watts).all()


def test_lost_states_lead_to_default_clocks_within_a_tenth_of_a_second():
    policy = Interrupted(FixedClock(900), Outages(period_seconds=10.0, outage_seconds=1.0))
    clocks = {
        now: policy.clock_mhz(IterationState(1, Phase.HEARTBEAT, now))
        for now in (9.0, 9.99, 10.01, 10.1, 10.9, 11.01)
    }
    assert list(clocks.values()) == [900, 900, 900, 0, 0, 900]
