from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.operators import IterationWork
from throttle.simulation.plant import Plant

DECODE = IterationWork((), 16, 16 * 700)
PREFILL = IterationWork(((8192, 0),))  # about 0.17 s


class Readings:
    def __init__(self):
        self.rows = []

    def publish(self, sm_clock_mhz, power_watts, energy_joules, gpu_time_seconds):
        self.rows.append((sm_clock_mhz, power_watts, energy_joules, gpu_time_seconds))


def make(plant, seed=1, telemetry=None):
    lock = InProcessLock()
    return SimulatedGpu(plant, lock, telemetry or DiscardedTelemetry(), random.Random(seed)), lock


def test_an_unlocked_gpu_holds_the_maximum_clock_even_when_idle(noiseless_plant):
    gpu, _ = make(noiseless_plant)
    gpu.idle(10.0)
    assert gpu.clock_mhz == 1980
    assert gpu.energy_joules == pytest.approx(10 * noiseless_plant.idle_power_watts(1980))
    assert gpu.idle_energy_joules == gpu.energy_joules


def test_a_lock_takes_effect_in_the_middle_of_an_iteration(noiseless_plant):
    gpu, lock = make(noiseless_plant)
    lock.set_mhz(900)
    duration, _ = gpu.run(PREFILL)
    fast, slow = (noiseless_plant.iteration(PREFILL, clock) for clock in (1980, 900))
    switched = 0.025 + 0.001  # switching delay and decision latency
    rest = (1 - switched / fast.latency_seconds) * slow.latency_seconds
    assert duration == pytest.approx(switched + rest)
    expected = switched * fast.power_watts + rest * slow.power_watts
    assert gpu.energy_joules == pytest.approx(expected)
    assert gpu.clock_mhz == 900
    assert gpu.clock_changes_count == 1


def test_a_lock_reaches_an_idle_gpu_too(noiseless_plant):
    gpu, lock = make(noiseless_plant)
    lock.set_mhz(345)
    gpu.idle(1.0)
    at_full, parked = (noiseless_plant.idle_power_watts(clock) for clock in (1980, 345))
    assert gpu.energy_joules == pytest.approx(0.026 * at_full + 0.974 * parked)
    assert gpu.target_clock_mhz == 345


def test_taking_the_lock_away_restores_the_maximum_clock(noiseless_plant):
    gpu, lock = make(noiseless_plant)
    lock.set_mhz(600)
    gpu.idle(1.0)
    lock.set_mhz(0)
    gpu.idle(2.0)
    assert gpu.clock_mhz == 1980
    assert gpu.clock_changes_count == 2


def test_an_unsupported_lock_snaps_to_the_clock_below(noiseless_plant):
    gpu, lock = make(noiseless_plant)
    lock.set_mhz(1234)
    gpu.idle(1.0)
    assert gpu.clock_mhz == 1230


def test_changes_take_effect_in_the_order_in_which_they_were_asked(plant):
    gpu, lock = make(plant)
    for clock in (600, 1500, 900, 1200):
        lock.set_mhz(clock)
        gpu.idle(gpu.time_seconds + 0.001)
    gpu.idle(gpu.time_seconds + 5.0)
    assert gpu.clock_mhz == 1200


@given(st.lists(st.tuples(st.sampled_from((0, 345, 900, 1500)), st.booleans()), max_size=25))
def test_energy_equals_the_integral_of_power(actions):
    plant = Plant.load(
        "h200-qwen3-30b-a3b",
        {"behavior.latency_noise_ratio": 0.0, "behavior.chip_power_spread_ratio": 0.0},
    )
    readings = Readings()
    gpu, lock = make(plant, telemetry=readings)
    integral = 0.0
    spent = gpu._spend

    def spy(until_seconds, power_watts):
        nonlocal integral
        assert until_seconds >= gpu.time_seconds
        integral += (until_seconds - gpu.time_seconds) * power_watts
        spent(until_seconds, power_watts)

    gpu._spend = spy
    for clock, busy in actions:
        lock.set_mhz(clock)
        if busy:
            gpu.run(PREFILL)
        else:
            gpu.idle(gpu.time_seconds + 0.03)
    assert gpu.energy_joules == pytest.approx(integral)
    times = [row[3] for row in readings.rows]
    energies = [row[2] for row in readings.rows]
    assert times == sorted(times)
    assert energies == sorted(energies)
    for _, watts, _, _ in readings.rows:
        assert 0 < watts <= 700


def test_the_power_sensor_is_a_moving_average_of_about_a_second(noiseless_plant):
    readings = Readings()
    gpu, _ = make(noiseless_plant, telemetry=readings)
    while gpu.time_seconds < 3.0:
        gpu.run(DECODE)
    busy = noiseless_plant.iteration(DECODE, 1980).power_watts
    idle = noiseless_plant.idle_power_watts(1980)
    assert readings.rows[-1][1] == pytest.approx(busy, rel=1e-6)
    for _ in range(5):
        gpu.idle(gpu.time_seconds + 0.1)
    assert idle < readings.rows[-1][1] < busy
    for _ in range(10):
        gpu.idle(gpu.time_seconds + 0.1)
    assert readings.rows[-1][1] == pytest.approx(idle, rel=0.05)


def test_switching_delays_have_the_stated_median_and_tail(plant):
    gpu, lock = make(plant)
    delays = []
    for index in range(2000):
        lock.set_mhz(900 if index % 2 else 1500)
        asked = gpu.time_seconds
        gpu._poll_lock()
        delays.append(gpu._pending[-1][0] - asked - 0.001)
        gpu.idle(asked + 10.0)
    delays.sort()
    assert delays[1000] == pytest.approx(0.025, rel=0.1)
    assert delays[1980] == pytest.approx(0.150, rel=0.25)


def test_noise_has_the_stated_spread_and_is_the_same_for_every_policy(plant):
    durations = []
    for clock in (0, 1200):
        gpu, lock = make(plant, seed=5)
        lock.set_mhz(clock)
        gpu.idle(5.0)
        base = gpu.plant.iteration(DECODE, clock or 1980).latency_seconds
        durations.append([gpu.run(DECODE).duration_seconds / base for _ in range(500)])
    assert durations[0] == pytest.approx(durations[1])
    mean = sum(durations[0]) / 500
    spread = (sum((value - mean) ** 2 for value in durations[0]) / 500) ** 0.5
    assert spread == pytest.approx(0.015, rel=0.15)
