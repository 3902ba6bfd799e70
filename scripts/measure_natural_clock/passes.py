"""One pass over all workloads in one process, with the driver's boost as its environment says."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .card import Card, GpuAbsentError
from .probe import Probe, ProbedGraph
from .records import Row, probe_clock_mhz
from .workloads import (
    WORKLOADS_COUNT,
    Workload,
    grouped_gemm_works,
    random_tensor,
    workloads,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_GRAPH_SECONDS = 0.06  # length of one replay at full clock: a boost ramp fits into it
_MOST_REPETITIONS = 300
_CAPPED_REPETITIONS = 24
_IDLE_SECONDS = (0.3, 1.0, 2.5)
_DUTIES = (0.5, 0.2, 0.05)
_STEADY_SECONDS = 2.0
_DUTY_SECONDS = 1.0
_SETTLING_SECONDS = 0.5
_KEPT_PER_MODE = 150
_HEAVY_SIZE = 8192
_HEAVY_ZEROS = (0.0, 0.6, 0.9)  # shares of zeros: the fewer, the more power, the lower the clock


@dataclass(slots=True)
class PassResult:
    """Rows of one pass, and what is known of it."""

    rows: list[Row]
    provenance: dict[str, Any]


class Pass:
    """Measures every workload in its share of the time.

    Args:
        card: The GPU, to read energy and temperature.
        boost: "disabled" or "default"; says which modes make sense.
        seconds: Time for the whole pass.
    """

    def __init__(self, card: Card, boost: str, seconds: float) -> None:
        self._card, self._boost, self._seconds = card, boost, seconds
        self._torch: Any = import_torch()
        self._began = time.monotonic()
        self._rows: list[Row] = []
        self._dropped = 0
        self._names: list[str] = []
        self._failures: list[str] = []
        self._probe = Probe(self._torch)

    def run(self) -> PassResult:
        """Measure until the time is up."""
        torch = self._torch
        before, check = self._card.read(), self._check_probe()
        wrong = grouped_gemm_works(torch)
        if wrong:
            print(f"grouped GEMM not used, batched instead: {wrong}", flush=True)
        try:
            self._measure_all(grouped=not wrong)
        except Exception as error:  # noqa: BLE001 - what was measured so far is kept
            self._failures.append(f"{type(error).__name__}: {error}")
            print(f"stopped: {self._failures[-1]}", flush=True)
        after = self._card.read()
        return PassResult(
            self._rows,
            {
                "boost": self._boost,
                "workloads": self._names,
                "failures": self._failures,
                "dropped_count": self._dropped,
                "grouped_gemm": wrong or "checked",
                "timer_tick_nanoseconds": self._probe.tick_nanoseconds,
                "probe_cycles": self._probe.cycles,
                "probe_check": check,
                "temperature_celsius": [before.temperature_celsius, after.temperature_celsius],
                "versions": versions(torch),
            },
        )

    def _measure_all(self, *, grouped: bool) -> None:
        for index, workload in enumerate(workloads(self._torch, grouped=grouped)):
            left = self._seconds - (time.monotonic() - self._began)
            if left <= 0:
                print("time is up", flush=True)
                return
            self._measure(workload, left / max(WORKLOADS_COUNT - index, 1))
            self._names.append(workload.name)
            print(f"{self._boost} boost: {workload.name} ({len(self._rows)} rows)", flush=True)

    # -- one workload ----------------------------------------------------------------------------

    def _measure(self, workload: Workload, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        count = self._repetitions(workload)
        graph = ProbedGraph(self._torch, self._probe, workload.run, count)
        self._steady(workload, graph)
        if self._boost == "disabled":
            for duty in _DUTIES:
                self._duty(workload, graph, duty)
            self._ramps(workload, graph, deadline)
        elif workload.kind != "gap":
            for zeros in _HEAVY_ZEROS:
                self._capped(workload, zeros)

    def _repetitions(self, workload: Workload) -> int:
        """Repetitions that fill one replay, by a first timing."""
        for index in range(3):
            workload.run(index)
        self._torch.cuda.synchronize()
        began = time.perf_counter()
        for index in range(10):
            workload.run(index)
        self._torch.cuda.synchronize()
        one = (time.perf_counter() - began) / 10 + 4e-5
        return int(min(_MOST_REPETITIONS, max(8, _GRAPH_SECONDS / one)))

    def _steady(self, workload: Workload, graph: ProbedGraph) -> None:
        """Without pause; the energy counter around it."""
        graph.replay()
        kernels, clocks = 0, []
        before, began = self._card.read(), time.perf_counter()
        while time.perf_counter() - began < _STEADY_SECONDS:
            graph.replay()
            kernels += graph.count
            clocks += [(each.before_mhz + each.after_mhz) / 2 for each in graph.timed()][::8]
        passed = time.perf_counter() - began
        after = self._card.read()
        self._keep(workload, graph, "steady", 0.0, 0)
        if before.energy_joules is None or after.energy_joules is None or not clocks:
            return
        self._rows.append(
            Row(
                record="power",
                workload=workload.name,
                kind=workload.kind,
                backend=workload.backend,
                boost=self._boost,
                mode="steady",
                idle_seconds=0.0,
                repeat=0,
                position=0,
                clock_mhz=sum(clocks) / len(clocks),
                seconds=passed,
                kernels_count=kernels,
                energy_joules=after.energy_joules - before.energy_joules,
                temperature_celsius=after.temperature_celsius,
            )
        )

    def _duty(self, workload: Workload, graph: ProbedGraph, duty: float) -> None:
        """Working a share of the time: the governor may settle between its extremes."""
        until, repeat, pause = time.monotonic() + _DUTY_SECONDS, 0, 0.0
        while time.monotonic() < until:
            began = time.perf_counter()
            graph.replay()
            pause = min((time.perf_counter() - began) * (1.0 / duty - 1.0), _DUTY_SECONDS)
            time.sleep(pause)
            repeat += 1
        self._keep(workload, graph, "duty", pause, repeat)

    def _ramps(self, workload: Workload, graph: ProbedGraph, deadline: float) -> None:
        """From idle: the first kernels run while the clock climbs."""
        repeat = 0
        while repeat < len(_IDLE_SECONDS) or time.monotonic() < deadline:
            idle = _IDLE_SECONDS[repeat % len(_IDLE_SECONDS)]
            time.sleep(idle)
            graph.replay()
            self._keep(workload, graph, "ramp", idle, repeat)
            repeat += 1

    def _capped(self, workload: Workload, zeros_share: float) -> None:
        """Behind heavy GEMMs, at the clock that the power limit leaves."""
        heavy = self._heavy(zeros_share)
        graph = ProbedGraph(self._torch, self._probe, workload.run, _CAPPED_REPETITIONS, heavy)
        until = time.monotonic() + _SETTLING_SECONDS
        while time.monotonic() < until:
            graph.replay()
        for repeat in range(3):
            graph.replay()
            self._keep(workload, graph, "capped", 0.0, repeat)

    def _heavy(self, zeros_share: float) -> Callable[[], object]:
        torch = self._torch
        left = random_tensor(torch, _HEAVY_SIZE, _HEAVY_SIZE)
        left *= torch.rand_like(left) >= zeros_share
        out = torch.empty_like(left)
        return lambda: torch.mm(left, left, out=out)

    def _keep(
        self, workload: Workload, graph: ProbedGraph, mode: str, idle: float, repeat: int
    ) -> None:
        timed = list(graph.timed())
        step = max(len(timed) // _KEPT_PER_MODE, 1) if mode != "ramp" else 1
        for each in timed[::step]:
            clock = probe_clock_mhz(each.before_mhz, each.after_mhz)
            if clock is None or each.seconds <= 0:
                self._dropped += 1
                continue
            self._rows.append(
                Row(
                    record="kernel",
                    workload=workload.name,
                    kind=workload.kind,
                    backend=workload.backend,
                    boost=self._boost,
                    mode=mode,
                    idle_seconds=idle,
                    repeat=repeat,
                    position=each.position,
                    clock_mhz=clock,
                    seconds=each.seconds,
                )
            )

    def _check_probe(self) -> dict[str, float | None]:
        """The probe's clock against the one that NVML shows, while the GPU works."""
        torch = self._torch
        a = random_tensor(torch, 2048, 2048)
        until = time.monotonic() + _SETTLING_SECONDS
        while time.monotonic() < until:
            torch.mm(a, a)
            probed = self._probe.clock_mhz()
        shown = self._card.read().sm_clock_mhz
        return {"probe_mhz": probed, "driver_mhz": shown}


def import_torch() -> Any:  # noqa: ANN401 - no types where torch is absent
    """PyTorch with a working CUDA device.

    Raises:
        GpuAbsentError: It is missing, or sees no GPU.
    """
    try:
        torch: Any = importlib.import_module("torch")
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        raise GpuAbsentError(f"{error.name} is not installed") from error
    if not torch.cuda.is_available():
        raise GpuAbsentError("no NVIDIA GPU here: PyTorch sees no CUDA device")
    return torch


def versions(torch: Any) -> dict[str, str]:  # noqa: ANN401
    """Versions of what computed."""
    return {
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "triton": importlib.metadata.version("triton"),
        "python": platform.python_version(),
    }
