"""What reporting an iteration costs the engine, with 256 running requests and a real daemon.

    python scripts/bench_client.py [--iterations 3000] [--json FILE]

Measured on the calling thread, as an engine would feel it: the hand-over (`submit`) alone, and the
whole of what the vLLM adapters do, which report from a process beside the engine; then the same
with a `ThrottleClient` in the engine's own process. Calls are paced as iterations are; between them
the thread sleeps, as a thread that waits for a GPU does. Also the processor time of the engine's
process per iteration, with all of its threads, and the time of a fixed computation, which tells how
fast this machine is at the moment.
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
from typing import TYPE_CHECKING

import grpc
import numpy as np

from throttle.actuation.simulated import SimulatedGpu, SimulatedGpuFile
from throttle.client import ThrottleClient
from throttle.engines.options import EngineOptions
from throttle.engines.reporter import Reporter
from throttle.engines.sender_process import SenderProcess
from throttle.engines.vllm_schedule import SchedulerTap
from throttle.engines.vllm_statistics import StatisticsReader
from throttle.v1 import engine_pb2, throttle_service_pb2, throttle_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from throttle.engines.reporter import StateSink

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

    def __init__(self, client: StateSink) -> None:
        self._client = client
        self.seconds: list[float] = []

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


def _states_count(target: str) -> int | None:
    """States that the daemon has received of its only engine; None before it registers."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(target, options=options) as channel:
        status = throttle_service_pb2_grpc.ThrottleServiceStub(channel).GetStatus(
            throttle_service_pb2.GetStatusRequest(), timeout=10.0, wait_for_ready=True
        )
    return status.engines[0].states_count if status.engines else None


def _until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def _measure(
    target: str,
    client: StateSink,
    step: Callable[[Reporter], None],
    iterations: int,
    pace_seconds: float,
) -> dict[str, float]:
    _until(lambda: _states_count(target) is not None, "registration")
    sink = _TimedSink(client)
    reporter = Reporter(sink, tells_arrivals=False)
    whole = []
    processor_started = time.process_time()
    for _ in range(iterations):
        time.sleep(pace_seconds)
        started = time.perf_counter()
        step(reporter)
        whole.append(time.perf_counter() - started)
    processor_seconds = time.process_time() - processor_started
    # what is not sent costs nothing
    _until(lambda: _states_count(target) == iterations, "every state at the daemon")
    reporter.close()
    _until(lambda: _states_count(target) is None, "the stream's end")
    warm = iterations // 10
    result = {
        f"{what}_{name}_microseconds": round(1e6 * float(np.quantile(values[warm:], share)), 1)
        for what, values in (("submit", sink.seconds), ("whole", whole))
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    return result | {
        "processor_microseconds": round(1e6 * processor_seconds / iterations, 1),
        "fixed_computation_microseconds": round(1e6 * _fixed_computation_seconds(), 1),
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
    """Print p50 and p99 of both adapters, reporting from beside the engine and from within it."""
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
            target = f"unix:{root}/throttle.sock"
            for adapter, make in (
                ("stat_logger", _stat_logger_steps),
                ("scheduler", _scheduler_steps),
            ):
                for place in ("beside", "within"):
                    client = (
                        SenderProcess(EngineOptions(target), _registration())
                        if place == "beside"
                        else ThrottleClient(_registration(), target)
                    )
                    name = f"{adapter}_{place}"
                    results[name] = _measure(
                        target, client, make(), arguments.iterations, arguments.pace_seconds
                    )
                    print(name, json.dumps(results[name]))
        finally:
            daemon.terminate()
            daemon.wait()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
