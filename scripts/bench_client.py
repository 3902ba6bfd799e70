"""What reporting an iteration costs the engine, with 256 running requests and a real daemon.

    python scripts/bench_client.py [--iterations 3000] [--json FILE]

Measured on the calling thread, as an engine would feel it: the hand-over (`submit`) alone, and the
whole of what the vLLM adapters do. Calls are paced as iterations are; between them the thread
sleeps, as a thread that waits for a GPU does. Also the processor time of the whole process per
iteration, with what serializes and sends in the background, and the time of a fixed computation,
which tells how fast this machine is at the moment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from throttle.actuation.simulated import SimulatedGpu, SimulatedGpuFile
from throttle.client import ThrottleClient
from throttle.engines.reporter import Reporter
from throttle.engines.vllm_schedule import SchedulerTap
from throttle.engines.vllm_statistics import StatisticsReader
from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

RUNNING = 256
GPU = "GPU-simulated-0"


def _registration() -> engine_pb2.EngineRegistration:
    return engine_pb2.EngineRegistration(
        engine_id="bench",
        model=engine_pb2.ModelDescriptor(name="qwen3-30b-a3b"),
        gpu_uuids=[GPU],
        limits=engine_pb2.EngineLimits(
            running_requests_count=RUNNING,
            batched_tokens_count=8192,
            kv_blocks_count=40_000,
            kv_block_tokens=16,
        ),
        default_slos=engine_pb2.ServiceLevelObjectives(ttft_seconds=1.0, tpot_seconds=0.1),
    )


class _TimedSink:
    """Times `submit` by itself."""

    def __init__(self, client: ThrottleClient) -> None:
        self._client = client
        self.seconds: list[float] = []

    @property
    def latest_decision(self) -> Any:  # noqa: ANN401
        """Of the client."""
        return self._client.latest_decision

    def submit(self, state: engine_pb2.IterationState) -> None:
        """Pass on."""
        started = time.perf_counter()
        self._client.submit(state)
        self.seconds.append(time.perf_counter() - started)

    def close(self, timeout_seconds: float = 2.0) -> None:
        """Pass on."""
        self._client.close(timeout_seconds)


def _stat_logger_steps() -> Callable[[Reporter], None]:
    reader = StatisticsReader(trust_elapsed=False)
    scheduler = SimpleNamespace(
        num_running_reqs=RUNNING, num_waiting_reqs=3, kv_cache_usage=0.4, iteration_details=None
    )
    iteration = SimpleNamespace(
        iteration_timestamp=0.0,
        num_generation_tokens=RUNNING,
        num_prompt_tokens=0,
        time_to_first_tokens_iter=[],
        inter_token_latencies_iter=[0.02] * RUNNING,
        finished_requests=[],
    )

    def step(reporter: Reporter) -> None:
        read = reader.read(scheduler, iteration, reporter.now_seconds())
        if read is not None:
            reporter.send(read[0], idle=read[1])

    return step


def _scheduler_steps() -> Callable[[Reporter], None]:
    tap = SchedulerTap()
    names = [f"cmpl-{number:08x}-0" for number in range(RUNNING)]
    requests = {
        name: SimpleNamespace(
            request_id=name,
            num_prompt_tokens=200,
            num_computed_tokens=200,
            num_output_tokens=1,
            max_tokens=100_000,
            arrival_time=time.time(),
            sampling_params=None,
            status="RUNNING",
        )
        for name in names
    }
    for request in requests.values():
        tap.arrive(request, time.monotonic(), time.time())
    running = list(requests.values())
    scheduled = dict.fromkeys(names, 1)
    first = SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(names, 200),
        scheduled_new_reqs=[SimpleNamespace(req_id=n, num_computed_tokens=0) for n in names],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[], num_computed_tokens=[], num_output_tokens=[], resumed_req_ids=set()
        ),
    )
    tap.plan(first, requests, time.monotonic())
    tap.complete(first, requests, running, 0.4, time.monotonic())
    computed, generated = [200] * RUNNING, [1] * RUNNING

    def step(reporter: Reporter) -> None:
        cached = SimpleNamespace(
            req_ids=names,
            num_computed_tokens=computed,
            num_output_tokens=generated,
            resumed_req_ids=set(),
        )
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled, scheduled_new_reqs=[], scheduled_cached_reqs=cached
        )
        tap.plan(output, requests, reporter.now_seconds())
        now = reporter.now_seconds()
        state = tap.complete(output, requests, running, 0.4, now)
        if state is not None:
            reporter.send(state, idle=False, at_seconds=now)

    return step


def _measure(
    target: str, step: Callable[[Reporter], None], iterations: int, pace_seconds: float
) -> dict[str, float]:
    client = ThrottleClient(_registration(), target)
    if not client.wait_until_connected(30.0):
        raise SystemExit(f"no daemon: {client.last_error}")
    sink = _TimedSink(client)
    reporter = Reporter(sink, tells_arrivals=False)
    whole = []
    processor_started = time.process_time()
    for _ in range(iterations):
        time.sleep(pace_seconds)
        started = time.perf_counter()
        step(reporter)
        whole.append(time.perf_counter() - started)
    client.wait_until_sent(10.0)
    processor_seconds = time.process_time() - processor_started
    statistics = client.statistics
    reporter.close()
    warm = iterations // 10
    result = {
        f"{what}_{name}_microseconds": round(1e6 * float(np.quantile(values[warm:], share)), 1)
        for what, values in (("submit", sink.seconds), ("whole", whole))
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    return result | {
        "processor_microseconds": round(1e6 * processor_seconds / iterations, 1),
        "fixed_computation_microseconds": round(1e6 * _fixed_computation_seconds(), 1),
        "overtaken_count": statistics.overtaken_count,
    }


def _fixed_computation_seconds() -> float:
    """Median time of a thousand additions in Python: tens of microseconds on a fast machine."""
    taken = []
    for _ in range(2001):
        started = time.perf_counter()
        total = 0
        for number in range(1000):
            total += number
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def main() -> None:
    """Print p50 and p99 of both adapters, with a daemon and without one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--pace-seconds", type=float, default=0.005)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        gpu = SimulatedGpu(GPU, "h200-sxm", tuple(range(345, 1981, 15)))
        SimulatedGpuFile.create(root / "gpus", [gpu]).close()
        command = [
            sys.executable, "-m", "throttle.cli", "serve",
            "--socket", root / "throttle.sock", "--simulated-gpus", root / "gpus",
        ]  # fmt: skip
        with (root / "log").open("wb") as log:
            daemon = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)  # noqa: S603 - our own
        try:
            for name, make in (
                ("stat_logger", _stat_logger_steps),
                ("scheduler", _scheduler_steps),
            ):
                results[name] = _measure(
                    f"unix:{root}/throttle.sock",
                    make(),
                    arguments.iterations,
                    arguments.pace_seconds,
                )
                print(name, json.dumps(results[name]))
        finally:
            daemon.terminate()
            daemon.wait()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
