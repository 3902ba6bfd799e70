"""`throttle profile`: drive clocks and load, record, and look where predictions are unsure."""

from __future__ import annotations

import random
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from predictors.dataset import read_records
from predictors.errors import RecordsError
from predictors.profiling_advice import Advice, advise
from predictors.subject import describe
from predictors.training_rows import supported_clocks, training_frame
from throttle.actuation.simulated import SimulatedGpuFile
from throttle.commands.playing import Play, gpu_entries
from throttle.control.exploration import ExplorationPlan
from throttle.control.state import Mode, Slos
from throttle.daemon.brains import EngineBrain
from throttle.errors import ThrottleError
from throttle.simulation.plant import Plant, draw_plant
from throttle.simulation.profiling import (
    DeepFilling,
    SweepingLoad,
    chosen_points,
    profiling_points,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from throttle.control.state import EngineProfile
    from throttle.daemon.brains import GpuModel
    from throttle.simulation.engine import SimulatedEngine
    from throttle.simulation.gpu import SimulatedGpu
    from throttle.simulation.profiling import LoadPoint

_UUID = "GPU-simulated-0"
#: Held this long, most of the time passes after the switch (median 25 ms, p99 150 ms).
_HOLD_SECONDS = 0.3
#: Fewer iterations than these would leave long prompts, slower than the hold, without a clock of
#: their own.
_HOLD_ITERATIONS = 4
_IDLE_PAUSE_SECONDS = 1.0
#: Rounds are alike in length, so that training can split by run; the first few visit every load,
#: the others learn from those before.
_ROUND_RATIO = 0.1
_COVERING_ROUNDS_COUNT = 4
#: A chunk of this share of the most that one iteration computes counts as full.
_FULL_CHUNK_RATIO = 0.75
#: Every this many clocks the ensemble is asked; weights between are linear.
_ASKED_CLOCKS_COUNT = 12


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "profile",
        help="drive clocks and load, and record iterations to train a bundle from",
        description="Run a daemon whose clocks follow an exploration plan instead of a bundle, "
        "play load on a simulated engine through it in rounds, and keep what the daemon records. "
        "After each round a small ensemble says how well the recordings predict and where the "
        "next round should look. Started again, it goes on after the last finished round.",
    )
    parser.add_argument("--gpu", choices=["simulated"], default="simulated", help="which GPU")
    parser.add_argument("--plant", default="h200-qwen3-30b-a3b", help="shipped plant or TOML file")
    parser.add_argument("--draw", type=int, help="randomize the plant by this seed")
    parser.add_argument("--out", type=Path, required=True, help="folder for the recordings")
    parser.add_argument(
        "--minutes", type=float, default=15.0, help="engine time to spend (default: 15)"
    )
    parser.add_argument(
        "--target-error",
        type=float,
        default=0.0,
        metavar="RATIO",
        help="stop when rows left out are predicted this well, such as 0.02; 0 spends all minutes",
    )
    parser.add_argument("--seed", type=int, default=11, help="seed of chip, noise and lengths")
    parser.add_argument(
        "--observe",
        action="store_true",
        help="set no clock: learn from those that the GPU takes by itself",
    )
    parser.add_argument(
        "--one-chip",
        action="store_true",
        help="stay on one simulated chip; else each round meets another, as in a fleet",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Profile; 0 when the budget is spent or the error is reached."""
    from throttle.daemon.logs import configure_logs  # noqa: PLC0415 (slow to load)

    if not arguments.minutes > 0.0:
        raise ThrottleError(f"--minutes is {arguments.minutes:g}; allowed: above 0")
    configure_logs("warning", "auto")
    plant = (
        Plant.load(arguments.plant)
        if arguments.draw is None
        else draw_plant(arguments.plant, arguments.draw)
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="throttle-profile-") as folder:
        path = Path(folder) / "gpus"
        with SimulatedGpuFile.create(path, gpu_entries(plant, [_UUID])) as file:
            profiling = Profiling(
                plant,
                file,
                path,
                arguments.out,
                arguments.seed,
                60.0 * arguments.minutes,
                arguments.target_error,
                observe=arguments.observe,
                one_chip=arguments.one_chip,
            )
            profiling.run()
    return 0


@dataclass(frozen=True, slots=True)
class Round:
    """One recording.

    Attributes:
        index: Which, from 0.
        seconds: Engine time in which load points may begin.
        points: Loads, in order.
        clock_weights: How often each clock is wanted; None for all alike.
    """

    index: int
    seconds: float
    points: Sequence[LoadPoint]
    clock_weights: Sequence[float] | None


class Profiling:
    """Rounds of recording until a budget is spent or an error is reached.

    Every finished round is a file of its own, named by seed and number: started again in the same
    folder, profiling goes on after the last of them. A round that is interrupted leaves no file,
    and the daemon resets the clocks on its way out.

    Args:
        plant: The simulated GPU and model.
        file: State of the simulated GPUs.
        file_path: Where it lies.
        out: Folder for the recordings.
        seed: Of chip, noise and lengths.
        budget_seconds: Engine time to spend over all rounds.
        target_error_ratio: Error on rows left out at which to stop; 0 never stops.
        observe: Set no clock.
        one_chip: Stay on one chip; else each round meets another of its kind, as in a fleet.
    """

    def __init__(  # noqa: PLR0917 (each is one thing that callers name)
        self,
        plant: Plant,
        file: SimulatedGpuFile,
        file_path: Path,
        out: Path,
        seed: int,
        budget_seconds: float,
        target_error_ratio: float = 0.0,
        *,
        observe: bool = False,
        one_chip: bool = False,
    ) -> None:
        self._plant, self._file, self._file_path, self._out = plant, file, file_path, out
        self._seed, self._budget = seed, budget_seconds
        self._target_error, self._observe = target_error_ratio, observe
        self._one_chip = one_chip
        limits = plant.parameters.engine
        self._tokens_limit = limits.batched_tokens_limit
        kv_tokens = plant.kv_blocks_count * limits.kv_block_tokens
        self._points = profiling_points(kv_tokens, limits.batched_tokens_limit)
        # the first round shows how fast prompts are
        self._filling = DeepFilling(kv_tokens, budget_seconds, round(1.0 / _ROUND_RATIO) - 1)

    def run(self) -> None:
        """Record rounds until there is nothing left to do."""
        advice = None
        while (spent := self._spent_seconds()) < self._budget:
            index = len(self._recordings())
            if index >= _COVERING_ROUNDS_COUNT or (index and self._target_error):
                advice = self._advice()
                if self._reached(advice):
                    break
            self._record(self._next_round(index, self._budget - spent, advice))
        advice = self._advice()
        if advice is not None:
            _say(
                f"done: {self._spent_seconds() / 60.0:.1f} min in {len(self._recordings())} rounds,"
                f" {advice.rows_count} iterations; rows left out are predicted to "
                f"{advice.latency_error_ratio:.1%} (latency) and {advice.power_error_ratio:.1%} "
                "(power)"
            )
        for phase, (low, high) in self.supported_clocks().items():
            _say(f"{phase}: the recordings support clocks from {low:.0f} to {high:.0f} MHz")

    def supported_clocks(self) -> dict[str, tuple[float, float]]:
        """Phase -> clocks that the recordings hold enough of."""
        records = read_records(self._recordings())
        return supported_clocks(training_frame(records, describe(records).gpu.power_limit_watts))

    def _recordings(self) -> list[Path]:
        """Finished rounds, in order."""
        name = re.compile(rf"-{re.escape(self._engine_id(0)[:-1])}\d+\.parquet$")
        found = [path for path in self._out.glob("*.parquet") if name.search(path.name)]
        return sorted(found, key=lambda path: int(path.stem.rsplit("-", 1)[-1]))

    def _spent_seconds(self) -> float:
        import pyarrow.parquet as pq  # noqa: PLC0415 (as the recorder does)

        seconds = 0.0
        for path in self._recordings():
            times = pq.read_table(path, columns=["engine_time_seconds"])["engine_time_seconds"]
            # a round that recorded nothing still counts, so that rounds end
            seconds += max(float(times.to_numpy().max(initial=0.0)), 1.0)
        return seconds

    def _engine_id(self, index: int) -> str:
        kind = "observe" if self._observe else "profile"
        return f"{kind}-{self._seed}-{index}"

    def _advice(self) -> Advice | None:
        """What the recordings so far say; None while they are too few."""
        shapes = np.array([point.shapes(self._tokens_limit) for point in self._points])
        try:
            return advise(read_records(self._recordings()), shapes, self._asked_clocks())
        except RecordsError:
            return None

    def _asked_clocks(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        clocks = self._plant.clocks_mhz
        return np.linspace(clocks[0], clocks[-1], _ASKED_CLOCKS_COUNT)

    def _reached(self, advice: Advice | None) -> bool:
        if advice is None or not self._target_error:
            return False
        return advice.error_ratio <= self._target_error

    def _next_round(self, index: int, left_seconds: float, advice: Advice | None) -> Round:
        seconds = min(_ROUND_RATIO * self._budget, left_seconds)
        deep = self._filling.point(index - 1, self._prompt_tokens_per_second())
        first = (deep,) if deep is not None else ()
        if advice is None or index < _COVERING_ROUNDS_COUNT:
            start = index * len(self._points) // _COVERING_ROUNDS_COUNT % len(self._points)
            points = (*first, *self._points[start:], *self._points[:start])
            return Round(index, seconds, points, None)
        generator = random.Random(f"{self._seed} {index}")  # noqa: S311 - not a secret
        points = chosen_points(
            self._points, advice.disagreement.mean(axis=1).tolist(), len(self._points), generator
        )
        by_clock = advice.disagreement.mean(axis=0)
        clocks = np.array(self._plant.clocks_mhz)
        unsure = np.interp(clocks, self._asked_clocks(), by_clock / max(by_clock.mean(), 1e-9))
        return Round(index, seconds, (*first, *points), (0.5 + unsure).tolist())

    def _prompt_tokens_per_second(self) -> float:
        """How fast full chunks of prompts were computed so far, over all clocks; 0 before any."""
        import pyarrow.parquet as pq  # noqa: PLC0415 (as the recorder does)

        tokens, seconds = 0.0, 0.0
        for path in self._recordings():
            columns = ["sum_prefill_tokens", "iteration_duration_seconds"]
            rows = pq.read_table(path, columns=columns).to_pandas().dropna()
            full = rows[rows["sum_prefill_tokens"] >= _FULL_CHUNK_RATIO * self._tokens_limit]
            tokens += float(full["sum_prefill_tokens"].sum())
            seconds += float(full["iteration_duration_seconds"].sum())
        return tokens / seconds if seconds > 0.0 else 0.0

    def _record(self, planned: Round) -> None:
        from throttle.daemon.assembly import build_server  # noqa: PLC0415
        from throttle.daemon.config import DaemonConfig  # noqa: PLC0415 (slow to load)

        config = DaemonConfig(
            socket=self._file_path.with_name("throttle.sock"),
            gpus=self._file.uuids(),
            simulated_gpus=self._file_path,
            recordings=self._out,
        )
        daemon = build_server(config, ExplorationFactory(planned))
        finished = False
        daemon.start()
        try:
            self._play(daemon.target, planned)
            finished = True
        finally:
            daemon.stop()  # which resets the clocks
            if not finished:  # else the part would count as the whole round
                for path in self._out.glob(f"*-{self._engine_id(planned.index)}.parquet"):
                    path.unlink()

    def _play(self, target: str, planned: Round) -> None:
        generator = random.Random(self._seed + 1000 * planned.index)  # noqa: S311 - not a secret
        load = SweepingLoad(planned.points, _IDLE_PAUSE_SECONDS, generator, planned.seconds)
        reported = -1

        def progress(now_seconds: float, gpu: SimulatedGpu, engine: SimulatedEngine) -> None:
            nonlocal reported
            percent = int(min(now_seconds / planned.seconds, 1.0) * 10) * 10
            if percent != reported:
                reported = percent
                _say(
                    f"round {planned.index}: {percent:3d} %, {now_seconds:.0f} simulated seconds, "
                    f"{engine.iterations_count} iterations, {gpu.clock_mhz} MHz"
                )

        mode = Mode.RECORD if self._observe else Mode.ACT
        engine_id = self._engine_id(planned.index)
        seed = self._seed if self._one_chip else self._seed + planned.index
        play = Play(self._plant, _UUID, seed, engine_id, mode, Slos())
        play.run(self._file, target, load, progress)


class ExplorationFactory:
    """Makes an exploration plan for every engine.

    Args:
        planned: The round that the plan is for.
    """

    def __init__(self, planned: Round) -> None:
        self._planned = planned

    def build(self, profile: EngineProfile, gpu: GpuModel | None) -> EngineBrain:  # noqa: ARG002
        """A plan over the GPU's clocks."""
        clocks = gpu.clocks_mhz if gpu is not None else ()
        plan = ExplorationPlan(
            clocks,
            _HOLD_SECONDS,
            start_ratio=(0.5 + 0.382 * self._planned.index) % 1.0,
            hold_iterations=_HOLD_ITERATIONS,
            weights=self._planned.clock_weights,
        )
        return EngineBrain(plan, "", clocks)

    def warm_up(self) -> Iterator[tuple[str, str]]:
        """Nothing is slow here."""
        return iter(())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
