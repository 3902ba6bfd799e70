"""`throttle profile`: drive clocks over an exploration plan and record iterations."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from throttle.actuation.simulated import SimulatedGpuFile
from throttle.commands.playing import Play, gpu_entries
from throttle.control.exploration import ExplorationPlan
from throttle.control.state import Mode, Slos
from throttle.daemon.brains import EngineBrain
from throttle.simulation.plant import Plant
from throttle.simulation.profiling import SweepingLoad, profiling_points

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from throttle.control.state import EngineProfile
    from throttle.daemon.brains import GpuModel
    from throttle.simulation.engine import SimulatedEngine
    from throttle.simulation.gpu import SimulatedGpu

_UUID = "GPU-simulated-0"
#: Held this long, most of the time passes after the switch (median 25 ms, p99 150 ms).
_HOLD_SECONDS = 0.3
_IDLE_PAUSE_SECONDS = 1.5


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "profile",
        help="drive clocks over an exploration plan and record iterations",
        description="Run a daemon whose clocks follow an exploration plan instead of a bundle, "
        "play a sweeping load on a simulated engine through it, and keep what the daemon records.",
    )
    parser.add_argument("--gpu", choices=["simulated"], default="simulated", help="which GPU")
    parser.add_argument("--plant", default="h200-qwen3-30b-a3b", help="shipped plant or TOML file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the recordings")
    parser.add_argument("--runs", type=int, default=3, help="independent runs, each a recording")
    parser.add_argument("--seed", type=int, default=11, help="seed of chip, noise and lengths")
    parser.add_argument(
        "--seconds-per-point", type=float, default=6.0, help="simulated time per load point"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Profile; 0 when every run is recorded."""
    # Imported here: the daemon's libraries are slow to load and other commands do without.
    from throttle.daemon.config import DaemonConfig  # noqa: PLC0415
    from throttle.daemon.logs import configure_logs  # noqa: PLC0415
    from throttle.daemon.server import build_server  # noqa: PLC0415

    configure_logs("warning", "auto")
    plant = Plant.load(arguments.plant)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="throttle-profile-") as folder:
        path = Path(folder) / "gpus"
        with SimulatedGpuFile.create(path, gpu_entries(plant, [_UUID])) as file:
            for index in range(arguments.runs):
                config = DaemonConfig(
                    socket=Path(folder) / "throttle.sock",
                    gpus=file.uuids(),
                    simulated_gpus=path,
                    recordings=arguments.out,
                )
                daemon = build_server(config, ExplorationFactory((index + 0.5) / arguments.runs))
                daemon.start()
                try:
                    _play(plant, file, daemon.target, arguments.seed + index, arguments)
                finally:
                    daemon.stop()
    return 0


class ExplorationFactory:
    """Makes an exploration plan for every engine.

    Args:
        start_ratio: Where in the clock range the plan starts, in [0, 1).
    """

    def __init__(self, start_ratio: float) -> None:
        self._start_ratio = start_ratio

    def build(self, profile: EngineProfile, gpu: GpuModel | None) -> EngineBrain:  # noqa: ARG002
        """A plan over the GPU's clocks."""
        clocks = gpu.clocks_mhz if gpu is not None else ()
        return EngineBrain(ExplorationPlan(clocks, _HOLD_SECONDS, self._start_ratio), "", clocks)

    def warm_up(self) -> Iterator[tuple[str, str]]:
        """Nothing is slow here."""
        return iter(())


def _play(
    plant: Plant, file: SimulatedGpuFile, target: str, seed: int, arguments: argparse.Namespace
) -> None:
    limits = plant.parameters.engine
    points = profiling_points(
        plant.kv_blocks_count * limits.kv_block_tokens,
        limits.batched_tokens_limit,
        arguments.seconds_per_point,
    )
    generator = random.Random(seed)  # noqa: S311 - not a secret
    load = SweepingLoad(points, _IDLE_PAUSE_SECONDS, generator)
    reported = -1

    def progress(now_seconds: float, gpu: SimulatedGpu, engine: SimulatedEngine) -> None:
        nonlocal reported
        percent = int(load.progress_ratio * 20) * 5
        if percent != reported:
            reported = percent
            print(
                f"run with seed {seed}: {percent:3d} %, {now_seconds:.0f} simulated seconds, "
                f"{engine.iterations_count} iterations, {gpu.clock_mhz} MHz",
                file=sys.stderr,
                flush=True,
            )

    play = Play(plant, _UUID, seed, f"profile-{seed}", Mode.ACT, Slos())
    play.run(file, target, load, progress)
