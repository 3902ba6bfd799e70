"""The clock that a kernel really had: probes before and after it, replayed as one CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .kernels import probe_kernel, timer_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TIMER_READS = 4096
_LEAST_CYCLES = 30_000  # 15 us at 1980 MHz
_TICKS_PER_PROBE = 200  # the timer's step is at most half a percent of a probe
_FASTEST_CYCLES_PER_NANOSECOND = 2.0
_SLOTS = 4  # 32 bytes for each probe: Triton sees equally aligned pointers


@dataclass(frozen=True, slots=True)
class Timed:
    """One kernel between two probes.

    Attributes:
        position: Its number in the graph.
        before_mhz: Clock by the probe before.
        after_mhz: Clock by the probe after.
        seconds: From the end of the one to the start of the other.
    """

    position: int
    before_mhz: float
    after_mhz: float
    seconds: float


class Probe:
    """Launches probes long enough for the GPU's timer.

    Args:
        torch: The module.
    """

    def __init__(self, torch: Any) -> None:  # noqa: ANN401 - no types where torch is absent
        self._torch = torch
        self.tick_nanoseconds = self._tick()
        wanted = self.tick_nanoseconds * _TICKS_PER_PROBE * _FASTEST_CYCLES_PER_NANOSECOND
        self.cycles = int(max(_LEAST_CYCLES, wanted))

    def launch(self, slot: Any) -> None:  # noqa: ANN401 - a tensor
        """Put one probe on the current stream; it writes to a slot of four int64."""
        probe_kernel[(1,)](slot, self.cycles, num_warps=1)

    def clock_mhz(self) -> float:
        """The clock now."""
        slot = self._torch.zeros(_SLOTS, dtype=self._torch.int64, device="cuda")
        self.launch(slot)
        self._torch.cuda.synchronize()
        begin, end, cycles, _ = slot.tolist()
        return float(cycles / (end - begin) * 1e3)

    def _tick(self) -> int:
        """Smallest step of the GPU's global timer in nanoseconds."""
        out = self._torch.zeros(_TIMER_READS, dtype=self._torch.int64, device="cuda")
        timer_kernel[(1,)](out, _TIMER_READS, num_warps=1)
        self._torch.cuda.synchronize()
        steps = out.diff()
        steps = steps[steps > 0]
        return int(steps.min().item()) if steps.numel() else 1


class ProbedGraph:
    """A kernel repeated between probes, as one CUDA graph.

    Args:
        torch: The module.
        probe: The probe.
        run: Launches the kernel under test for the i-th time.
        count: Repetitions in the graph.
        between: Launched before each repetition, to heat the GPU.
    """

    def __init__(
        self,
        torch: Any,  # noqa: ANN401 - as above
        probe: Probe,
        run: Callable[[int], object],
        count: int,
        between: Callable[[], object] | None = None,
    ) -> None:
        self._torch = torch
        self.count = count
        self._out = torch.zeros((count, 2, _SLOTS), dtype=torch.int64, device="cuda")

        def body() -> None:
            for index in range(count):
                if between is not None:
                    between()
                probe.launch(self._out[index, 0])
                run(index)
                probe.launch(self._out[index, 1])

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            body()  # compiles what must be compiled before the capture
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            body()

    def replay(self) -> None:
        """Run all repetitions and wait for them."""
        self._graph.replay()
        self._torch.cuda.synchronize()

    def timed(self) -> Iterator[Timed]:
        """What the last replay measured."""
        for position, (before, after) in enumerate(self._out.tolist()):
            if before[1] <= before[0] or after[1] <= after[0]:
                continue
            yield Timed(
                position,
                before[2] / (before[1] - before[0]) * 1e3,
                after[2] / (after[1] - after[0]) * 1e3,
                (after[0] - before[1]) * 1e-9,
            )
