"""What the controller serves, against what then happens on plants that its bundle has not seen."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest

from predictors.predictor import load_predictor
from throttle.control.controller import Controller
from throttle.control.settings import ControlSettings
from throttle.control.state import Phase, Slos
from throttle.simulation.engine import SimulatedEngine
from throttle.simulation.experiment import play
from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.plant import Plant, draw_plant
from throttle.simulation.workload import Lengths, OpenLoop, load_trace, poisson

MODELS = Path(__file__).resolve().parents[2] / "models"
PLANT, BUNDLE = "h200-qwen3-30b-a3b", "h200-sxm__qwen3-30b-a3b__tp1ep1"
SLOWDOWN = 1.15


class SlowingPlant:
    """A plant of which every iteration takes longer once `ratio` says so."""

    def __init__(self, plant):
        self._plant = plant
        self.ratio = 1.0

    def __getattr__(self, name):
        return getattr(self._plant, name)

    def iteration(self, work, clock_mhz):
        cost = self._plant.iteration(work, clock_mhz)
        return replace(cost, latency_seconds=cost.latency_seconds * self.ratio)


@dataclass(frozen=True, slots=True)
class Served:
    """Iterations that ran at the clock decided; arrays of one length, power of one GPU."""

    time_seconds: np.ndarray
    latency_errors: np.ndarray
    power_errors: np.ndarray
    covered: np.ndarray

    def between(self, start, stop):
        chosen = (self.time_seconds >= start) & (self.time_seconds < stop)
        assert np.count_nonzero(chosen) > 100
        return Served(*(getattr(self, each.name)[chosen] for each in fields(self)))


def serve(plant, seconds, *, slow_from=np.inf, bundle=BUNDLE, tell_power=True):
    """Play a trace under the controller, and compare each decision with the iteration after it."""
    lock = InProcessLock()
    gpu = SimulatedGpu(plant, lock, DiscardedTelemetry(), random.Random(5))
    gpu.plant = slowing = SlowingPlant(gpu.plant)
    # stretched, so that ten minutes of trace last; as many requests a second as the plant carries
    trace = load_trace("azure2023_conv_10min").compressed(0.6).window(0.0, seconds)
    engine = SimulatedEngine(gpu, OpenLoop(trace.requests))
    gpus = gpu.plant.gpus_count
    uuids = tuple(f"GPU-{index}" for index in range(gpus))
    profile = engine.profile("served", uuids, Slos(ttft_seconds=1.0, tpot_seconds=0.05))
    controller = Controller(profile, load_predictor(MODELS / bundle), ControlSettings())
    rows, before = [], None

    def decide(state):
        nonlocal before
        now = state.engine_time_seconds
        slowing.ratio = SLOWDOWN if now >= slow_from else 1.0
        watts = None
        if before is not None:
            decision, clock, joules, time = before
            watts = (gpu.energy_joules - joules) / max(gpu.time_seconds - time, 1e-9)
            steady = clock == gpu.clock_mhz == decision.target_clock_mhz
            duration = state.iteration_duration_seconds
            if steady and state.phase is Phase.COMPLETED and decision.predicted_iteration_seconds:
                rows.append(
                    (
                        now,
                        abs(decision.predicted_iteration_seconds / duration - 1.0),
                        abs(decision.predicted_power_watts / gpus / watts - 1.0),
                        duration <= decision.predicted_iteration_upper_seconds,
                    )
                )
        controller.observe(state, gpu.clock_mhz, watts if tell_power else None)
        decision = controller.decide(state)
        lock.set_mhz(decision.target_clock_mhz)
        before = (decision, gpu.clock_mhz, gpu.energy_joules, gpu.time_seconds)

    play(engine, gpu, decide)
    return Served(*np.array(rows).T)


def test_predictions_served_on_an_unseen_plant_are_within_4_percent_after_a_minute():
    served = serve(draw_plant(PLANT, 41), 100.0)
    # the voltage of this draw is another than the bundle's: power is far off without correction
    uncorrected = serve(draw_plant(PLANT, 41), 30.0, tell_power=False)
    assert uncorrected.between(10.0, 30.0).power_errors.mean() > 0.1
    after = served.between(60.0, 100.0)
    assert after.latency_errors.mean() < 0.04
    assert after.power_errors.mean() < 0.04
    assert after.covered.mean() > 0.98


def test_the_bound_holds_again_two_minutes_after_the_plant_slows_by_15_percent():
    served = serve(Plant.load(PLANT), 180.0, slow_from=20.0)
    assert served.between(10.0, 20.0).latency_errors.mean() < 0.02
    after = served.between(20.0 + 120.0, 180.0)
    assert after.covered.mean() == pytest.approx(0.99, abs=0.01)
    assert after.latency_errors.mean() < 0.04


def average_watts(requests_per_second, *, throttled):
    """After a minute: power drawn, and predicted for the clocks decided on and for default ones."""
    lock = InProcessLock()
    gpu = SimulatedGpu(Plant.load(PLANT), lock, DiscardedTelemetry(), random.Random(5))
    lengths = Lengths(prompt_tokens=(100, 3000), output_tokens=(20, 500))
    requests = poisson(requests_per_second, 150.0, lengths, random.Random(6))
    engine = SimulatedEngine(gpu, OpenLoop(requests))
    profile = engine.profile("saving", ("GPU-0",), Slos(ttft_seconds=1.0, tpot_seconds=0.05))
    controller = Controller(profile, load_predictor(MODELS / BUNDLE), ControlSettings())
    rows, decision, begun = [], None, (0.0, 0.0)

    def decide(state):
        nonlocal decision, begun
        now, joules = state.engine_time_seconds, gpu.energy_joules
        if now < 60.0:
            begun = (now, joules)
        else:
            rows.append(
                (now, joules, decision.long_run_power_watts, decision.default_long_run_power_watts)
            )
        controller.observe(state, gpu.clock_mhz)
        decision = controller.decide(state)
        if throttled:
            lock.set_mhz(decision.target_clock_mhz)

    play(engine, gpu, decide)
    seconds, joules, decided, default = np.array(rows).T
    passed = np.diff(seconds, prepend=begun[0])
    whole = passed.sum()
    return (joules[-1] - begun[1]) / whole, decided @ passed / whole, default @ passed / whole


@pytest.mark.parametrize("requests_per_second", [0.5, 3.0])
def test_the_saving_told_is_that_of_playing_the_same_requests_at_default_clocks(
    requests_per_second,
):
    drawn, decided, default = average_watts(requests_per_second, throttled=True)
    unthrottled, *_ = average_watts(requests_per_second, throttled=False)
    assert 1.0 - decided / default == pytest.approx(1.0 - drawn / unthrottled, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [41, 42, 43])
@pytest.mark.parametrize(
    ("plant", "bundle"),
    [
        (PLANT, BUNDLE),
        ("h100-mixtral-8x7b-tp2", "h100-sxm__mixtral-8x7b__tp2ep1"),
        ("h200-deepseek-v3-ep8", "h200-sxm__deepseek-v3__tp1ep8"),
    ],
)
def test_after_ten_minutes_predictions_on_unseen_plants_are_within_4_percent(plant, bundle, draw):
    served = serve(draw_plant(plant, draw), 840.0, bundle=bundle)
    after = served.between(600.0, 840.0)
    assert after.latency_errors.mean() < 0.04
    assert after.power_errors.mean() < 0.04
    assert after.covered.mean() == pytest.approx(0.99, abs=0.01)
