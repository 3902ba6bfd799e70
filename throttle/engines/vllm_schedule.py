"""vLLM's scheduler seen from inside; what `throttle.engines.vllm_scheduler` sends.

A tap stands beside the scheduler and is told of each call. It reads requests and outputs by
attribute and needs no vLLM, so that it can be tested without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter, mul
from typing import TYPE_CHECKING, Any, Final

from throttle.engines.request_slos import read_slos
from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Iterations longer than this are no iterations: the engine slept in between.
_LONGEST_ITERATION_SECONDS: Final = 60.0

#: Plans remembered until their step completes; vLLM has two or three under way.
_PLANS_LIMIT: Final = 64

_COMPUTED: Final = attrgetter("num_computed_tokens")
_PROMPT: Final = attrgetter("num_prompt_tokens")
_GENERATED: Final = attrgetter("num_output_tokens")


@dataclass(slots=True)
class _Known:
    """A request of the engine: its number, vLLM's object, and what it has as a waiting one."""

    number: int
    request: Any
    queued_tokens: int
    preempted: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    output: object  # kept, so that its identity stays its own
    planned_seconds: float
    work: engine_pb2.ScheduledRequests
    draft_tokens_count: int


@dataclass(slots=True)
class _Rows:
    """What stays the same over steps that compute no prompt while the same requests run in order.

    A prompt that is computed stays so meanwhile: what is preempted leaves, and computes it anew.
    """

    running: list[Any]
    live: list[Any]  # those of them that are known
    prompts: list[int]
    constant: engine_pb2.RequestProgress
    prompts_computed: bool = False


class SchedulerTap:
    """Follows one scheduler's requests and turns its steps into states."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._waiting: dict[str, _Known] = {}
        self._unstarted: dict[str, _Known] = {}  # no output token yet
        self._last_number = 0
        self._plans: dict[int, _Plan] = {}
        self._events: list[tuple[float, engine_pb2.RequestEvent]] = []
        self._last_completed_seconds = float("-inf")
        self._rows: _Rows | None = None

    @property
    def idle(self) -> bool:
        """Whether no request lives."""
        return not self._known

    def arrive(self, request: Any, now_seconds: float, wall_seconds: float) -> None:
        """A request has been added.

        Args:
            request: vLLM's `Request`.
            now_seconds: Engine time.
            wall_seconds: Wall time, on which vLLM notes arrivals.
        """
        identifier = request.request_id
        if identifier in self._known:
            self._rows = None  # a further chunk of a streaming input: its prompt has grown
            return
        prompt = max(int(request.num_prompt_tokens), 1)
        self._last_number += 1
        known = _Known(self._last_number, request, prompt)
        self._known[identifier] = self._waiting[identifier] = self._unstarted[identifier] = known
        event = engine_pb2.RequestEvent(
            kind=engine_pb2.REQUEST_EVENT_KIND_ARRIVED,
            request_number=known.number,
            prompt_tokens=prompt,
        )
        age = wall_seconds - getattr(request, "arrival_time", wall_seconds)
        limit = getattr(request, "max_tokens", None)
        if isinstance(limit, int) and limit >= 1:
            event.max_output_tokens = limit
        extra = getattr(getattr(request, "sampling_params", None), "extra_args", None)
        if extra:
            read_slos(extra, event.slos)
        # the wall clock may have been set meanwhile: an age below zero is none
        self._events.append((now_seconds - max(age, 0.0), event))

    def plan(
        self,
        output: Any,
        requests: Mapping[str, Any],
        now_seconds: float,
    ) -> engine_pb2.IterationState | None:
        """A step has been scheduled and will run next.

        Args:
            output: vLLM's `SchedulerOutput`.
            requests: The scheduler's requests by id.
            now_seconds: Engine time.

        Returns:
            The planned state where prompts are computed: a step that only generates is what the
            step before it led to expect. None otherwise.
        """
        self._note_preempted(getattr(output, "preempted_req_ids", None) or ())
        scheduled = output.num_scheduled_tokens
        if not scheduled:
            return None
        work = self._read_work(output, scheduled, requests)
        drafts = getattr(output, "scheduled_spec_decode_tokens", None) or {}
        draft_tokens = sum(map(len, drafts.values()))
        if len(self._plans) >= _PLANS_LIMIT:  # steps that never came back
            self._plans.clear()
        self._plans[id(output)] = _Plan(output, now_seconds, work, draft_tokens)
        if not work.num_prefill_requests:
            return None
        state = engine_pb2.IterationState(
            phase=engine_pb2.ITERATION_PHASE_PLANNED, scheduled=work, queued=self._queued()
        )
        self._hand_over_events(state, now_seconds)
        return state

    def complete(
        self,
        output: Any,
        requests: Mapping[str, Any],
        running: list[Any],
        kv_usage_ratio: float,
        now_seconds: float,
    ) -> engine_pb2.IterationState | None:
        """A step has run and its tokens have been given out.

        Args:
            output: The step's `SchedulerOutput`.
            requests: The scheduler's requests by id, after the step.
            running: Its running requests, after the step.
            kv_usage_ratio: Share of the KV blocks in use.
            now_seconds: Engine time.

        Returns:
            The completed state; None for a step that computed nothing.
        """
        plan = self._plans.pop(id(output), None)
        if plan is None:
            return None
        state = engine_pb2.IterationState(
            phase=engine_pb2.ITERATION_PHASE_COMPLETED, scheduled=plan.work
        )
        self._date(state, plan, now_seconds)
        self._note_first_tokens(now_seconds)
        self.note_ended(requests, now_seconds)
        if plan.work.num_prefill_requests:
            self._rows = None
        state.progress.SetInParent()
        self._write_progress(state.progress, running)
        state.queued.CopyFrom(self._queued())
        state.kv_cache.usage_ratio = min(max(kv_usage_ratio, 0.0), 1.0)
        if plan.draft_tokens_count:
            state.speculative_decoding.draft_tokens_count = plan.draft_tokens_count
        self._hand_over_events(state, now_seconds)
        return state

    def _write_progress(self, progress: engine_pb2.RequestProgress, running: list[Any]) -> None:
        rows = self._rows
        # lists compare by identity first: a microsecond for the same hundreds of requests
        if rows is None or rows.running != running:
            rows = self._rows = self._read_rows(running)
        progress.CopyFrom(rows.constant)
        if not rows.prompts_computed:
            computed = list(map(min, map(_COMPUTED, rows.live), rows.prompts))
            progress.computed_prompt_tokens.extend(computed)
            if computed == rows.prompts:
                rows.constant.computed_prompt_tokens.extend(computed)
                rows.prompts_computed = True
        progress.generated_tokens.extend(map(_GENERATED, rows.live))

    def _read_rows(self, running: list[Any]) -> _Rows:
        known = self._known
        live = [request for request in running if request.request_id in known]
        numbers = [known[request.request_id].number for request in live]
        constant = engine_pb2.RequestProgress(request_numbers=numbers)
        return _Rows(list(running), live, list(map(_PROMPT, live)), constant)

    def heartbeat(self, now_seconds: float) -> engine_pb2.IterationState | None:
        """What has happened between steps; None when nothing has."""
        if not self._events:
            return None
        state = engine_pb2.IterationState(
            phase=engine_pb2.ITERATION_PHASE_HEARTBEAT, queued=self._queued()
        )
        self._hand_over_events(state, now_seconds)
        return state

    def note_ended(self, requests: Mapping[str, Any], now_seconds: float) -> None:
        """Requests that the scheduler has let go have ended."""
        if len(requests) == len(self._known):
            return
        for identifier in [name for name in self._known if name not in requests]:
            known = self._known.pop(identifier)
            self._waiting.pop(identifier, None)
            self._unstarted.pop(identifier, None)
            aborted = "ABORT" in str(getattr(known.request, "status", "")).upper()
            self._events.append(
                (
                    now_seconds,
                    engine_pb2.RequestEvent(
                        kind=engine_pb2.REQUEST_EVENT_KIND_ABORTED
                        if aborted
                        else engine_pb2.REQUEST_EVENT_KIND_FINISHED,
                        request_number=known.number,
                        generated_tokens=known.request.num_output_tokens,
                    ),
                )
            )

    def _read_work(
        self,
        output: Any,
        scheduled: Mapping[str, int],
        requests: Mapping[str, Any],
    ) -> engine_pb2.ScheduledRequests:
        prefill_tokens = prefill_context = 0
        lengths: list[int] = []
        contexts: list[int] = []
        decode_tokens = 0
        cached = output.scheduled_cached_reqs
        resumed = getattr(cached, "resumed_req_ids", ())
        outputs = cached.num_output_tokens
        if (
            len(outputs) == len(scheduled) == sum(scheduled.values())
            and not resumed
            and all(outputs)
        ):  # one token for each, and each has an answer under way: nearly every step
            return _decode_work(cached.num_computed_tokens)
        for identifier, context, generated in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=False
        ):
            tokens = scheduled.get(identifier, 0)
            # an answer under way computes one token, or a few drafted ones behind it
            if generated and identifier not in resumed and context >= _prompt(requests, identifier):
                contexts.append(context)
                decode_tokens += tokens
            else:
                prefill_tokens += tokens
                prefill_context += context
                lengths.append(_prompt(requests, identifier))
        for new in output.scheduled_new_reqs:
            prefill_tokens += scheduled.get(new.req_id, 0)
            prefill_context += new.num_computed_tokens
            lengths.append(_prompt(requests, new.req_id))
            self._note_cached(new.req_id, new.num_computed_tokens)
        if self._waiting and (output.scheduled_new_reqs or resumed):
            for new in output.scheduled_new_reqs:
                self._waiting.pop(new.req_id, None)
            for identifier in resumed:
                self._waiting.pop(identifier, None)
        return engine_pb2.ScheduledRequests(
            num_prefill_requests=len(lengths),
            sum_prefill_tokens=prefill_tokens,
            var_prefill_length=_variance(lengths),
            sum_prefill_kv_tokens=prefill_context,
            num_decode_requests=len(contexts),
            sum_decode_kv_tokens=sum(contexts),
            var_decode_kv_tokens=_variance(contexts),
            num_decode_tokens=decode_tokens if decode_tokens != len(contexts) else None,
        )

    def _queued(self) -> engine_pb2.QueuedRequests:
        if not self._waiting:
            return engine_pb2.QueuedRequests()
        prompts = [known.queued_tokens for known in self._waiting.values() if not known.preempted]
        contexts = [known.queued_tokens for known in self._waiting.values() if known.preempted]
        return engine_pb2.QueuedRequests(
            num_prefill_requests=len(prompts),
            sum_prefill_tokens=sum(prompts),
            var_prefill_length=_variance(prompts),
            num_decode_requests=len(contexts),
            sum_decode_kv_tokens=sum(contexts),
            var_decode_kv_tokens=_variance(contexts),
        )

    def _note_cached(self, identifier: str, cached_tokens: int) -> None:
        """Write prefix hits into an arrival that was not sent yet; they are found at scheduling."""
        known = self._unstarted.get(identifier)
        if known is None or not cached_tokens:
            return
        for _, event in self._events:
            if (
                event.request_number == known.number
                and event.kind == engine_pb2.REQUEST_EVENT_KIND_ARRIVED
            ):
                event.cached_tokens = min(cached_tokens, event.prompt_tokens)

    def _note_preempted(self, identifiers: Iterable[str]) -> None:
        for identifier in identifiers:
            known = self._known.get(identifier)
            if known is None:
                continue
            generated = known.request.num_output_tokens
            known.preempted = generated > 0
            known.queued_tokens = known.request.num_prompt_tokens + generated
            self._waiting[identifier] = known
            self._events.append(
                (
                    float("inf"),  # as of the state that tells it
                    engine_pb2.RequestEvent(
                        kind=engine_pb2.REQUEST_EVENT_KIND_PREEMPTED,
                        request_number=known.number,
                        generated_tokens=generated,
                    ),
                )
            )

    def _note_first_tokens(self, now_seconds: float) -> None:
        if not self._unstarted:
            return
        for identifier, known in list(self._unstarted.items()):
            if known.request.num_output_tokens:
                del self._unstarted[identifier]
                self._events.append(
                    (
                        now_seconds,
                        engine_pb2.RequestEvent(
                            kind=engine_pb2.REQUEST_EVENT_KIND_FIRST_TOKEN,
                            request_number=known.number,
                        ),
                    )
                )

    def _date(self, state: engine_pb2.IterationState, plan: _Plan, now_seconds: float) -> None:
        # Where steps overlap, a step's own time begins when the one before it has ended.
        previous = self._last_completed_seconds
        self._last_completed_seconds = now_seconds
        start = max(plan.planned_seconds, previous)
        duration = now_seconds - start
        state.iteration_duration_seconds = min(max(duration, 1e-9), _LONGEST_ITERATION_SECONDS)
        state.timing_source = (
            engine_pb2.TIMING_SOURCE_HOST_INTERVAL
            if previous > plan.planned_seconds
            else engine_pb2.TIMING_SOURCE_HOST_STEP
        )

    def _hand_over_events(self, state: engine_pb2.IterationState, now_seconds: float) -> None:
        for event_seconds, event in self._events:
            event.age_seconds = max(now_seconds - event_seconds, 0.0)
        state.request_events.extend([event for _, event in self._events])
        self._events.clear()


def _decode_work(contexts: list[int]) -> engine_pb2.ScheduledRequests:
    return engine_pb2.ScheduledRequests(
        num_decode_requests=len(contexts),
        sum_decode_kv_tokens=sum(contexts),
        var_decode_kv_tokens=_variance(contexts),
    )


def _prompt(requests: Mapping[str, Any], identifier: str) -> int:
    request = requests.get(identifier)
    return 0 if request is None else int(request.num_prompt_tokens)


def _variance(values: list[int]) -> float:
    """Population variance."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = sum(values) / count
    squares: int = sum(map(mul, values, values))
    return max(squares / count - mean * mean, 0.0)
