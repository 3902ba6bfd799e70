r"""Lays the lateness that was expected beside what came, at a clock that stands still; simulated.

    python scripts/judge_lateness.py --plant h200-qwen3-30b-a3b --trace azure2023_conv_10min \
        --load 0.75 --clock 1260

At one iteration in six the controller's definitions say, for every answer that generates, how
probable it is to miss its mean gap if it ends so many tokens ahead. Whether it would have is known
later, wherever the answer goes on for that long. Printed by distance, and by what was expected.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from throttle.control import lateness
from throttle.control.controller import Controller
from throttle.control.scoreboard import Column
from throttle.control.settings import ControlSettings
from throttle.simulation.comparison.runs import REST_SECONDS, Scene
from throttle.simulation.comparison.searches import goodput_compression
from throttle.simulation.engine import SimulatedEngine
from throttle.simulation.experiment import play
from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.workload import OpenLoop

if TYPE_CHECKING:
    from throttle.control.state import IterationState

ROOT = Path(__file__).resolve().parent.parent
#: One iteration in so many is judged.
STRIDE = 6
#: The load is settled, and prompts are known, after this much of the trace.
SETTLED_SECONDS = 60.0
DISTANCES = (1, 2, 6, 12, 24, 48, 96, 300)
CHANCES = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 0.6, 1.01)


@dataclass
class Journal:
    """What was expected of whom, and when each token came."""

    clock: int
    generated: list[dict[float, float]] = field(default_factory=list)
    expected: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    token_seconds: dict[float, dict[float, float]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    begun: dict[float, tuple[float, float]] = field(default_factory=dict)

    def note_tokens(self, rows: np.ndarray, now: float) -> None:
        """Every answer's length at a time, and its beginning."""
        columns = [Column.NUMBER, Column.GENERATED, Column.FIRST_GENERATED, Column.FIRST_TOKEN]
        for number, generated, first, began in rows[:, columns]:
            self.token_seconds[number][generated] = now
            self.begun[number] = (first, began)

    def watch(self) -> None:
        """Have the definition of lateness tell what it expects of single answers."""
        inner = lateness._View._judge  # noqa: SLF001 - single answers are told nowhere else
        journal = self

        def judge(
            view: lateness._View,
            numbers: np.ndarray,
            shares: np.ndarray,
            late: np.ndarray,
            spare: np.ndarray,
        ) -> lateness._Judged:
            journal.expected.append((numbers.copy(), view.ends.copy(), late[:, :, journal.clock]))
            return inner(view, numbers, shares, late, spare)

        lateness._View._judge = judge  # type: ignore[method-assign, assignment]  # noqa: SLF001

    def outcomes(self, limit_seconds: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens ahead, chance expected and whether late, one for each answer and distance."""
        found = []
        for (numbers, ends, late), lengths in zip(self.expected, self.generated, strict=True):
            for row, number in enumerate(numbers):
                if number not in lengths:
                    continue  # its prompt is still to come
                first, began = self.begun[number]
                for segment, end in enumerate(ends):
                    length = lengths[number] + round(end)
                    came = self.token_seconds[number].get(length)
                    if came is None:
                        break
                    gap = (came - began) / (length - first)
                    found.append((round(end), late[row, segment], gap > limit_seconds))
        ahead, chance, seen = np.array(found, dtype=float).T
        return ahead, chance, seen


def play_at(scene: Scene, compression_ratio: float, clock: int) -> Journal:
    """Play a scene at the `clock`-th judged clock, and keep what was expected and what came."""
    predictor = scene.build_predictor()
    index = int(_judged(predictor.clocks_mhz)[clock])
    journal = Journal(clock)
    journal.watch()
    lock = InProcessLock()
    generator = random.Random(1)  # noqa: S311 - simulated
    gpu = SimulatedGpu(scene.build_plant(), lock, DiscardedTelemetry(), generator)
    requests = scene.build_trace().compressed(compression_ratio).requests
    engine = SimulatedEngine(gpu, OpenLoop(requests), scene.fidelity)
    uuids = tuple(f"GPU-simulated-{each}" for each in range(gpu.plant.gpus_count))
    profile = engine.profile("judged", uuids, scene.slos)
    controller = Controller(profile, predictor, ControlSettings(), compiled=False)
    clock_mhz = int(predictor.clocks_mhz[index])
    numbers = itertools.count(1)

    def decide(state: IterationState) -> None:
        lock.set_mhz(clock_mhz)
        controller.observe(state, clock_mhz)
        rows = controller._scoreboard.live().running  # noqa: SLF001 - its rows, by number
        journal.note_tokens(rows, state.engine_time_seconds)
        if next(numbers) % STRIDE or state.engine_time_seconds < SETTLED_SECONDS:
            return
        before = len(journal.expected)
        controller._selector.jump(index, 0.0)  # noqa: SLF001 - the clock that stands still
        controller.decide(state)
        begun = rows[np.isfinite(rows[:, Column.FIRST_TOKEN])]
        lengths = dict(zip(begun[:, Column.NUMBER], begun[:, Column.GENERATED], strict=True))
        journal.generated.extend([lengths] * (len(journal.expected) - before))

    play(engine, gpu, decide, rest_seconds=REST_SECONDS)
    return journal


def _judged(clocks_mhz: np.ndarray) -> np.ndarray:
    """Indices of the clocks at which lateness is computed."""
    floor = np.searchsorted(clocks_mhz, ControlSettings().floor_clock_ratio * clocks_mhz[-1])
    return lateness.judged_clocks((int(floor), len(clocks_mhz) - 1))


def main() -> None:
    """Play one fixed clock and print the two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plant", default="h200-qwen3-30b-a3b")
    parser.add_argument("--trace", default="azure2023_conv_10min", help="shipped trace or CSV file")
    parser.add_argument("--start-seconds", type=float, default=0.0)
    parser.add_argument("--duration-seconds", type=float, default=600.0)
    parser.add_argument("--load", type=float, default=0.75, help="share of the goodput")
    parser.add_argument(
        "--clock", type=int, required=True, metavar="MHZ", help="the nearest judged"
    )
    arguments = parser.parse_args()
    scene = Scene(
        arguments.plant,
        arguments.trace,
        start_seconds=arguments.start_seconds,
        duration_seconds=arguments.duration_seconds,
        bundle=str(ROOT / "models"),
    )
    clocks = scene.build_predictor().clocks_mhz
    judged = _judged(clocks)
    nearest = int(np.argmin(np.abs(clocks[judged] - arguments.clock)))
    journal = play_at(scene, arguments.load * goodput_compression(scene), nearest)
    ahead, chance, seen = journal.outcomes(scene.slos.tpot_seconds or np.inf)
    where = f"{arguments.plant}, {arguments.trace}, load {arguments.load:g}"
    print(f"{where}, {clocks[judged[nearest]]} MHz; simulated")
    print("| tokens ahead | expected late, % | late, % | answers |\n|---:|---:|---:|---:|")
    for low, high in itertools.pairwise((0, *DISTANCES)):
        _row(f"{low + 1} to {high}", (ahead > low) & (ahead <= high), chance, seen)
    print("| chance expected | expected late, % | late, % | answers |\n|---:|---:|---:|---:|")
    for least, most in itertools.pairwise(CHANCES):
        inside = (chance >= least) & (chance < most)
        _row(f"{least:g} to {min(most, 1.0):g}", inside, chance, seen)


def _row(name: str, chosen: np.ndarray, chance: np.ndarray, seen: np.ndarray) -> None:
    if chosen.any():
        expected, late = 100 * chance[chosen].mean(), 100 * seen[chosen].mean()
        print(f"| {name} | {expected:.3f} | {late:.3f} | {np.count_nonzero(chosen)} |")


if __name__ == "__main__":
    main()
