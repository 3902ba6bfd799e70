"""A load that shows an engine everything a predictor should have seen.

A profiling run holds one load point after another: closed loops at batches from 1 to 256 with
contexts from short to long, bare prompts of every chunk size, and idle pauses in between. Whoever
drives it changes clocks meanwhile; this module only says which requests arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from throttle.simulation.requests import Request
from throttle.simulation.workload import Lengths

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """One stretch of profiling.

    Attributes:
        concurrency: Requests held in the engine.
        lengths: Their prompt and output lengths.
        duration_seconds: Time during which new ones are sent.
    """

    concurrency: int
    lengths: Lengths
    duration_seconds: float


def profiling_points(
    kv_tokens: int,
    batched_tokens_limit: int,
    seconds_per_point: float = 8.0,
    largest_batch: int = 256,
    longest_context: int = 32768,
) -> tuple[LoadPoint, ...]:
    """Points that cover batch x context x chunk size within what the KV cache holds.

    Args:
        kv_tokens: Tokens that the KV cache holds.
        batched_tokens_limit: Most tokens computed in one iteration.
        seconds_per_point: Simulated time per point.
        largest_batch: Largest number of requests held.
        longest_context: Longest prompt.
    """
    points = []
    batch = 1
    while batch <= largest_batch:
        context = 128
        while context <= longest_context and batch * context * 2 <= kv_tokens:
            # Outputs of different lengths spread the requests' ends, so that prompts of newcomers
            # mix with generation; short ones bring more of that mixture.
            for outputs in ((8, 64), (64, 1024)):
                lengths = Lengths((max(16, context // 2), context), outputs)
                points.append(LoadPoint(batch, lengths, seconds_per_point))
            context *= 4
        batch *= 2
    chunk = 64
    while chunk <= batched_tokens_limit:  # prompts alone: one token each, then gone
        lengths = Lengths((chunk // 2, chunk), (1, 1))
        points.extend(
            LoadPoint(concurrency, lengths, seconds_per_point / 4) for concurrency in (1, 4)
        )
        chunk *= 2
    return tuple(points)


class SweepingLoad:
    """Plays load points one after another, each drained before the next begins.

    Args:
        points: The points, in order.
        pause_seconds: Idle time between two points.
        generator: Source of lengths.
    """

    def __init__(
        self, points: Sequence[LoadPoint], pause_seconds: float, generator: random.Random
    ) -> None:
        self._points = list(points)
        self._pause = pause_seconds
        self._generator = generator
        self._number = 0
        self._due: list[Request] = []
        self._in_engine = 0
        self._point_index = -1
        self._point_ends = 0.0
        self._begin_point(0.0)

    @property
    def progress_ratio(self) -> float:
        """Share of the points that are done."""
        return min(max(self._point_index, 0) / max(len(self._points), 1), 1.0)

    def next_arrival_seconds(self) -> float | None:
        """Time of the next arrival; None when all due requests are in the engine."""
        return self._due[0].arrival_seconds if self._due else None

    def take(self, now_seconds: float) -> Sequence[Request]:
        """Requests that have arrived by now; each is taken once."""
        taken = [item for item in self._due if item.arrival_seconds <= now_seconds]
        if taken:
            self._due = self._due[len(taken) :]
            self._in_engine += len(taken)
        return taken

    def finished(self, request: Request, now_seconds: float) -> None:  # noqa: ARG002 - of the protocol
        """Send the next one of this point, or begin the next point when this one is drained."""
        self._in_engine -= 1
        if now_seconds < self._point_ends:
            self._send(now_seconds)
        elif self._in_engine == 0 and not self._due:
            self._begin_point(now_seconds + self._pause)

    def _begin_point(self, start_seconds: float) -> None:
        self._point_index += 1
        if self._point_index >= len(self._points):
            return
        point = self._points[self._point_index]
        self._point_ends = start_seconds + point.duration_seconds
        for _ in range(point.concurrency):
            self._send(start_seconds)

    def _send(self, arrival_seconds: float) -> None:
        self._number += 1
        prompt, output = self._points[self._point_index].lengths.draw(self._generator)
        self._due.append(Request(self._number, arrival_seconds, prompt, output))
