"""A fixed computation of the kind that decisions are made of, to measure machines with.

Small arrays, a dictionary, an exponential. Whatever slows decisions on a machine (other programs,
caches gone cold between two calls, a processor that sleeps) slows it, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from throttle.bench.timing import Result, settled_collector, time_calls

if TYPE_CHECKING:
    from collections.abc import Iterator


#: Its name among the cases of a benchmark.
REFERENCE_CASE = "fixed computation"


class Reference:
    """What decisions are measured in; never change it, or what was measured in it means another."""

    def __init__(self) -> None:
        generator = np.random.default_rng(1)
        self._rows = generator.random((64, 16))
        self._grid = np.sort(generator.random(110))
        self._slots = {number: number for number in range(64)}

    def compute(self) -> float:
        """Once."""
        total = 0.0
        for _ in range(10):
            places = np.searchsorted(self._grid, self._rows[:, 0])
            taken = self._grid[np.minimum(places, 109)]
            total += float(np.exp(np.cumsum(taken) / 64.0).sum())
            total += sum(self._slots[number] for number in range(64))
            self._rows = np.roll(self._rows, 1)
        return total


def bench_reference(samples_count: int, pacing_seconds: float) -> Iterator[Result]:
    """Time it as decisions are timed: back to back, then paced.

    Args:
        samples_count: Computations timed in each case.
        pacing_seconds: Pace of the paced case.
    """
    reference = Reference()
    for pacing in (0.0, pacing_seconds):
        with settled_collector():
            times = time_calls([reference.compute] * samples_count, pacing)
        p50, p99 = (float(each) for each in np.quantile(times.processor_seconds, (0.5, 0.99)))
        yield Result.of(
            REFERENCE_CASE,
            times.seconds,
            requests_count=0,
            pacing_seconds=pacing,
            more={"processor_p50_seconds": p50, "processor_p99_seconds": p99},
        )
