"""`throttle simulate`: simulated engines in real time, beside a daemon. For trials and soaks."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from throttle.actuation.simulated import SimulatedGpuFile
from throttle.client import DEFAULT_TARGET, ThrottleClient
from throttle.commands.playing import GpuGroup, gpu_entries, gpu_uuids
from throttle.control.state import Mode, Slos
from throttle.errors import ThrottleError
from throttle.simulation.engine import SimulatedEngine
from throttle.simulation.gpu import SimulatedGpu
from throttle.simulation.messages import registration_message, state_message
from throttle.simulation.plant import Plant
from throttle.simulation.workload import Lengths, OpenLoop, poisson

if TYPE_CHECKING:
    import argparse
_LEASE_SECONDS = 5.0
#: As in a conversation.
_LENGTHS = Lengths(prompt_tokens=(100, 3000), output_tokens=(20, 500))


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "simulate",
        help="play simulated engines in real time beside a daemon",
        description="Make a file of simulated GPUs unless it is there, and serve random requests "
        "on them in real time, telling a daemon of each iteration as an engine would. All figures "
        "are simulated. Ends on SIGTERM or SIGINT.",
    )
    parser.add_argument(
        "--gpus-file", type=Path, required=True, metavar="FILE", help="of the simulated GPUs"
    )
    parser.add_argument("--target", default=DEFAULT_TARGET, help="default: %(default)s")
    parser.add_argument("--plant", default="h200-qwen3-30b-a3b", help="shipped plant or TOML file")
    parser.add_argument("--engines", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--first-engine", type=int, default=0, help="number of the first; default: %(default)s"
    )
    parser.add_argument(
        "--requests-per-second", type=float, default=3.0, help="per engine; default: %(default)s"
    )
    parser.add_argument(
        "--mode", choices=("act", "shadow"), default="act", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=1, help="of requests, chip, noise and switches")
    parser.add_argument(
        "--only-make-gpus", action="store_true", help="make the file and end: a daemon needs it"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Play until a signal.

    Raises:
        ThrottleError: A value cannot be used.
    """
    if arguments.engines < 1 or arguments.requests_per_second <= 0:
        raise ThrottleError("--engines and --requests-per-second must be above 0")
    plant = Plant.load(arguments.plant)
    numbers = range(arguments.first_engine, arguments.first_engine + arguments.engines)
    firsts = [f"GPU-simulated-{number}" for number in numbers]
    if not arguments.gpus_file.exists():
        SimulatedGpuFile.create(arguments.gpus_file, gpu_entries(plant, firsts)).close()
    if arguments.only_make_gpus:
        return 0
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    ending = threading.Event()
    with SimulatedGpuFile.open(arguments.gpus_file) as file:
        threads = [
            threading.Thread(
                target=_play, args=(arguments, plant, file, index, first, ending), name=first
            )
            for index, first in zip(numbers, firsts, strict=True)
        ]
        for thread in threads:
            thread.start()
        signal.sigwait(signals)
        ending.set()
        for thread in threads:
            thread.join()
    return 0


def _play(  # noqa: PLR0917 - a thread takes its arguments by position
    arguments: argparse.Namespace,
    plant: Plant,
    file: SimulatedGpuFile,
    index: int,
    first_uuid: str,
    ending: threading.Event,
) -> None:
    """One engine, iteration by iteration, each when the wall clock has come to its end."""
    uuids = gpu_uuids(first_uuid, plant.gpus_count)
    port = GpuGroup([file.gpu(uuid) for uuid in uuids])
    generator = random.Random(arguments.seed * 1000 + index)  # noqa: S311 - simulated
    gpu = SimulatedGpu(plant, port, port, generator)
    requests = poisson(arguments.requests_per_second, math.inf, _LENGTHS, generator)
    engine = SimulatedEngine(gpu, OpenLoop(requests))
    mode = Mode.ACT if arguments.mode == "act" else Mode.SHADOW
    profile = engine.profile(
        f"simulated-{index}", uuids, Slos(ttft_seconds=1.0, tpot_seconds=0.05), mode, _LEASE_SECONDS
    )
    with ThrottleClient(registration_message(profile), arguments.target) as client:
        started = time.monotonic() - engine.time_seconds
        for state in engine.run():
            if ending.wait(max(0.0, started + state.engine_time_seconds - time.monotonic())):
                return
            client.submit(state_message(state))
            engine.outcomes.clear()  # nobody asks for them, and this may play for days
