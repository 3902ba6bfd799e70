"""States to decide on: what a simulated engine says while it serves about so many requests.

No two are alike, limits bind, and prompts come in between, so that neither caches nor branch
predictors see the same input twice.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from predictors.bundle import find_bundle
from predictors.predictor import load_predictor
from throttle.control.controller import Controller
from throttle.control.settings import ControlSettings
from throttle.control.state import Slos
from throttle.simulation.engine import SimulatedEngine
from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.plant import Plant
from throttle.simulation.workload import ClosedLoop, Lengths

if TYPE_CHECKING:
    from pathlib import Path

    from predictors.predictor import BundlePredictor
    from throttle.control.state import EngineProfile, IterationState

PLANT = "h200-qwen3-30b-a3b"


@dataclass(frozen=True, slots=True)
class _Serving:
    """What is served: lengths such that prompts come every few iterations, limits that bind."""

    lengths: Lengths
    slos: Slos


#: Requests in the engine -> what they are like; in between, the nearest counts.
_SERVING = {
    8: _Serving(Lengths((100, 3000), (20, 200)), Slos(ttft_seconds=1.0, tpot_seconds=0.015)),
    64: _Serving(Lengths((100, 3000), (20, 800)), Slos(ttft_seconds=1.0, tpot_seconds=0.03)),
    512: _Serving(Lengths((100, 1000), (128, 2048)), Slos(ttft_seconds=4.0, tpot_seconds=0.06)),
}


@dataclass(frozen=True, slots=True)
class Recorded:
    """States of one engine, in order, with what was read of its GPU.

    Attributes:
        profile: The engine.
        states: What it said.
        clocks_mhz: Clock of its GPU as each came.
        power_watts: Mean power since the one before.
        settling_count: How many of the first serve to make a controller know the load.
    """

    profile: EngineProfile
    states: tuple[IterationState, ...]
    clocks_mhz: tuple[int, ...]
    power_watts: tuple[float | None, ...]
    settling_count: int


@functools.lru_cache(maxsize=2)
def shipped_predictor(bundles: Path) -> BundlePredictor:
    """The shipped bundle of the benchmark's engine, warm."""
    plant = Plant.load(PLANT)
    parameters = plant.parameters
    return load_predictor(find_bundle(bundles, parameters.gpu.name, parameters.model.name))


def record(
    requests_count: int, samples_count: int, predictor: BundlePredictor, seed: int = 1
) -> Recorded:
    """Play an engine that holds about so many requests, throttled, and keep what it says.

    Args:
        requests_count: Requests in the engine.
        samples_count: States wanted beyond those that settle the load.
        predictor: Of the engine's bundle.
        seed: Of requests, chip and noise.
    """
    limits = {"engine.running_requests_limit": max(requests_count, 2)}
    lock = InProcessLock()
    generator = random.Random(seed)  # noqa: S311 - simulated
    gpu = SimulatedGpu(Plant.load(PLANT, limits), lock, DiscardedTelemetry(), generator)
    serving = _SERVING[min(_SERVING, key=lambda count: abs(count - requests_count))]
    source = ClosedLoop(requests_count, float("inf"), serving.lengths, generator)
    engine = SimulatedEngine(gpu, source)
    profile = engine.profile("bench", ("GPU-simulated-0",), serving.slos)
    settings = ControlSettings()
    controller = Controller(profile, predictor, settings)
    states: list[IterationState] = []
    clocks: list[int] = []
    watts: list[float | None] = []
    settling_seconds = 2.0 * settings.load_settling_seconds
    settling, seen = 0, (0.0, 0.0)
    for state in engine.run():
        now, joules = state.engine_time_seconds, gpu.energy_joules
        power = (joules - seen[1]) / (now - seen[0]) if now > seen[0] else None
        seen = (now, joules)
        controller.observe(state, gpu.clock_mhz, power)
        states.append(state)
        clocks.append(gpu.clock_mhz)
        watts.append(power)
        lock.set_mhz(controller.decide(state).target_clock_mhz)
        settling += now < settling_seconds
        if len(states) >= settling + samples_count:
            break
    return Recorded(profile, tuple(states), tuple(clocks), tuple(watts), settling)
