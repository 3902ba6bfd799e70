"""TensorRT-LLM's iteration statistics as states.

`trtllm-serve` gives them as JSON at `/metrics` when `enable_iter_perf_stats` is set: one object per
iteration since the last poll, after it ran. Field names are those of TensorRT-LLM's `types.h` and
its PyTorch backend; the numbers of tokens in KV came in spring 2026.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class IterationStatisticsReader:
    """Turns polled statistics into states.

    Args:
        rank: Which attention data-parallel rank counts.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._last_iteration = -1
        self.missed_count = 0

    def read(
        self, statistics: Iterable[dict[str, Any]]
    ) -> Iterator[tuple[float, engine_pb2.IterationState]]:
        """The iterations of one poll, oldest first.

        Yields:
            How many seconds before the last of them each ended, and its state. Iterations told
            before, of other ranks, and without work are left out.
        """
        fresh = []
        for entry in statistics:
            if int(entry.get("attentionDpRank", self._rank) or 0) != self._rank:
                continue
            number = int(entry.get("iter", -1))
            if number == self._last_iteration:
                continue
            if 0 <= self._last_iteration < number - 1:  # a lower number is an engine started anew
                self.missed_count += number - self._last_iteration - 1
            self._last_iteration = number
            state = _state(entry)
            if state is not None:
                fresh.append(state)
        left = sum(state.iteration_duration_seconds for state in fresh)
        for state in fresh:
            left -= state.iteration_duration_seconds
            yield max(left, 0.0), state


def _state(entry: dict[str, Any]) -> engine_pb2.IterationState | None:
    seconds = float(entry.get("iterLatencyMS") or 0.0) / 1e3
    if not seconds > 0.0:
        return None
    batch = entry.get("inflightBatchingStats") or {}
    cache = entry.get("kvCacheStats") or {}
    state = engine_pb2.IterationState(
        phase=engine_pb2.ITERATION_PHASE_COMPLETED,
        iteration_duration_seconds=seconds,
        timing_source=engine_pb2.TIMING_SOURCE_HOST_STEP,
    )
    used = _count(cache, "usedNumBlocks")
    total = _count(cache, "maxNumBlocks")
    if total:
        state.kv_cache.used_blocks_count = min(used, total)
        state.kv_cache.total_blocks_count = total
    work = state.scheduled
    work.num_prefill_requests = _count(batch, "numContextRequests")
    work.sum_prefill_tokens = _count(batch, "numCtxTokens")
    work.sum_prefill_kv_tokens = _count(batch, "numCtxKvTokens")
    work.num_decode_requests = _count(batch, "numGenRequests")
    if not (work.num_prefill_requests or work.num_decode_requests):
        # zero means "not tracked" on the older backend: what is active is taken to generate
        work.num_decode_requests = _count(entry, "numActiveRequests")
    if not (work.num_prefill_requests or work.num_decode_requests):
        return None
    if "numGenKvTokens" in batch:
        work.sum_decode_kv_tokens = _count(batch, "numGenKvTokens")
    elif work.num_decode_requests:
        held = used * _count(cache, "tokensPerBlock")
        work.sum_decode_kv_tokens = max(held - work.sum_prefill_kv_tokens, 0)
    queued = state.queued
    queued.num_prefill_requests = _count(
        batch, "numQueuedContextRequests", _count(entry, "numQueuedRequests")
    )
    queued.sum_prefill_tokens = _count(batch, "numQueuedCtxTokens")
    queued.num_decode_requests = _count(batch, "numPausedRequests") + _count(
        batch, "numQueuedGenRequests"
    )
    queued.sum_decode_kv_tokens = _count(batch, "numPausedKvTokens") + _count(
        batch, "numQueuedGenKvTokens"
    )
    return state


def _count(holder: dict[str, Any], name: str, default: int = 0) -> int:
    value = holder.get(name)
    return default if value is None else max(int(value), 0)
