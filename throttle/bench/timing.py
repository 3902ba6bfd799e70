"""Time of many calls, back to back and paced, as quantiles."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Result:
    """One case of a benchmark.

    Attributes:
        case: What was timed.
        requests_count: Running requests, about.
        clocks_count: Candidate clocks; 0 where none are judged.
        pacing_seconds: Time from the start of one call to that of the next; 0 for back to back.
        p50_seconds: Median.
        p99_seconds: 99th percentile.
        p999_seconds: 99.9th percentile; rests on few samples below some ten thousand.
        samples_count: Calls timed.
        more: What else a case tells.
    """

    case: str
    requests_count: int
    clocks_count: int
    pacing_seconds: float
    p50_seconds: float
    p99_seconds: float
    p999_seconds: float
    samples_count: int
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        case: str,
        seconds: Sequence[float],
        *,
        requests_count: int,
        clocks_count: int = 0,
        pacing_seconds: float = 0.0,
        more: dict[str, Any] | None = None,
    ) -> Result:
        """Sum up the times of single calls."""
        p50, p99, p999 = (float(each) for each in np.quantile(seconds, (0.5, 0.99, 0.999)))
        return cls(
            case,
            requests_count,
            clocks_count,
            pacing_seconds,
            p50,
            p99,
            p999,
            len(seconds),
            more or {},
        )

    def document(self) -> dict[str, Any]:
        """For JSON, with the further figures beside the others."""
        fields = asdict(self)
        return {**{name: fields[name] for name in fields if name != "more"}, **self.more}


@contextmanager
def settled_collector() -> Iterator[None]:
    """The garbage collector as `throttle serve` has it: what is there now is set aside."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True, slots=True)
class Times:
    """Of single calls, in order.

    Attributes:
        seconds: By the clock on the wall: what a caller waits.
        processor_seconds: By this thread's processor: on a machine that others use, too, what
            remains when their turns are taken out.
    """

    seconds: list[float]
    processor_seconds: list[float]


def time_calls(calls: Iterable[Callable[[], object]], pacing_seconds: float) -> Times:
    """Time each call.

    Args:
        calls: What to call, each once.
        pacing_seconds: Time between two starts, slept through; 0 for none.
    """
    clock, processor = time.perf_counter, time.thread_time
    times = Times([], [])
    due = clock()
    for call in calls:
        if pacing_seconds:
            due += pacing_seconds
            wait = due - clock()
            if wait > 0.0:
                time.sleep(wait)
            else:
                due -= wait  # late by itself: do not catch up in a burst
        spent = processor()
        started = clock()
        call()
        times.seconds.append(clock() - started)
        times.processor_seconds.append(processor() - spent)
    return times
