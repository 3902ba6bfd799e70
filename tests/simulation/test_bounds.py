from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from throttle.errors import InvalidInputError
from throttle.simulation.bounds.certificate import Served, least_energy_joules
from throttle.simulation.bounds.exact import TinyCase, optimum
from throttle.simulation.bounds.schedule import Played, ScheduledClocks, improve
from throttle.simulation.engine import SimulatedEngine
from throttle.simulation.experiment import play
from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.plant import Plant
from throttle.simulation.requests import Request
from throttle.simulation.workload import OpenLoop

AT_ONCE = {
    "behavior.latency_noise_ratio": 0.0,
    "behavior.chip_power_spread_ratio": 0.0,
    "behavior.switch_median_seconds": 1e-9,
    "behavior.switch_p99_seconds": 1e-9,
    "behavior.decision_latency_seconds": 0.0,
}
CLOCKS = (600, 1200, 1980)
HORIZON = 2.0


@pytest.fixture(scope="module")
def exact_plant():
    return Plant.load("h200-qwen3-30b-a3b", AT_ONCE)


def tiny(requests, *, clocks=CLOCKS, missed=0, tpot=0.05, bucket=0.0):
    return TinyCase(requests, clocks, 1.0, tpot, missed, HORIZON, bucket)


class _Listed:
    """Plays one clock after another, one per iteration; idles at the lowest."""

    name = "listed"

    def __init__(self, plant, clocks):
        self.lowest, self.clocks, self.index = plant.clocks_mhz[0], clocks, 0

    def clock(self, state):
        completed = state.iteration_duration_seconds is not None
        self.index += completed
        if not state.queued.num_prefill_requests and not state.progress.request_numbers:
            return self.lowest
        return self.clocks[min(self.index, len(self.clocks) - 1)]


def played(plant, requests, clocks):
    lock = InProcessLock()
    gpu = SimulatedGpu(plant, lock, DiscardedTelemetry(), random.Random(1))
    engine = SimulatedEngine(gpu, OpenLoop(requests))
    policy = _Listed(plant, clocks)
    result = play(engine, gpu, lambda state: lock.set_mhz(policy.clock(state)), rest_seconds=0.01)
    idle = (HORIZON - result.horizon_seconds) * plant.idle_power_watts(plant.clocks_mhz[0])
    return result, result.energy_joules + idle * plant.gpus_count


def within(result, missed, ttft=1.0, tpot=0.05):
    return (
        result.arrived_count - round(result.attainment_ratio(ttft, tpot) * result.arrived_count)
        <= missed
    )


@pytest.mark.parametrize("clock", CLOCKS)
def test_with_one_clock_the_optimum_is_what_the_engine_does(exact_plant, clock):
    requests = [Request(1, 0.0, 300, 5), Request(2, 0.02, 9000, 3), Request(3, 0.3, 50, 1)]
    found = optimum(exact_plant, tiny(requests, clocks=(clock,), tpot=1.0))
    result, energy = played(exact_plant, requests, found.clocks_mhz)
    assert result.iterations_count == len(found.clocks_mhz)
    assert found.energy_joules == pytest.approx(energy, rel=2e-3)


@pytest.mark.parametrize("tpot", [0.014, 0.02, 0.05])
def test_the_optimum_is_the_best_of_all_sequences_of_clocks(exact_plant, tpot):
    requests = [Request(1, 0.0, 700, 4), Request(2, 0.03, 400, 3)]
    energies = []
    for clocks in itertools.product(CLOCKS, repeat=6):
        result, energy = played(exact_plant, requests, clocks)
        if result.iterations_count <= 6 and within(result, 0, tpot=tpot):
            energies.append(energy)
    found = optimum(exact_plant, tiny(requests, tpot=tpot))
    assert found.energy_joules == pytest.approx(min(energies), rel=2e-3)


def test_limits_that_bind_cost_energy(exact_plant):
    requests = [Request(1, 0.0, 500, 8), Request(2, 0.05, 500, 8)]
    loose, tight = (
        optimum(exact_plant, tiny(requests, tpot=tpot)).energy_joules for tpot in (0.05, 0.0105)
    )
    assert tight > loose
    free = optimum(exact_plant, tiny(requests, tpot=0.0105, missed=2)).energy_joules
    assert free == pytest.approx(loose, rel=1e-3)


def test_limits_that_no_clock_keeps_are_refused(exact_plant):
    with pytest.raises(InvalidInputError, match="missed_limit"):
        optimum(exact_plant, tiny([Request(1, 0.0, 500, 8)], tpot=0.0001))


def test_buckets_of_time_change_little(exact_plant):
    requests = [Request(number, 0.03 * number, 300, 6) for number in range(1, 5)]
    exact = optimum(exact_plant, tiny(requests, clocks=(600, 1980), tpot=0.025))
    rough = optimum(exact_plant, tiny(requests, clocks=(600, 1980), tpot=0.025, bucket=1e-3))
    assert rough.energy_joules == pytest.approx(exact.energy_joules, rel=5e-3)


class _TinyPlayer:
    def __init__(self, plant, requests):
        self.plant, self.requests = plant, requests

    def play(self, clock_indices):
        lock = InProcessLock()
        gpu = SimulatedGpu(self.plant, lock, DiscardedTelemetry(), random.Random(1))
        engine = SimulatedEngine(gpu, OpenLoop(self.requests))
        policy = ScheduledClocks(CLOCKS, clock_indices)
        decide = lambda state: lock.set_mhz(policy.clock_mhz(state))  # noqa: E731
        result = play(engine, gpu, decide, rest_seconds=0.01)
        idle = (HORIZON - result.horizon_seconds) * self.plant.idle_power_watts(345)
        total = result.energy_joules + idle * self.plant.gpus_count
        slots = np.zeros(len(clock_indices))
        slots[0] = total
        missed = [
            item.ttft_seconds > 1.0 or (item.tpot_seconds or 0.0) > 0.05 for item in result.outcomes
        ]
        arrivals = np.array([item.arrival_seconds for item in result.outcomes])
        return Played(slots, arrivals, arrivals + 0.1, np.array(missed))


requests_strategy = st.lists(
    st.tuples(st.floats(0.0, 0.2), st.integers(16, 1500), st.integers(1, 6)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=6, deadline=None)
@given(rows=requests_strategy)
def test_certificate_below_optimum_below_schedule(rows):
    plant = Plant.load("h200-qwen3-30b-a3b", AT_ONCE)
    requests = [
        Request(number, arrival, prompt, output)
        for number, (arrival, prompt, output) in enumerate(sorted(rows), start=1)
    ]
    case = tiny(requests, bucket=1e-4)
    least = optimum(plant, case).energy_joules
    served = Served.of(requests, 0, 0.05)
    certificate = least_energy_joules(plant, served, HORIZON, clocks_mhz=CLOCKS)
    assert certificate <= least * (1 + 1e-6)
    _, schedule = improve(np.array([2]), _TinyPlayer(plant, requests), 2, 0, 20)
    assert least <= schedule.energy_joules * (1 + 2e-3)


def test_the_certificate_leaves_out_what_may_be_missed(exact_plant):
    requests = [Request(number, 0.0, 100 * number, 10 * number) for number in range(1, 11)]
    all_of_it = Served.of(requests, 0, 0.05)
    less = Served.of(requests, 2, 0.05)
    assert less.prompt_tokens == 100 * sum(range(1, 9))
    assert less.output_tokens == sum(10 * number - 1 for number in range(1, 9))
    assert less.context_tokens < all_of_it.context_tokens


def test_an_empty_trace_costs_idle_power(exact_plant):
    served = Served(0.0, 0.0, 0.0, np.inf, 1)
    expected = 3.0 * exact_plant.idle_power_watts(exact_plant.clocks_mhz[0])
    assert least_energy_joules(exact_plant, served, 3.0) == pytest.approx(expected)


class _ConvexPlayer:
    """Energy falls with the clock of each slot; slots below their floor miss a request."""

    def __init__(self, floors):
        self.floors = np.array(floors)
        self.plays = 0

    def play(self, clock_indices):
        self.plays += 1
        arrivals = np.arange(len(self.floors)) * 2.0 + 0.5
        missed = clock_indices < self.floors
        return Played(10.0 + 1.0 * clock_indices**2, arrivals, arrivals + 1.0, missed)


def test_the_descent_finds_every_slots_floor():
    generator = np.random.default_rng(3)
    floors = generator.integers(20, 60, size=40)
    player = _ConvexPlayer(floors)
    best, found = improve(np.full(40, 80), player, 100, 0, 400)
    assert player.plays <= 400
    assert (best >= floors).all()
    assert found.energy_joules == _ConvexPlayer(floors).play(best).energy_joules
    least = _ConvexPlayer(floors).play(floors).energy_joules
    assert found.energy_joules <= 1.05 * least


def test_a_start_that_misses_is_repaired():
    player = _ConvexPlayer([50] * 10)
    best, found = improve(np.full(10, 44), player, 100, 0, 60)
    assert not found.missed.any()
    assert (best >= 50).all()


def test_misses_that_are_allowed_are_used():
    player = _ConvexPlayer([50] * 20)
    _, strict = improve(np.full(20, 50), player, 100, 0, 200)
    _, loose = improve(np.full(20, 50), player, 100, 4, 200)
    assert loose.energy_joules < strict.energy_joules
    assert loose.missed.sum() <= 4
