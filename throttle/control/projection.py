"""What the next iterations will compute: the live requests turned into a horizon of segments.

A segment is a number of iterations of one shape. Prompt chunks get segments of their own, planned
as the engine will schedule them (running decodes first, then prompts in order, within the token
budget: chunked prefill as in vLLM v1). After them, decode segments of growing length follow to the
end of the horizon. Token sums are exact under the planned lengths: a decode segment's batch is the
mean over its iterations, so batch times iterations is the number of tokens it generates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.prediction import SHAPE_COLUMNS, estimated_attention_pairs
from throttle.control.scoreboard import Column, LiveRequests

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.lengths import LengthCurve
    from throttle.control.state import EngineProfile, ScheduledRequests

#: Prompt iterations planned one by one; what remains is planned as one segment.
EXACT_PREFILL_SEGMENTS = 8
#: Columns of a shape that prompts fill: requests, tokens, tokens in KV, query-key pairs.
_PROMPT_COLUMNS = (0, 1, 2, 6)
#: Lengths of the decode segments, iterations. Short ones first: the near future decides most.
DECODE_SEGMENT_ITERATIONS = (1, 1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Positions:
    """Moments in the horizon, one per request: `iterations` into segment `segments`, both (n,)."""

    segments: NDArray[np.int64]
    iterations: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Horizon:
    """The projected segments and where in them each request stands.

    Attributes:
        shapes: (K, 7), columns as in `SHAPE_COLUMNS`.
        iterations: Iterations per segment, (K,).
        kv_blocks: KV blocks held at the end of each segment, (K,).
        prefill_segments_count: How many leading segments compute prompts.
        blocked_requests_count: Waiting requests that find no slot or no KV blocks in the horizon.
        first_tokens: When each request in `prompts` produces its first token.
        prompts: Rows of the requests whose prompt is computed within the horizon, (p, columns).
        prompt_lengths: Planned output of `prompts`, tokens, (p,).
        decodes: Rows of the requests that generate now, (d, columns).
        remaining_tokens: Planned remaining output of `decodes`, (d,).
    """

    shapes: NDArray[np.float64]
    iterations: NDArray[np.float64]
    kv_blocks: NDArray[np.float64]
    prefill_segments_count: int
    blocked_requests_count: int
    first_tokens: Positions
    prompts: NDArray[np.float64]
    prompt_lengths: NDArray[np.float64]
    decodes: NDArray[np.float64]
    remaining_tokens: NDArray[np.float64]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return len(self.shapes) == 0

    def positions(self, iterations: NDArray[np.float64]) -> Positions:
        """The moments `iterations` from now, (n,); past the end, the last shape goes on."""
        ends = np.cumsum(self.iterations)
        segments = np.minimum(np.searchsorted(ends, iterations), len(ends) - 1)
        before = ends[segments] - self.iterations[segments]
        return Positions(segments, iterations - before)

    def iterations_at(self, positions: Positions) -> NDArray[np.float64]:
        """Iterations from now to each position, (n,)."""
        before = np.cumsum(self.iterations) - self.iterations
        return before[positions.segments] + positions.iterations


@dataclass(frozen=True, slots=True)
class Successors:
    """Requests to come that will take the place of those that end.

    Attributes:
        lengths: How long answers are.
        batch_requests: The batch that the load settles at.
        context_tokens: Mean context of a generating request.
    """

    lengths: LengthCurve
    batch_requests: float
    context_tokens: float

    def join(self, shapes: NDArray[np.float64], iterations: NDArray[np.float64]) -> None:
        """Add them to the generating requests of (K, 7) shapes, in place."""
        middles = np.cumsum(iterations) - 0.5 * iterations
        joined = self.batch_requests * self.lengths.successor_ratio(middles)
        shapes[:, 3] += joined
        shapes[:, 4] += joined * self.context_tokens
        shapes[:, 5] += joined


def project(
    live: LiveRequests,
    running_tokens: NDArray[np.float64],
    waiting_tokens: NDArray[np.float64],
    profile: EngineProfile,
    successors: Successors | None = None,
) -> Horizon:
    """Project per-request knowledge.

    Args:
        live: Rows of the running and waiting requests.
        running_tokens: Planned remaining output of each running request.
        waiting_tokens: The same of the waiting ones.
        profile: The engine's limits.
        successors: Who will take the place of those that end; None for nobody.
    """
    prefilling = live.running[:, Column.COMPUTED] < live.running[:, Column.TARGET]
    decodes = live.running[~prefilling]
    remaining = running_tokens[~prefilling]
    plan = _PromptPlan(live, prefilling, profile)
    plan.run()
    admitted = live.waiting[: plan.admitted_count]
    prompts = np.vstack([live.running[prefilling], admitted])
    prompt_lengths = np.concatenate([running_tokens[prefilling], waiting_tokens[: len(admitted)]])
    generating = _Generating.of(plan, decodes, remaining, prompts, prompt_lengths)
    shapes, iterations, kv_blocks = _lay_over(plan, generating, profile.kv_block_tokens)
    if successors is not None:
        successors.join(shapes, iterations)
    return Horizon(
        shapes=shapes,
        iterations=iterations,
        kv_blocks=kv_blocks,
        prefill_segments_count=len(plan.chunks),
        blocked_requests_count=len(live.waiting) - len(admitted),
        first_tokens=Positions(plan.first_segments, plan.first_iterations),
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        decodes=decodes,
        remaining_tokens=remaining,
    )


def project_aggregates(scheduled: ScheduledRequests, iterations: float) -> Horizon:
    """Project what aggregates alone allow: the present shape, held for `iterations`."""
    shapes = np.array([shape_of(scheduled)])
    nobody = np.empty((0, len(Column)))
    none = Positions(np.empty(0, dtype=np.int64), np.empty(0))
    return Horizon(
        shapes=shapes if shapes.any() else np.empty((0, len(SHAPE_COLUMNS))),
        iterations=np.array([iterations] if shapes.any() else []),
        kv_blocks=np.zeros(1 if shapes.any() else 0),
        prefill_segments_count=1 if scheduled.sum_prefill_tokens else 0,
        blocked_requests_count=0,
        first_tokens=none,
        prompts=nobody,
        prompt_lengths=np.empty(0),
        decodes=nobody,
        remaining_tokens=np.empty(0),
    )


def shape_of(scheduled: ScheduledRequests) -> tuple[float, ...]:
    """The shape of one iteration from its aggregates, in the order of `SHAPE_COLUMNS`."""
    decode_tokens = scheduled.num_decode_tokens
    pairs = scheduled.prefill_attention_pairs
    if pairs is None:
        pairs = estimated_attention_pairs(
            scheduled.num_prefill_requests,
            scheduled.sum_prefill_tokens,
            scheduled.sum_prefill_kv_tokens,
        )
    return (
        float(scheduled.num_prefill_requests),
        float(scheduled.sum_prefill_tokens),
        float(scheduled.sum_prefill_kv_tokens),
        float(scheduled.num_decode_requests),
        float(scheduled.sum_decode_kv_tokens),
        float(scheduled.num_decode_requests if decode_tokens is None else decode_tokens),
        float(pairs),
    )


class _PromptPlan:
    """Plans the prompt chunks of the next iterations, as the engine's scheduler will.

    Attributes:
        chunks: Per segment, in the order of `_PROMPT_COLUMNS`, per iteration.
        iterations: Per segment, how many iterations.
        admitted_count: Waiting requests that were taken.
        first_segments: Per prompt (running ones, then admitted ones), segment of its last chunk.
        first_iterations: Per prompt, iterations into that segment until its first token.
    """

    def __init__(
        self, live: LiveRequests, prefilling: NDArray[np.bool_], profile: EngineProfile
    ) -> None:
        running = live.running
        self._left = list(running[prefilling, Column.TARGET] - running[prefilling, Column.COMPUTED])
        self._in_kv = list(running[prefilling, Column.COMPUTED])
        self._waiting = live.waiting
        self._decode_count = float(np.count_nonzero(~prefilling))
        self._budget = float(profile.batched_tokens_limit)
        self._slots = profile.running_requests_limit - len(running)
        self._block_tokens = profile.kv_block_tokens
        held = np.maximum(
            running[:, Column.TARGET], running[:, Column.PROMPT] + running[:, Column.GENERATED]
        )
        self._free_blocks = profile.kv_blocks_count - float(
            np.ceil(held / self._block_tokens).sum()
        )
        self._first: list[tuple[int, float]] = [(0, 0.0)] * len(self._left)
        self.chunks: list[tuple[float, float, float, float]] = []
        self.iterations: list[float] = []
        self.admitted_count = 0

    @property
    def first_segments(self) -> NDArray[np.int64]:
        return np.array([segment for segment, _ in self._first], dtype=np.int64)

    @property
    def first_iterations(self) -> NDArray[np.float64]:
        return np.array([iterations for _, iterations in self._first], dtype=np.float64)

    def run(self) -> None:
        """Plan until no prompt is left, the rest in one segment if they are many."""
        first_unfinished = 0
        while len(self.chunks) < EXACT_PREFILL_SEGMENTS:
            first_unfinished = self._plan_one(first_unfinished)
            if first_unfinished < 0:
                return
        self._plan_rest(first_unfinished)

    def _admit(self) -> bool:
        """Take the next waiting request, if a slot and blocks for its prompt are free."""
        if self.admitted_count >= len(self._waiting) or self._slots <= 0:
            return False
        row = self._waiting[self.admitted_count]
        blocks = math.ceil(row[Column.TARGET] / self._block_tokens)
        if blocks > self._free_blocks:
            return False
        self._free_blocks -= blocks
        self._slots -= 1
        self.admitted_count += 1
        # A prompt found whole in the prefix cache still computes its last token.
        cached = min(row[Column.COMPUTED], row[Column.TARGET] - 1)
        self._left.append(row[Column.TARGET] - cached)
        self._in_kv.append(cached)
        self._first.append((0, 0.0))
        return True

    def _plan_one(self, start: int) -> int:
        """Plan one iteration; returns the first unfinished prompt, or -1 when none is left."""
        budget = self._budget - self._decode_count
        tokens = context = pairs = 0.0
        chunks = 0
        index = start
        while budget > 0 and (index < len(self._left) or self._admit()):
            chunk = min(self._left[index], budget)
            tokens += chunk
            context += self._in_kv[index]
            pairs += chunk * (self._in_kv[index] + 0.5 * chunk)
            chunks += 1
            budget -= chunk
            self._left[index] -= chunk
            self._in_kv[index] += chunk
            if self._left[index] > 0:
                break
            self._first[index] = (len(self.chunks), 1.0)
            index += 1
        if chunks == 0:
            return -1
        self.chunks.append((chunks, tokens, context, pairs))
        self.iterations.append(1.0)
        self._decode_count += index - start
        return index

    def _plan_rest(self, start: int) -> None:
        """Plan every prompt that is left as one segment of equal iterations."""
        while self._admit():
            pass
        left = np.array(self._left[start:])
        if not len(left):
            return
        budget = max(self._budget - self._decode_count, 1.0)
        iterations = math.ceil(left.sum() / budget)
        segment = len(self.chunks)
        per_iteration = len(left) / iterations
        in_kv = np.array(self._in_kv[start:])
        context = float(np.mean(in_kv + left / 2))
        pairs = float((left * (in_kv + left / 2)).sum()) / iterations
        tokens = left.sum() / iterations
        self.chunks.append((per_iteration, tokens, per_iteration * context, pairs))
        self.iterations.append(float(iterations))
        for offset, iteration in enumerate(np.ceil(np.cumsum(left) / budget)):
            self._first[start + offset] = (segment, float(min(iteration, iterations)))


@dataclass(frozen=True, slots=True)
class _Generating:
    """Requests as generators of tokens, one per iteration; (n,) each.

    Attributes:
        start: Iteration from now at which each begins.
        left: Tokens it will generate from then on.
        context: Tokens that it holds in KV then.
    """

    start: NDArray[np.float64]
    left: NDArray[np.float64]
    context: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        plan: _PromptPlan,
        decodes: NDArray[np.float64],
        remaining: NDArray[np.float64],
        prompts: NDArray[np.float64],
        prompt_lengths: NDArray[np.float64],
    ) -> _Generating:
        before = np.concatenate([[0.0], np.cumsum(plan.iterations)])
        prompt_start = before[plan.first_segments] + plan.first_iterations
        held = decodes[:, Column.PROMPT] + decodes[:, Column.GENERATED]
        return cls(
            np.concatenate([np.zeros(len(decodes)), prompt_start]),
            np.concatenate([remaining, prompt_lengths - 1.0]),
            np.concatenate([held, prompts[:, Column.TARGET] + 1.0]),
        )


def _lay_over(
    plan: _PromptPlan, generating: _Generating, block_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Lay the generating requests over the plan; returns shapes, iterations, KV blocks."""
    prefill = np.array(plan.iterations)
    start, left, context = generating.start, generating.left, generating.context
    lengths = _segment_lengths(prefill, float((start + left).max(initial=0.0) - prefill.sum()))
    ends = np.cumsum(lengths)
    # All (n, K): the iterations of each segment in which each request generates.
    begin = np.maximum(ends - lengths, start[:, None])
    end = np.minimum(ends, (start + left)[:, None])
    alive = np.maximum(end - begin, 0.0)
    held = context[:, None] - start[:, None] + begin
    shapes = np.zeros((len(lengths), len(SHAPE_COLUMNS)))
    shapes[: len(prefill), _PROMPT_COLUMNS] = np.array(plan.chunks).reshape(-1, 4)
    shapes[:, 3] = shapes[:, 5] = alive.sum(axis=0) / lengths
    shapes[:, 4] = (alive * held + alive * (alive - 1.0) / 2.0).sum(axis=0) / lengths
    going_on = (alive > 0) & (end >= ends)
    computing = start[:, None] >= ends
    tokens = np.where(going_on, held + alive, np.where(computing, context[:, None] - 1.0, 0.0))
    return shapes, lengths, np.ceil(tokens / block_tokens).sum(axis=0)


def _segment_lengths(prefill: NDArray[np.float64], after: float) -> NDArray[np.float64]:
    """Iterations per segment: the prompt segments, then decode segments for `after` iterations."""
    lengths = np.array(DECODE_SEGMENT_ITERATIONS, dtype=np.float64)
    starts = np.cumsum(lengths) - lengths
    used = starts < after
    return np.concatenate([prefill, np.minimum(lengths[used], after - starts[used])])
