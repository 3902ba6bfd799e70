"""`throttle.control.projection.project` compiled, planned lengths included.

The same horizon in one pass over the requests; the prompt plan is the definition's, with arrays for
its lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from predictors.prediction import SHAPE_COLUMNS
from throttle.control.compiled.compiler import compiled
from throttle.control.projection import (
    DECODE_SEGMENT_ITERATIONS,
    EXACT_PREFILL_SEGMENTS,
    Horizon,
    Positions,
)
from throttle.control.scoreboard import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.lengths import LengthTable
    from throttle.control.projection import Successors
    from throttle.control.scoreboard import LiveRequests
    from throttle.control.state import EngineProfile

_COLUMNS_COUNT = len(Column)
_SHAPE_WIDTH = len(SHAPE_COLUMNS)
_DECODE_ITERATIONS = np.array(DECODE_SEGMENT_ITERATIONS, dtype=np.float64)

# Columns as plain numbers: compiled code takes them for constants.
_PROMPT = int(Column.PROMPT)
_TARGET = int(Column.TARGET)
_COMPUTED = int(Column.COMPUTED)
_GENERATED = int(Column.GENERATED)
_MAX_OUTPUT = int(Column.MAX_OUTPUT)
_PREDICTED_OUTPUT = int(Column.PREDICTED_OUTPUT)
_LENGTH_CLASS = int(Column.LENGTH_CLASS)


def project(
    live: LiveRequests,
    lengths: LengthTable,
    profile: EngineProfile,
    successors: Successors | None = None,
) -> Horizon:
    """As `throttle.control.projection.project`, with lengths planned as by `LengthBeliefs`.

    Args:
        live: Rows of the running and waiting requests.
        lengths: Curves of the answers' classes.
        profile: The engine's limits.
        successors: Who will take the place of those that end; None for nobody.
    """
    (
        shapes,
        iterations,
        kv_blocks,
        prefill_count,
        admitted_count,
        first_segments,
        first_iterations,
        prompts,
        prompt_lengths,
        decodes,
        remaining,
    ) = project_rows(
        live.running,
        live.waiting,
        lengths.starts,
        lengths.expected_remaining,
        lengths.excess,
        float(profile.batched_tokens_limit),
        profile.running_requests_limit,
        profile.kv_blocks_count,
        profile.kv_block_tokens,
        -1.0 if successors is None else float(successors.batch_requests),
        0.0 if successors is None else float(successors.context_tokens),
    )
    return Horizon(
        shapes=shapes,
        iterations=iterations,
        kv_blocks=kv_blocks,
        prefill_segments_count=prefill_count,
        blocked_requests_count=len(live.waiting) - admitted_count,
        first_tokens=Positions(first_segments, first_iterations),
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        decodes=decodes,
        remaining_tokens=remaining,
    )


@compiled
def _planned_tokens(
    row: NDArray[np.float64],
    starts: NDArray[np.float64],
    expected_remaining: NDArray[np.float64],
) -> float:
    """`LengthBeliefs.planned_tokens` of one request."""
    generated = row[_GENERATED]
    place = np.searchsorted(starts, generated, side="right") - 1
    remaining = expected_remaining[int(row[_LENGTH_CLASS]), place]
    predicted = row[_PREDICTED_OUTPUT] - generated
    if predicted > 0.0:  # NaN compares false
        remaining = predicted
    limit = max(row[_MAX_OUTPUT] - generated, 1.0)
    planned: float = max(np.ceil(min(remaining, limit)), 1.0)
    return planned


@compiled
def _admit(
    row: NDArray[np.float64], slots: int, free_blocks: float, block_tokens: int
) -> tuple[float, float, float]:
    """Blocks, tokens left and tokens in KV of a waiting request; no blocks if it must wait."""
    blocks = np.ceil(row[_TARGET] / block_tokens)
    if slots <= 0 or blocks > free_blocks:
        return 0.0, 0.0, 0.0
    # a prompt found whole in the prefix cache still computes its last token
    cached = min(row[_COMPUTED], row[_TARGET] - 1.0)
    return blocks, row[_TARGET] - cached, cached


@compiled
def project_rows(
    running: NDArray[np.float64],
    waiting: NDArray[np.float64],
    starts: NDArray[np.float64],
    expected_remaining: NDArray[np.float64],
    excess: NDArray[np.float64],
    tokens_limit: float,
    requests_limit: int,
    blocks_count: int,
    block_tokens: int,
    successors_batch: float,
    successors_context: float,
) -> tuple[
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
    int,
    int,
    NDArray[np.int64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
]:
    """What a `Horizon` holds, and how many waiting requests were admitted."""
    prefilling_count = 0
    free_blocks = float(blocks_count)
    for request in range(len(running)):
        row = running[request]
        prefilling_count += row[_COMPUTED] < row[_TARGET]
        held = max(row[_TARGET], row[_PROMPT] + row[_GENERATED])
        free_blocks -= np.ceil(held / block_tokens)
    decodes_count = len(running) - prefilling_count
    decodes = np.empty((decodes_count, _COLUMNS_COUNT))
    remaining = np.empty(decodes_count)
    most = prefilling_count + len(waiting)
    prompts, prompt_lengths = np.empty((most, _COLUMNS_COUNT)), np.empty(most)
    left, in_kv = np.empty(most), np.empty(most)
    first_segments, first_iterations = np.zeros(most, np.int64), np.zeros(most)
    known, decoding = 0, 0
    for request in range(len(running)):
        row = running[request]
        planned = _planned_tokens(row, starts, expected_remaining)
        if row[_COMPUTED] < row[_TARGET]:
            prompts[known], prompt_lengths[known] = row, planned
            left[known], in_kv[known] = row[_TARGET] - row[_COMPUTED], row[_COMPUTED]
            known += 1
        else:
            decodes[decoding], remaining[decoding] = row, planned
            decoding += 1
    # _PromptPlan: chunks of the next iterations, prompts in order, within the token budget
    chunks = np.zeros((EXACT_PREFILL_SEGMENTS + 1, 4))
    prefill = np.zeros(EXACT_PREFILL_SEGMENTS + 1)
    segments, first = 0, 0
    slots = requests_limit - len(running)
    generating = float(decodes_count)
    unfinished = True
    while segments < EXACT_PREFILL_SEGMENTS:
        budget = tokens_limit - generating
        index, taken = first, 0
        while budget > 0.0:
            if index == known:
                admitted = known - prefilling_count
                if admitted == len(waiting):
                    break
                row = waiting[admitted]
                blocks, tokens, cached = _admit(row, slots, free_blocks, block_tokens)
                if blocks == 0.0:
                    break
                free_blocks, slots = free_blocks - blocks, slots - 1
                prompts[known], left[known], in_kv[known] = row, tokens, cached
                prompt_lengths[known] = _planned_tokens(row, starts, expected_remaining)
                known += 1
            chunk = min(left[index], budget)
            chunks[segments, 0] += 1.0
            chunks[segments, 1] += chunk
            chunks[segments, 2] += in_kv[index]
            chunks[segments, 3] += chunk * (in_kv[index] + 0.5 * chunk)
            taken += 1
            budget -= chunk
            left[index] -= chunk
            in_kv[index] += chunk
            if left[index] > 0.0:
                break
            first_segments[index], first_iterations[index] = segments, 1.0
            index += 1
        if taken == 0:
            unfinished = False
            break
        prefill[segments] = 1.0
        segments += 1
        generating += index - first
        first = index
    if unfinished:  # every prompt that is left, as one segment of equal iterations
        while known - prefilling_count < len(waiting):
            row = waiting[known - prefilling_count]
            blocks, tokens, cached = _admit(row, slots, free_blocks, block_tokens)
            if blocks == 0.0:
                break
            free_blocks, slots = free_blocks - blocks, slots - 1
            prompts[known], left[known], in_kv[known] = row, tokens, cached
            prompt_lengths[known] = _planned_tokens(row, starts, expected_remaining)
            known += 1
        count = known - first
        if count:
            budget = max(tokens_limit - generating, 1.0)
            rest, context, pairs = 0.0, 0.0, 0.0
            for index in range(first, known):
                rest += left[index]
                context += in_kv[index] + 0.5 * left[index]
                pairs += left[index] * (in_kv[index] + 0.5 * left[index])
            needed = np.ceil(rest / budget)
            each = count / needed
            chunks[segments] = (each, rest / needed, each * context / count, pairs / needed)
            prefill[segments] = needed
            passed = 0.0
            for index in range(first, known):
                passed += left[index]
                first_segments[index] = segments
                first_iterations[index] = min(np.ceil(passed / budget), needed)
            segments += 1
    # _Generating: requests as generators of tokens, one per iteration
    total = decodes_count + known
    start, tokens_left, context_held = np.zeros(total), np.empty(total), np.empty(total)
    prefill_iterations = prefill[:segments].sum()
    last = 0.0
    for request in range(total):
        if request < decodes_count:
            row = decodes[request]
            tokens_left[request] = remaining[request]
            context_held[request] = row[_PROMPT] + row[_GENERATED]
        else:
            index = request - decodes_count
            begun = first_iterations[index] + prefill[: first_segments[index]].sum()
            start[request] = begun
            tokens_left[request] = prompt_lengths[index] - 1.0
            context_held[request] = prompts[index, _TARGET] + 1.0
        last = max(last, start[request] + tokens_left[request])
    # _segment_lengths
    after = last - prefill_iterations
    iterations = np.empty(segments + len(_DECODE_ITERATIONS))
    iterations[:segments] = prefill[:segments]
    used, passed = segments, 0.0
    for length in _DECODE_ITERATIONS:
        if passed < after:
            iterations[used] = min(length, after - passed)
            used += 1
        passed += length
    # _lay_over
    shapes, kv_blocks = np.zeros((used, _SHAPE_WIDTH)), np.zeros(used)
    end_of_segment = 0.0
    for segment in range(used):
        length = iterations[segment]
        begin_of_segment = end_of_segment
        end_of_segment += length
        batch = context = blocks = 0.0
        for request in range(total):
            begin = max(begin_of_segment, start[request])
            end = min(end_of_segment, start[request] + tokens_left[request])
            alive = max(end - begin, 0.0)
            held = context_held[request] - start[request] + begin
            batch += alive
            context += alive * held + alive * (alive - 1.0) / 2.0
            if alive > 0.0 and end >= end_of_segment:
                blocks += np.ceil((held + alive) / block_tokens)
            elif start[request] >= end_of_segment:
                blocks += np.ceil((context_held[request] - 1.0) / block_tokens)
        if segment < segments:
            shapes[segment, 0], shapes[segment, 1] = chunks[segment, 0], chunks[segment, 1]
            shapes[segment, 2], shapes[segment, 6] = chunks[segment, 2], chunks[segment, 3]
        shapes[segment, 3] = shapes[segment, 5] = batch / length
        shapes[segment, 4] = context / length
        kv_blocks[segment] = blocks
        if successors_batch >= 0.0:  # Successors.join
            middle = end_of_segment - 0.5 * length
            place = min(np.searchsorted(starts, middle, side="right") - 1, len(starts) - 2)
            width = starts[place + 1] - starts[place]
            slope = (excess[place + 1] - excess[place]) / width
            staying = excess[place] + slope * (min(middle, starts[-1]) - starts[place])
            joined = successors_batch * (1.0 - staying)
            shapes[segment, 3] += joined
            shapes[segment, 4] += joined * successors_context
            shapes[segment, 5] += joined
    return (
        shapes,
        iterations[:used].copy(),
        kv_blocks,
        segments,
        known - prefilling_count,
        first_segments[:known].copy(),
        first_iterations[:known].copy(),
        prompts[:known].copy(),
        prompt_lengths[:known].copy(),
        decodes,
        remaining,
    )
