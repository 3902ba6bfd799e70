"""A serving engine in simulated time, which tells of itself what a real engine's adapter would."""

from __future__ import annotations

import enum
import random
from typing import TYPE_CHECKING, Protocol

from throttle.control.state import (
    EngineProfile,
    EventKind,
    IterationState,
    KvCache,
    Mode,
    Phase,
    QueuedRequests,
    RequestEvent,
    RequestProgress,
    ScheduledRequests,
    Slos,
    SpeculativeDecoding,
    TimingSource,
)
from throttle.simulation.admission import Admission, check_engine
from throttle.simulation.operators import IterationWork
from throttle.simulation.outcomes import GapHistogram, outcome_of
from throttle.simulation.scheduler import Scheduler, Step
from throttle.simulation.speculation import Speculation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from throttle.simulation.gpu import SimulatedGpu
    from throttle.simulation.outcomes import RequestOutcome
    from throttle.simulation.requests import Request
    from throttle.simulation.waiting import ServedRequest


class Fidelity(enum.StrEnum):
    """How much an engine tells about itself."""

    FULL = "full"  # aggregates, every request's progress and events
    AGGREGATE = "aggregate"  # aggregates only, as in ForwardPassMetrics
    SCRAPE = "scrape"  # running, waiting and KV usage, now and then, as from a metrics page


class RequestSource(Protocol):
    """Where requests come from."""

    def next_arrival_seconds(self) -> float | None:
        """Time of the next arrival; None when none will come unless a request finishes."""
        ...

    def take(self, now_seconds: float) -> Iterable[Request]:
        """Requests that have arrived by now, in order; each is taken once."""
        ...

    def finished(self, request: Request, now_seconds: float) -> None:
        """Told when a request ends, so that a closed loop may send the next."""
        ...


class SimulatedEngine:
    """Serves requests on a simulated GPU, one step at a time.

    The caller takes a state from `step`, does with it what an adapter would, and asks for the next
    step; a controller reaches the GPU only through the GPU's lock.

    Args:
        gpu: The GPU; it also keeps the time.
        source: Where requests come from.
        fidelity: How much the states tell.
        heartbeat_seconds: Interval between states while idle.
        scrape_interval_seconds: Interval between states with `Fidelity.SCRAPE`.
        generator: Draws which drafts are accepted; None draws one fixed series.

    Raises:
        InvalidInputError: One of the plant's engine limits or options is not allowed.
    """

    def __init__(
        self,
        gpu: SimulatedGpu,
        source: RequestSource,
        fidelity: Fidelity = Fidelity.FULL,
        *,
        heartbeat_seconds: float = 0.1,
        scrape_interval_seconds: float = 0.25,
        generator: random.Random | None = None,
    ) -> None:
        self._gpu = gpu
        self._source = source
        self._fidelity = fidelity
        self._heartbeat = heartbeat_seconds
        self._scrape_interval = scrape_interval_seconds
        self._limits = limits = gpu.plant.parameters.engine
        check_engine(limits)
        self.kv_blocks_count = gpu.plant.kv_blocks_count
        self._admission = Admission(limits, self.kv_blocks_count * limits.kv_block_tokens)
        self._speculates = limits.draft_tokens_count > 0
        speculation = Speculation(limits, generator or random.Random(0))  # noqa: S311 - simulated
        self._scheduler = Scheduler(
            limits, self.kv_blocks_count, speculation if self._speculates else None
        )
        self._events: list[RequestEvent] = []
        self._sequence_number = 0
        self._step_ended_seconds = 0.0
        self.outcomes: list[RequestOutcome] = []
        self.gaps = GapHistogram()
        self.arrived_count = 0
        self.output_tokens_count = 0
        self.iterations_count = 0
        self.preemptions_count = 0

    @property
    def time_seconds(self) -> float:
        """Simulated time."""
        return self._gpu.time_seconds

    @property
    def running_count(self) -> int:
        """Requests admitted and not finished."""
        return len(self._scheduler.running)

    @property
    def waiting_count(self) -> int:
        """Requests in the queue."""
        return len(self._scheduler.waiting)

    @property
    def used_blocks_count(self) -> int:
        """KV blocks in use."""
        return self.kv_blocks_count - self._scheduler.free_blocks_count

    def profile(
        self,
        engine_id: str,
        gpu_uuids: tuple[str, ...],
        default_slos: Slos,
        mode: Mode = Mode.ACT,
        lease_seconds: float = 5.0,
    ) -> EngineProfile:
        """What this engine says of itself when it registers."""
        plant = self._gpu.plant
        parallelism = plant.parameters.parallelism
        return EngineProfile(
            engine_id=engine_id,
            engine_name="simulated",
            engine_version="1",
            model_name=plant.architecture.name,
            model_config_json="",
            weight_dtype=plant.architecture.weight_dtype,
            kv_dtype=plant.architecture.kv_dtype,
            tensor_parallel_count=parallelism.tensor_parallel_count,
            pipeline_parallel_count=1,
            data_parallel_count=1,
            expert_parallel_count=parallelism.expert_parallel_count,
            gpu_uuids=gpu_uuids,
            role=self._admission.role,
            running_requests_limit=self._limits.running_requests_limit,
            batched_tokens_limit=self._limits.batched_tokens_limit,
            kv_blocks_count=self.kv_blocks_count,
            kv_block_tokens=self._limits.kv_block_tokens,
            default_slos=default_slos,
            mode=mode,
            lease_seconds=lease_seconds,
        )

    def run(self) -> Iterator[IterationState]:
        """States until every request is served."""
        while (state := self.step()) is not None:
            yield state

    def rest(self, until_seconds: float) -> Iterator[IterationState]:
        """Heartbeats of an engine without work until a time; call it after `run`."""
        while self.time_seconds < until_seconds:
            yield self._idle_step(min(until_seconds, self.time_seconds + self._heartbeat))

    def step(self) -> IterationState | None:
        """Run one iteration, or idle until the next arrival or heartbeat.

        Returns:
            The state after it, or None when every request is served and none will come.

        Raises:
            InvalidInputError: A request that arrived can never fit the KV cache.
        """
        if self._sequence_number == 0:  # say hello before the first iteration
            return self._idle_step(self.time_seconds)
        if not self._scheduler.has_work:
            arrival = self._source.next_arrival_seconds()
            if arrival is None:
                return None
            return self._idle_step(min(arrival, self.time_seconds + self._heartbeat))
        if self._fidelity is Fidelity.SCRAPE:
            return self._scrape()
        step, duration = self._iterate()
        return self._completed_state(step, duration)

    # -- one iteration ---------------------------------------------------------------------------

    def _iterate(self) -> tuple[Step, float]:
        step = self._scheduler.schedule()
        chunks = step.chunks
        finishing = sum(item.computed >= item.prompt + item.generated for item in step.prefills)
        work = IterationWork(
            prefill_chunks=chunks,
            decode_requests_count=step.contexts.count,
            decode_context_tokens=step.contexts.total,
            sampled_requests_count=step.contexts.count + finishing,
            decode_tokens_count=step.contexts.count + step.draft_tokens,
        )
        duration, _ = self._gpu.run(work)
        self.iterations_count += 1
        self._finish_step(step)
        self._accept_arrivals()
        return step, duration

    def _finish_step(self, step: Step) -> None:
        """Hand out the step's tokens, and end the requests that are complete."""
        now, events = self.time_seconds, self._events
        started = self._step_ended_seconds
        self._note_preempted(step, started)
        finished = [item for item in step.decoders if item.generated == item.output]
        if step.decoders:
            self.gaps.add(now - started, len(step.decoders))
            self.output_tokens_count += len(step.decoders) + step.accepted_tokens
            if step.accepted_tokens:  # they come together with the token before them
                self.gaps.add(0.0, step.accepted_tokens)
        for item in step.prefills:
            if item.computed < item.prompt + item.generated:
                continue
            item.decoding = True
            if item.generated == 0:
                item.first_token_seconds = now
                events.append(RequestEvent(EventKind.FIRST_TOKEN, item.number))
            else:  # computed anew after a preemption
                self.gaps.add(now - item.last_token_seconds, 1)
            item.generated += 1
            self.output_tokens_count += 1
            if item.generated == item.output:
                finished.append(item)
        if finished:
            for item in finished:
                self._finish(item, now)
            self._scheduler.sweep()
        self._step_ended_seconds = now

    def _note_preempted(self, step: Step, started: float) -> None:
        for item in step.preempted:
            self.preemptions_count += 1
            if item.decoding:
                item.decoding = False
                item.last_token_seconds = started
            age = self.time_seconds - started
            self._events.append(
                RequestEvent(EventKind.PREEMPTED, item.number, age, generated_tokens=item.generated)
            )

    def _finish(self, item: ServedRequest, now: float) -> None:
        self._scheduler.release(item)
        self.outcomes.append(outcome_of(item, now))
        self._events.append(
            RequestEvent(EventKind.FINISHED, item.number, generated_tokens=item.generated)
        )
        self._source.finished(item.request, now)

    # -- arrivals and states ---------------------------------------------------------------------

    def _accept_arrivals(self) -> None:
        arrival = self._source.next_arrival_seconds()
        if arrival is None or arrival > self.time_seconds:
            return
        now = self.time_seconds
        for request in self._source.take(now):
            item, event = self._admission.admit(request, now)
            self._scheduler.waiting.append(item)
            self._events.append(event)
            self.arrived_count += 1

    def _idle_step(self, until_seconds: float) -> IterationState:
        self._gpu.idle(until_seconds)
        self._step_ended_seconds = until_seconds
        self._accept_arrivals()
        if self._fidelity is Fidelity.SCRAPE:
            return self._scraped_state()
        return self._state(Phase.HEARTBEAT, None, ScheduledRequests())

    def _completed_state(self, step: Step, duration: float) -> IterationState:
        contexts, prompts = step.contexts, step.prompts
        scheduled = ScheduledRequests(
            num_prefill_requests=prompts.count,
            sum_prefill_tokens=sum(tokens for tokens, _ in step.chunks),
            var_prefill_length=prompts.variance(),
            sum_prefill_kv_tokens=sum(context for _, context in step.chunks),
            num_decode_requests=contexts.count,
            sum_decode_kv_tokens=contexts.total,
            var_decode_kv_tokens=contexts.variance(),
            num_decode_tokens=contexts.count + step.draft_tokens,
            prefill_attention_pairs=sum(
                tokens * (context + 0.5 * tokens) for tokens, context in step.chunks
            ),
        )
        speculated = SpeculativeDecoding(step.draft_tokens, step.accepted_tokens)
        return self._state(
            Phase.COMPLETED, duration, scheduled, speculated if self._speculates else None
        )

    def _state(
        self,
        phase: Phase,
        duration: float | None,
        scheduled: ScheduledRequests,
        speculative_decoding: SpeculativeDecoding | None = None,
    ) -> IterationState:
        full = self._fidelity is Fidelity.FULL
        events, self._events = self._events, []
        self._sequence_number += 1
        return IterationState(
            sequence_number=self._sequence_number,
            phase=phase,
            engine_time_seconds=self.time_seconds,
            iteration_duration_seconds=duration,
            timing_source=TimingSource.HOST_INTERVAL,
            scheduled=scheduled,
            queued=self._scheduler.waiting.state(),
            kv_cache=KvCache(self.used_blocks_count, self.kv_blocks_count),
            progress=self._progress() if full else None,
            request_events=tuple(events) if full else (),
            speculative_decoding=speculative_decoding,
        )

    def _progress(self) -> RequestProgress:
        running = self._scheduler.running
        return RequestProgress(
            [item.number for item in running],
            [min(item.computed, item.prompt) for item in running],
            [item.generated for item in running],
        )

    def _scrape(self) -> IterationState:
        """Iterate until the next scrape is due, or there is nothing more to run."""
        due = self.time_seconds + self._scrape_interval
        while self.time_seconds < due and self._scheduler.has_work:
            self._iterate()
        return self._scraped_state()

    def _scraped_state(self) -> IterationState:
        self._sequence_number += 1
        self._events = []
        return IterationState(
            sequence_number=self._sequence_number,
            phase=Phase.HEARTBEAT,  # a metrics page knows no iterations
            engine_time_seconds=self.time_seconds,
            scheduled=ScheduledRequests(num_decode_requests=len(self._scheduler.running)),
            queued=QueuedRequests(num_prefill_requests=len(self._scheduler.waiting)),
            kv_cache=KvCache(usage_ratio=self.used_blocks_count / self.kv_blocks_count),
        )
