"""vLLM's per-step statistics as states; what `throttle.engines.vllm_stat_logger` sends.

vLLM hands its loggers two objects after each step: `SchedulerStats` (what runs and waits) and
`IterationStats` (what came out). They name no requests before they finish. Requests are followed
all the same: a first token comes with its TTFT, a finished request with its end-to-end latency, and
both count from the same arrival, which makes it the request's name.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Arrivals closer than this are the same: both latencies are differences of the same floats.
_ARRIVAL_RESOLUTION_SECONDS: Final = 1e-4

#: Followed requests beyond those that the engine has, before the oldest count as aborted: vLLM does
#: not tell its loggers of requests whose client went away.
_STALE_REQUESTS: Final = 64

#: Iterations longer than this are no iterations: the engine slept in between.
_LONGEST_ITERATION_SECONDS: Final = 60.0


class _Request:
    __slots__ = ("arrival_key", "number", "prompt_tokens")

    def __init__(self, number: int, arrival_key: int, prompt_tokens: int) -> None:
        self.number = number
        self.arrival_key = arrival_key
        self.prompt_tokens = prompt_tokens


class StatisticsReader:
    """Turns what one engine core's `record` receives into states.

    Args:
        trust_elapsed: Whether `iteration_details.elapsed_ms` is the step's duration; it is not
            under asynchronous scheduling, where the host waits for half of it only.
    """

    def __init__(self, *, trust_elapsed: bool) -> None:
        self._trust_elapsed = trust_elapsed
        self._last_number = 0
        self._requests: dict[int, _Request] = {}  # by number, oldest first
        self._by_arrival: dict[int, deque[_Request]] = {}
        self._context_tokens = 0  # prompts and answers of the requests that generate
        self._held: tuple[engine_pb2.IterationState, float] | None = None
        self._queued_count = 0
        self._last_seconds: float | None = None  # None: the engine was idle before

    def read(
        self,
        scheduler: Any,
        iteration: Any,
        now_seconds: float,
    ) -> tuple[engine_pb2.IterationState, bool] | None:
        """One call of `record`.

        Args:
            scheduler: `SchedulerStats`, or None.
            iteration: `IterationStats`, or None where no request got a token.
            now_seconds: Engine time of the call.

        Returns:
            The state and whether the engine is idle after it; None when no step ran.
        """
        if scheduler is None:
            return None
        waiting = _get(scheduler, "num_waiting_reqs") + _get(scheduler, "num_skipped_waiting_reqs")
        idle = _get(scheduler, "num_running_reqs") + waiting == 0
        details = getattr(scheduler, "iteration_details", None)
        state = engine_pb2.IterationState()
        self._queued_count = state.queued.num_prefill_requests = waiting
        state.kv_cache.usage_ratio = min(max(float(_get(scheduler, "kv_cache_usage")), 0.0), 1.0)
        before = self._context_tokens
        firsts, decodes = (), 0
        if iteration is not None:
            firsts = tuple(getattr(iteration, "time_to_first_tokens_iter", ()))
            decodes = len(getattr(iteration, "inter_token_latencies_iter", ()))
        self._read_work(state, details, iteration, len(firsts), decodes)
        state.scheduled.sum_decode_kv_tokens = before if state.scheduled.num_decode_requests else 0
        if iteration is not None:
            state.request_events.extend(self._first_tokens(iteration, firsts))
            # what is not a first token lengthens a request that generates already
            self._context_tokens += max(_get(iteration, "num_generation_tokens") - len(firsts), 0)
            state.request_events.extend(self._finished(iteration))
        state.request_events.extend(self._vanished(_get(scheduler, "num_running_reqs") + waiting))
        _read_speculation(state, getattr(scheduler, "spec_decoding_stats", None))
        _read_counters(state, getattr(scheduler, "perf_stats", None))
        if self._held is not None:
            _carry_over(*self._held, state, now_seconds)
            self._held = None
        worked = details is not None or bool(firsts) or decodes > 0
        self._date(state, details, firsts, now_seconds, worked=worked)
        self._last_seconds = None if idle else now_seconds
        if worked or (idle and state.request_events):
            return state, idle
        if state.request_events:  # no step ran: the next one brings them along
            self._held = state, now_seconds
        return None

    def arrival(self) -> engine_pb2.IterationState:
        """A heartbeat that tells of one more request than the last statistics did."""
        self._queued_count += 1
        state = engine_pb2.IterationState(phase=engine_pb2.ITERATION_PHASE_HEARTBEAT)
        state.queued.num_prefill_requests = self._queued_count
        return state

    def _read_work(
        self,
        state: engine_pb2.IterationState,
        details: Any,
        iteration: Any,
        firsts_count: int,
        decodes_count: int,
    ) -> None:
        work = state.scheduled
        if details is not None:
            work.num_prefill_requests = _get(details, "num_ctx_requests")
            work.sum_prefill_tokens = _get(details, "num_ctx_tokens")
            work.num_decode_requests = _get(details, "num_generation_requests")
            work.num_decode_tokens = _get(details, "num_generation_tokens")
        elif iteration is not None:
            # without details, chunks that complete no prompt are not seen, and the last one counts
            # for all of them
            computed = getattr(getattr(iteration, "prompt_token_stats", None), "computed", None)
            work.num_prefill_requests = firsts_count
            work.sum_prefill_tokens = (
                computed if computed is not None else _get(iteration, "num_prompt_tokens")
            )
            work.num_decode_requests = decodes_count

    def _date(
        self,
        state: engine_pb2.IterationState,
        details: Any,
        firsts: tuple[float, ...],
        now_seconds: float,
        *,
        worked: bool,
    ) -> None:
        state.phase = engine_pb2.ITERATION_PHASE_HEARTBEAT
        if not worked:
            return
        elapsed = _get(details, "elapsed_ms") / 1e3 if details is not None else 0.0
        if self._trust_elapsed and elapsed > 0:
            duration, source = elapsed, engine_pb2.TIMING_SOURCE_HOST_STEP
        elif self._last_seconds is not None:
            duration = now_seconds - self._last_seconds
            source = engine_pb2.TIMING_SOURCE_HOST_INTERVAL
        else:  # the first step after idleness: it took at most as long as its shortest TTFT
            duration = elapsed or min(firsts, default=0.0)
            source = engine_pb2.TIMING_SOURCE_HOST_STEP
        if 0 < duration < _LONGEST_ITERATION_SECONDS:
            state.phase = engine_pb2.ITERATION_PHASE_COMPLETED
            state.iteration_duration_seconds = duration
            state.timing_source = source

    def _first_tokens(
        self,
        iteration: Any,
        firsts: tuple[float, ...],
    ) -> Iterator[engine_pb2.RequestEvent]:
        if not firsts:
            return
        timestamp = _get(iteration, "iteration_timestamp")
        tokens = int(_get(iteration, "num_prompt_tokens"))
        cached = int(_get(getattr(iteration, "prompt_token_stats", None), "cached_tokens"))
        for index, ttft in enumerate(firsts):
            left = len(firsts) - index
            prompt, hit = tokens // left, cached // left  # exact alone, an even share otherwise
            tokens, cached = tokens - prompt, cached - hit
            self._last_number += 1
            prompt = max(prompt, 1)
            key = round((timestamp - ttft) / _ARRIVAL_RESOLUTION_SECONDS)
            request = _Request(self._last_number, key, prompt)
            self._requests[request.number] = request
            self._by_arrival.setdefault(key, deque()).append(request)
            self._context_tokens += prompt + 1
            yield engine_pb2.RequestEvent(
                kind=engine_pb2.REQUEST_EVENT_KIND_ARRIVED,
                request_number=request.number,
                age_seconds=max(ttft, 0.0),
                prompt_tokens=prompt,
                cached_tokens=min(hit, prompt),
            )
            yield engine_pb2.RequestEvent(
                kind=engine_pb2.REQUEST_EVENT_KIND_FIRST_TOKEN, request_number=request.number
            )

    def _finished(self, iteration: Any) -> Iterator[engine_pb2.RequestEvent]:
        timestamp = _get(iteration, "iteration_timestamp")
        for finished in getattr(iteration, "finished_requests", ()):
            request = self._take(timestamp - _get(finished, "e2e_latency"))
            generated = int(_get(finished, "num_generation_tokens"))
            if request is None:
                continue  # ended before its first token, or lived before this logger
            self._context_tokens -= request.prompt_tokens + generated
            if self._context_tokens < 0 or not self._requests:
                self._context_tokens = 0
            aborted = "abort" in str(getattr(finished, "finish_reason", "")).lower()
            yield engine_pb2.RequestEvent(
                kind=engine_pb2.REQUEST_EVENT_KIND_ABORTED
                if aborted
                else engine_pb2.REQUEST_EVENT_KIND_FINISHED,
                request_number=request.number,
                generated_tokens=generated,
            )

    def _vanished(self, live_count: int) -> Iterator[engine_pb2.RequestEvent]:
        allowed = live_count + _STALE_REQUESTS if live_count else 0
        while len(self._requests) > allowed:
            request = next(iter(self._requests.values()))
            self._drop(request)
            yield engine_pb2.RequestEvent(
                kind=engine_pb2.REQUEST_EVENT_KIND_ABORTED, request_number=request.number
            )
        if not self._requests:
            self._context_tokens = 0

    def _take(self, arrival_seconds: float) -> _Request | None:
        key = round(arrival_seconds / _ARRIVAL_RESOLUTION_SECONDS)
        for near in (key, key - 1, key + 1):
            same = self._by_arrival.get(near)
            if same:
                request = same[0]
                self._drop(request)
                return request
        return None

    def _drop(self, request: _Request) -> None:
        del self._requests[request.number]
        same = self._by_arrival[request.arrival_key]
        same.remove(request)
        if not same:
            del self._by_arrival[request.arrival_key]


def _carry_over(
    held: engine_pb2.IterationState,
    held_seconds: float,
    state: engine_pb2.IterationState,
    now_seconds: float,
) -> None:
    own = list(state.request_events)
    del state.request_events[:]
    for event in held.request_events:
        event.age_seconds += max(now_seconds - held_seconds, 0.0)
    state.request_events.extend(held.request_events)
    state.request_events.extend(own)


def _read_speculation(state: engine_pb2.IterationState, stats: Any) -> None:
    if stats is None:
        return
    drafted = int(_get(stats, "num_draft_tokens"))
    state.speculative_decoding.draft_tokens_count = drafted
    state.speculative_decoding.accepted_tokens_count = min(
        int(_get(stats, "num_accepted_tokens")), drafted
    )


def _read_counters(state: engine_pb2.IterationState, stats: Any) -> None:
    if stats is None:
        return
    state.work_counters.flops_count = float(_get(stats, "num_flops_per_gpu"))
    state.work_counters.read_bytes = float(_get(stats, "num_read_bytes_per_gpu"))
    state.work_counters.write_bytes = float(_get(stats, "num_write_bytes_per_gpu"))


def _get(holder: object, name: str) -> Any:
    value = getattr(holder, name, 0)
    return 0 if value is None else value
