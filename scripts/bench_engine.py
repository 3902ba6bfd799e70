"""How fast the simulated engine and plant are: medians on this machine, in one process.

Two figures: the engine alone (no controller, full states) on the shipped Azure trace, compressed
until the mean batch is about the one asked for, as a ratio to real time; and the cost of one
iteration, over a spread of batches, prompts and clocks.

Use: python scripts/bench_engine.py [--plant NAME] [--batch 64] [--runs 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from throttle.control.state import Phase
from throttle.simulation.engine import SimulatedEngine
from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.operators import IterationWork
from throttle.simulation.plant import Plant
from throttle.simulation.workload import OpenLoop, Trace, load_trace

_TRACE = "azure2023_conv_10min"
_SEARCH_STEPS = 9
_SHAPES_COUNT = 2000


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One play of the trace.

    Attributes:
        simulated_seconds: Simulated time that passed.
        wall_seconds: Time that it took here.
        iterations_count: Iterations computed.
        mean_batch: Running requests, mean over busy simulated time.
    """

    simulated_seconds: float
    wall_seconds: float
    iterations_count: int
    mean_batch: float


def play(plant: Plant, trace: Trace, seed: int) -> EngineRun:
    """Serve a trace and time it; no controller."""
    gpu = SimulatedGpu(plant, InProcessLock(), DiscardedTelemetry(), random.Random(seed))  # noqa: S311 - simulated
    engine = SimulatedEngine(gpu, OpenLoop(trace.requests))
    busy = weighted = 0.0
    began = time.perf_counter()
    for state in engine.run():
        if state.phase is Phase.COMPLETED:
            duration = state.iteration_duration_seconds or 0.0
            busy += duration
            weighted += duration * engine.running_count
    wall = time.perf_counter() - began
    return EngineRun(gpu.time_seconds, wall, engine.iterations_count, weighted / max(busy, 1e-9))


def compression_for(plant: Plant, trace: Trace, batch: float) -> float:
    """How many times faster the trace must arrive for a mean batch of about so many requests."""
    low, high = 0.25, 16.0
    for _ in range(_SEARCH_STEPS):
        ratio = math.sqrt(low * high)
        if play(plant, trace.compressed(ratio), seed=0).mean_batch < batch:
            low = ratio
        else:
            high = ratio
    return math.sqrt(low * high)


def iteration_seconds(plant: Plant) -> list[float]:
    """Cost of one iteration each, over decodes, prompts and mixtures at many clocks."""
    generator = random.Random(1)  # noqa: S311 - simulated
    works = []
    for index in range(_SHAPES_COUNT):
        decodes = generator.randint(1, 256) if index % 3 else 0
        chunks = [
            (generator.randint(16, 2048), generator.choice([0, 0, 4096]))
            for _ in range(generator.randint(1, 3) if index % 3 != 1 else 0)
        ]
        work = IterationWork(tuple(chunks), decodes, decodes * generator.randint(100, 4000))
        works.append((work, generator.choice(plant.clocks_mhz)))
    for work, clock in works[:100]:
        plant.iteration(work, clock)
    taken = []
    for work, clock in works:
        began = time.perf_counter()
        plant.iteration(work, clock)
        taken.append(time.perf_counter() - began)
    return taken


def main() -> None:
    """Run both and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plant", default="h200-qwen3-30b-a3b", help="shipped plant or TOML file")
    parser.add_argument("--batch", type=float, default=64.0, help="mean batch to reach")
    parser.add_argument("--runs", type=int, default=5, help="plays of the trace")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    arguments = parser.parse_args()
    plant = Plant.load(arguments.plant)
    trace = load_trace(_TRACE)
    ratio = compression_for(plant, trace, arguments.batch)
    runs = [play(plant, trace.compressed(ratio), seed) for seed in range(1, arguments.runs + 1)]
    speeds = sorted(run.simulated_seconds / run.wall_seconds for run in runs)
    steps = [run.wall_seconds / run.iterations_count for run in runs]
    costs = sorted(iteration_seconds(plant))
    tail = costs[int(0.99 * len(costs))]
    report = {
        "plant": plant.parameters.name,
        "trace": _TRACE,
        "compression_ratio": ratio,
        "mean_batch": statistics.median(run.mean_batch for run in runs),
        "real_time_ratio_median": statistics.median(speeds),
        "real_time_ratio_lowest": speeds[0],
        "step_seconds_median": statistics.median(steps),
        "iteration_cost_seconds_median": statistics.median(costs),
        "iteration_cost_seconds_p99": tail,
        "runs": [asdict(run) for run in runs],
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{report['plant']}, {_TRACE} {ratio:.2f} times faster, mean batch", end=" ")
    print(f"{report['mean_batch']:.0f}, {len(runs)} runs")
    print(f"engine alone: {statistics.median(speeds):.0f} times real time", end=" ")
    print(f"(lowest {speeds[0]:.0f}); {statistics.median(steps) * 1e6:.0f} us per step")
    print(f"one iteration's cost: median {statistics.median(costs) * 1e6:.1f} us", end=", ")
    print(f"p99 {tail * 1e6:.1f} us")


if __name__ == "__main__":
    main()
