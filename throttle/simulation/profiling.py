"""A load that shows an engine everything a predictor should have seen.

A profiling run holds one load point after another: closed loops at batches from 1 to 256 with
contexts from short to long and answers from two tokens to hundreds, bare prompts of every chunk
size, full KV caches as far as the budget goes, and idle pauses. Whoever drives it changes clocks
meanwhile; this module only says which requests arrive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from throttle.simulation.requests import Request
from throttle.simulation.workload import Lengths

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

#: Steps of the golden ratio visit a list so that every beginning of it is spread over the whole.
_GOLDEN_STEP = (math.sqrt(5.0) - 1.0) / 2.0

#: Most prompt tokens that filling one load point may take: at the lowest clock more would eat
#: minutes before the first token is generated.
_FILLING_TOKENS_LIMIT = 262_144

#: Batches at which the KV cache is filled as far as it goes, how far that is, and how long answers
#: then are: they must outlast the filling, or the first requests leave before the last arrive.
_DEEP_BATCHES = (48, 192, 384)
_DEEP_RATIO = 0.9
_DEEP_TOKENS_LIMIT = 524_288
_DEEP_OUTPUTS = (256, 512)

#: Prompts that fill the KV cache may take this share of a profile. At least so many fillings must
#: fit, or a part of the rows (training, calibration, test) would hold none; more than five would
#: only eat the time of other points.
_FILLING_SHARE_RATIO = 0.15
_LEAST_FILLINGS_COUNT = 3
_MOST_FILLINGS_COUNT = 5

#: Idle power needs few pauses.
_PAUSE_EVERY = 4

#: Answers of a few tokens bring a prompt into every few iterations, long ones bring large contexts.
_OUTPUTS = ((2, 8), (8, 64), (64, 512))


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

    def shapes(self, batched_tokens_limit: int) -> tuple[tuple[float, ...], ...]:
        """What its iterations look like: one with a prompt, and one that only generates.

        Columns are those of `predictors.prediction.SHAPE_COLUMNS`.
        """
        prompt = math.sqrt(self.lengths.prompt_tokens[0] * self.lengths.prompt_tokens[1])
        output = math.sqrt(self.lengths.output_tokens[0] * self.lengths.output_tokens[1])
        context = prompt + output / 2.0
        others = float(self.concurrency - 1)
        tokens = min(prompt, batched_tokens_limit - others)
        mixed = (
            1.0,
            tokens,
            0.0,
            others,
            others * context,
            others,
            tokens * tokens / 2.0,
        )
        if output < 2.0:
            return (mixed, mixed)
        batch = float(self.concurrency)
        return (mixed, (0.0, 0.0, 0.0, batch, batch * context, batch, 0.0))


def profiling_points(
    kv_tokens: int,
    batched_tokens_limit: int,
    seconds_per_point: float = 2.0,
    largest_batch: int = 256,
    longest_context: int = 32768,
) -> tuple[LoadPoint, ...]:
    """Points that cover batch x context x chunk size within what the KV cache holds.

    Args:
        kv_tokens: Tokens that the KV cache holds.
        batched_tokens_limit: Most tokens computed in one iteration.
        seconds_per_point: Time per point.
        largest_batch: Largest number of requests held.
        longest_context: Longest prompt.

    Returns:
        The points in an order of which every beginning is spread over the whole.
    """
    points: list[LoadPoint] = []
    batch = 1
    while batch <= largest_batch:
        context = 128
        room = _filling_limit(kv_tokens)
        while context <= longest_context and batch * context <= room:
            points.extend(
                LoadPoint(
                    batch, Lengths((max(16, context // 2), context), outputs), seconds_per_point
                )
                for outputs in _OUTPUTS
            )
            context *= 4
        batch *= 2
    chunk = 64
    while chunk <= batched_tokens_limit:  # prompts alone: one token each, then gone
        lengths = Lengths((chunk // 2, chunk), (1, 1))
        points.extend(LoadPoint(concurrency, lengths, seconds_per_point) for concurrency in (1, 4))
        chunk *= 2
    positions = [(index * _GOLDEN_STEP) % 1.0 for index in range(len(points))]
    # the k-th step of the sequence takes the point at its place in the list
    order = sorted(range(len(points)), key=positions.__getitem__)
    return tuple(points[index] for index in _inverse(order))


@dataclass(frozen=True, slots=True)
class DeepFilling:
    """Which rounds of a profile begin with a full KV cache, and how full.

    Without such points long answers leave what was profiled. Minutes of prompts pay for seconds of
    deep decoding, so the prompts get a fixed share of the budget: an engine that computes prompts
    fast is filled in more rounds, a slow one in fewer, and the slowest less far.

    Attributes:
        kv_tokens: Tokens that the KV cache holds.
        budget_seconds: Engine time of the whole profile.
        rounds_count: Rounds that may be filled.
        point_seconds: Time during which requests are sent.
        longest_context: Longest prompt.
    """

    kv_tokens: int
    budget_seconds: float
    rounds_count: int
    point_seconds: float = 2.0
    longest_context: int = 32768

    def point(self, index: int, prompt_tokens_per_second: float) -> LoadPoint | None:
        """What the round `index` (from 0) begins with; None for nothing.

        Args:
            index: Which of the rounds that may be filled.
            prompt_tokens_per_second: How fast the engine was seen to compute full chunks.
        """
        affordable = _FILLING_SHARE_RATIO * self.budget_seconds * prompt_tokens_per_second
        deepest = _DEEP_RATIO * min(self.kv_tokens, _DEEP_TOKENS_LIMIT)
        depth = min(deepest, affordable / _LEAST_FILLINGS_COUNT)
        if not 0 <= index < self.rounds_count or depth <= _ordinary_depth(self.kv_tokens):
            return None
        fillings = min(int(affordable / depth), self.rounds_count, _MOST_FILLINGS_COUNT)
        before = math.ceil(index * fillings / self.rounds_count)
        if math.ceil((index + 1) * fillings / self.rounds_count) == before:
            return None
        # Prompts are drawn from half the context to all of it, three quarters on average.
        batches = [batch for batch in _DEEP_BATCHES if depth / batch / 0.75 <= self.longest_context]
        batch = batches[before % len(batches)]
        context = int(depth / batch / 0.75)
        lengths = Lengths((max(16, context // 2), context), _DEEP_OUTPUTS)
        return LoadPoint(batch, lengths, self.point_seconds)


def _filling_limit(kv_tokens: int) -> int:
    """Most tokens of the longest prompts of an ordinary point."""
    return min(kv_tokens // 2, _FILLING_TOKENS_LIMIT)


def _ordinary_depth(kv_tokens: int) -> float:
    """Tokens of KV that ordinary points reach; prompts are three quarters as long on average."""
    return 0.75 * _filling_limit(kv_tokens)


def chosen_points(
    points: Sequence[LoadPoint],
    uncertainty: Sequence[float],
    count: int,
    generator: random.Random,
) -> tuple[LoadPoint, ...]:
    """Points to play next: more often where predictions are less sure.

    Args:
        points: All there are.
        uncertainty: Of each, none negative.
        count: How many to draw.
        generator: Draws them.
    """
    mean = sum(uncertainty) / len(uncertainty) or 1.0
    # a third of the draws ignores the uncertainty: an ensemble may agree and be wrong
    weights = [0.5 + value / mean for value in uncertainty]
    return tuple(
        replace(point) for point in generator.choices(list(points), weights=weights, k=count)
    )


def _inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes this one."""
    inverse = [0] * len(order)
    for place, index in enumerate(order):
        inverse[index] = place
    return inverse


class SweepingLoad:
    """Plays load points one after another, each drained before the next begins.

    Args:
        points: The points, in order.
        pause_seconds: Idle time before each fourth point; the others follow at once.
        generator: Source of lengths.
        limit_seconds: No point begins after this time.
    """

    def __init__(
        self,
        points: Sequence[LoadPoint],
        pause_seconds: float,
        generator: random.Random,
        limit_seconds: float = math.inf,
    ) -> None:
        self._points = list(points)
        self._limit_seconds = limit_seconds
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
            pause = self._pause if self._point_index % _PAUSE_EVERY == 0 else 0.0
            self._begin_point(now_seconds + pause)

    def _begin_point(self, start_seconds: float) -> None:
        self._point_index += 1
        if start_seconds >= self._limit_seconds:
            self._point_index = len(self._points)
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
