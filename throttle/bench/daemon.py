"""A daemon of its own process over a Unix socket: round trips, many engines, and its start."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from throttle.actuation.simulated import SimulatedGpu, SimulatedGpuFile
from throttle.bench.states import PLANT
from throttle.bench.streams import drive
from throttle.bench.timing import Result
from throttle.bench.transport import load_of
from throttle.errors import ThrottleError
from throttle.simulation.plant import Plant

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from throttle.bench.states import Recorded

_START_TIMEOUT_SECONDS = 120.0
_STOP_TIMEOUT_SECONDS = 15.0
#: States of one engine per second, where there are many.
_MANY_ENGINES_PACING_SECONDS = 0.02


def bench_daemon(
    recorded: Recorded,
    requests_count: int,
    engines_counts: Sequence[int],
    pacing_seconds: float,
    bundles: Path,
) -> Iterator[Result]:
    """Time round trips, and before them the daemon's start and imports.

    Args:
        recorded: What each engine says.
        requests_count: Running requests in it, about.
        engines_counts: Engines at once, one case each.
        pacing_seconds: Pace of the case with one engine; with more, 50 states a second each.
        bundles: Directory of bundles.

    Raises:
        ThrottleError: The daemon does not start, or refuses an engine.
    """
    for module in ("grpc", "throttle.client", "throttle.daemon.server"):
        yield Result.of(f"import {module}", _import_seconds(module), requests_count=0)
    with tempfile.TemporaryDirectory(prefix="throttle-bench-") as folder:
        for count in engines_counts:
            started = time.perf_counter()
            with _daemon(Path(folder), count, bundles) as target:
                yield Result.of(
                    "serve until SERVING", [time.perf_counter() - started], requests_count=0
                )
                pacings = (0.0, pacing_seconds) if count == 1 else (_MANY_ENGINES_PACING_SECONDS,)
                for pacing in pacings:
                    answers = drive(load_of(recorded, target, count, pacing))
                    yield Result.of(
                        "round trip",
                        answers.seconds,
                        requests_count=requests_count,
                        clocks_count=len(Plant.load(PLANT).clocks_mhz),
                        pacing_seconds=pacing,
                        more={
                            "engines_count": count,
                            "overtaken_count": answers.overtaken_count,
                            "unanswered_count": answers.unanswered_count,
                        },
                    )


def _import_seconds(module: str, repetitions_count: int = 5) -> list[float]:
    """Wall time of an import in a fresh interpreter, less that of the interpreter itself."""
    code = f"import time; started = time.perf_counter(); import {module}; "
    code += "print(time.perf_counter() - started)"
    seconds = []
    for _ in range(repetitions_count):
        command = [sys.executable, "-c", code]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
        seconds.append(float(text))
    return seconds


@contextlib.contextmanager
def _daemon(folder: Path, engines_count: int, bundles: Path) -> Iterator[str]:
    """A daemon that serves simulated GPUs, one per engine; returns once it is SERVING."""
    plant = Plant.load(PLANT)
    name = plant.parameters.gpu.name
    entries = [
        SimulatedGpu(f"GPU-simulated-{index}", name, plant.clocks_mhz)
        for index in range(engines_count)
    ]
    gpus, socket = folder / f"gpus-{engines_count}", folder / f"throttle-{engines_count}.sock"
    command = [sys.executable, "-m", "throttle.cli", "serve", "--socket", str(socket)]
    command += ["--backend", "simulated", "--simulated-gpus", str(gpus)]
    command += ["--bundles", str(bundles), "--log-format", "json", "--log-level", "warning"]
    command += ["--engines-limit", str(engines_count + 8)]
    command += ["--actuation-state-directory", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        SimulatedGpuFile.create(gpus, entries),
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,  # noqa: S603
    ):
        try:
            _wait_until_serving(f"unix:{socket}", process)
            yield f"unix:{socket}"
        finally:
            process.terminate()
            process.wait(_STOP_TIMEOUT_SECONDS)


def _wait_until_serving(target: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            with contextlib.suppress(grpc.RpcError):
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        time.sleep(0.01)
    raise ThrottleError(f"the daemon at {target} did not serve within {_START_TIMEOUT_SECONDS:g} s")
