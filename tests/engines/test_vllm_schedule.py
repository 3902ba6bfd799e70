from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.samples import lines, namespace
from throttle.daemon.messages import StateReader
from throttle.engines.vllm_schedule import SchedulerTap
from throttle.v1 import engine_pb2

SAMPLES = lines("vllm-0.32.0", "scheduler.jsonl")
PLANNED = engine_pb2.ITERATION_PHASE_PLANNED
COMPLETED = engine_pb2.ITERATION_PHASE_COMPLETED
ARRIVED = engine_pb2.REQUEST_EVENT_KIND_ARRIVED
FIRST_TOKEN = engine_pb2.REQUEST_EVENT_KIND_FIRST_TOKEN
FINISHED = engine_pb2.REQUEST_EVENT_KIND_FINISHED
ABORTED = engine_pb2.REQUEST_EVENT_KIND_ABORTED
PREEMPTED = engine_pb2.REQUEST_EVENT_KIND_PREEMPTED
PLAIN = ("num_scheduled_tokens", "scheduled_spec_decode_tokens", "extra_args")


class Player:
    """A scheduler made of its recorded calls."""

    def __init__(self):
        self.tap = SchedulerTap()
        self.requests = {}
        self.states = []
        self._output = None

    def play(self, samples):
        for sample in samples:
            state = getattr(self, sample["call"])(sample, sample["seconds"])
            if state is not None:
                state.sequence_number = len(self.states) + 1
                state.engine_time_seconds = sample["seconds"]
                self.states.append(state)
        return self.states

    def add_request(self, sample, now):
        request = namespace(sample["request"], PLAIN)
        request.sampling_params = SimpleNamespace(extra_args=request.extra_args)
        self.requests[request.request_id] = request
        self.tap.arrive(request, now, sample["wall"])

    def schedule(self, sample, now):
        self._output = namespace(sample["output"], PLAIN)
        for identifier in sample["output"]["preempted_req_ids"]:
            self.requests[identifier].num_computed_tokens = 0
        return self.tap.plan(self._output, self.requests, now)

    def update_from_output(self, sample, now):
        for told in [*sample["running"], *sample["ended"]]:
            vars(self.requests[told["request_id"]]).update(told)
        for identifier in set(self.requests).difference(sample["requests"]):
            del self.requests[identifier]
        running = [self.requests[told["request_id"]] for told in sample["running"]]
        return self.tap.complete(self._output, self.requests, running, sample["kv_usage"], now)

    def finish_requests(self, sample, now):
        for told in sample["ended"]:
            vars(self.requests.pop(told["request_id"])).update(told)
        self.tap.note_ended(self.requests, now)


@pytest.fixture(scope="module")
def states():
    return Player().play(SAMPLES)


def events(states, kind):
    return [event for state in states for event in state.request_events if event.kind == kind]


def test_every_step_of_the_recording_is_completed_once_with_all_its_tokens(states):
    steps = [
        sum(sample["output"]["num_scheduled_tokens"].values())
        for sample in SAMPLES
        if sample["call"] == "schedule" and sample["output"]["num_scheduled_tokens"]
    ]
    completed = [state.scheduled for state in states if state.phase == COMPLETED]
    assert [work.sum_prefill_tokens + work.num_decode_requests for work in completed] == steps


def test_steps_with_prompts_are_told_before_they_run(states):
    planned = [state.scheduled for state in states if state.phase == PLANNED]
    prefills = [
        s.scheduled for s in states if s.phase == COMPLETED and s.scheduled.num_prefill_requests
    ]
    assert planned == prefills


def test_every_request_of_the_recording_arrives_and_ends_once(states):
    added = [s["request"] for s in SAMPLES if s["call"] == "add_request"]
    arrived = events(states, ARRIVED)
    assert [e.prompt_tokens for e in arrived] == [r["num_prompt_tokens"] for r in added]
    assert [e.max_output_tokens for e in arrived] == [r["max_tokens"] for r in added]
    assert all(0.0 <= e.age_seconds < 5.0 for e in arrived)
    assert len(events(states, ABORTED)) == 1  # whose client went away
    ended = events(states, FINISHED) + events(states, ABORTED)
    assert sorted(e.request_number for e in ended) == [e.request_number for e in arrived]
    full = {e.request_number: e.max_output_tokens for e in arrived}
    assert all(e.generated_tokens == full[e.request_number] for e in events(states, FINISHED))
    assert len(events(states, FIRST_TOKEN)) == len(arrived)


def test_a_requests_own_limits_travel_with_its_arrival(states):
    own = [e for e in events(states, ARRIVED) if e.slos.HasField("ttft_seconds")]
    assert [e.slos.ttft_seconds for e in own] == [0.5]


def test_preempted_requests_of_the_recording_are_told_and_wait(states):
    count = sum(len(s["output"]["preempted_req_ids"]) for s in SAMPLES if s["call"] == "schedule")
    assert count > 0
    assert len(events(states, PREEMPTED)) == count
    assert any(state.queued.num_decode_requests for state in states)


def test_the_queue_is_every_request_that_lives_and_does_not_run(states):
    alive = set()
    for state in states:
        alive.update(e.request_number for e in state.request_events if e.kind == ARRIVED)
        alive.difference_update(
            e.request_number for e in state.request_events if e.kind in (FINISHED, ABORTED)
        )
        if state.phase == COMPLETED:
            queued = state.queued.num_prefill_requests + state.queued.num_decode_requests
            assert queued == len(alive) - len(state.progress.request_numbers)


class Scheduler:
    """A played scheduler: chunks of 16 prompt tokens, then one output token a step."""

    def __init__(self):
        self.tap = SchedulerTap()
        self.numbers, self.requests = {}, {}
        self.running, self.waiting, self.preempted = [], [], []

    def join(self, prompt):
        name = f"r{len(self.numbers)}"
        self.numbers[name] = len(self.numbers) + 1
        request = SimpleNamespace(
            request_id=name,
            num_prompt_tokens=prompt,
            num_computed_tokens=0,
            num_output_tokens=0,
        )
        self.requests[name] = request
        self.tap.arrive(request, 0.0, 0.0)
        self.waiting.append(request)

    def leave(self, _):
        if self.running:
            del self.requests[self.running.pop(0).request_id]

    def turn(self, _):
        self.running.reverse()

    def preempt(self, _):
        if self.running:
            self.preempted = [self.running.pop()]
            self.preempted[0].num_computed_tokens = 0

    def nothing(self, _):
        pass

    def step(self, now):
        """Returns the completed state; None where nothing ran."""
        started = [] if self.preempted else self.waiting
        cached = [r for r in [*self.running, *started] if r.num_output_tokens or r in self.running]
        output = SimpleNamespace(
            num_scheduled_tokens={r.request_id: _due(r) for r in [*self.running, *started]},
            scheduled_new_reqs=[
                SimpleNamespace(req_id=r.request_id, num_computed_tokens=0)
                for r in started
                if not r.num_output_tokens
            ],
            preempted_req_ids={r.request_id for r in self.preempted},
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r.request_id for r in cached],
                num_computed_tokens=[r.num_computed_tokens for r in cached],
                num_output_tokens=[r.num_output_tokens for r in cached],
                resumed_req_ids={r.request_id for r in started if r.num_output_tokens},
            ),
        )
        self.running += started
        self.waiting = [r for r in self.waiting if r not in started] + self.preempted
        self.preempted = []
        self.tap.plan(output, self.requests, now)
        for request in self.running:
            request.num_computed_tokens += _due(request)
            if request.num_computed_tokens >= _full(request):
                request.num_output_tokens += 1
        return self.tap.complete(output, self.requests, self.running, 0.5, now + 0.5)


def _full(request):
    return request.num_prompt_tokens + request.num_output_tokens


def _due(request):
    return max(min(16, _full(request) - request.num_computed_tokens), 1)


MOVES = st.sampled_from(["join", "leave", "turn", "preempt", "nothing"])


@given(moves=st.lists(st.tuples(MOVES, st.integers(1, 40)), max_size=40))
def test_progress_is_right_whoever_joins_leaves_changes_places_or_is_preempted(moves):
    """Against reading every request anew in each step."""
    scheduler = Scheduler()
    for now, (move, prompt) in enumerate(moves):
        getattr(scheduler, move)(prompt)
        state = scheduler.step(float(now))
        if state is None:
            continue
        progress, running = state.progress, scheduler.running
        assert [scheduler.numbers[r.request_id] for r in running] == progress.request_numbers
        assert [r.num_output_tokens for r in running] == progress.generated_tokens
        computed = [min(r.num_computed_tokens, r.num_prompt_tokens) for r in running]
        assert computed == progress.computed_prompt_tokens


def test_progress_holds_each_running_requests_own_numbers():
    player = Player()
    for sample in SAMPLES:
        states = player.play([sample])
        if sample["call"] == "update_from_output" and states and states[-1].phase == COMPLETED:
            progress = states[-1].progress
            assert list(progress.generated_tokens) == [
                r["num_output_tokens"] for r in sample["running"]
            ]


def test_the_daemon_accepts_every_state_of_the_recording(states, vllm_profile):
    reader = StateReader(vllm_profile)
    assert len([reader.read(state) for state in states]) == len(states)


def output(scheduled, new=(), cached=(), resumed=(), preempted=()):
    return SimpleNamespace(
        num_scheduled_tokens=dict(scheduled),
        scheduled_new_reqs=[SimpleNamespace(req_id=n, num_computed_tokens=c) for n, c in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[n for n, _, _ in cached],
            num_computed_tokens=[c for _, c, _ in cached],
            num_output_tokens=[o for _, _, o in cached],
            resumed_req_ids=set(resumed),
        ),
        preempted_req_ids=set(preempted),
        scheduled_spec_decode_tokens={},
    )


def request(name, prompt=100, output_tokens=0, computed=0):
    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=prompt,
        num_output_tokens=output_tokens,
        num_computed_tokens=computed,
        arrival_time=50.0,
        max_tokens=10,
        sampling_params=None,
        status="RUNNING",
    )


def test_where_steps_overlap_a_step_lasts_from_the_end_of_the_one_before():
    tap = SchedulerTap()
    a = request("a")
    requests = {"a": a}
    tap.arrive(a, 10.0, 60.0)
    first = output({"a": 100}, new=[("a", 0)])
    second = output({"a": 1}, cached=[("a", 100, 1)])
    tap.plan(first, requests, 10.0)
    tap.plan(second, requests, 10.001)  # before the first has run
    a.num_output_tokens = 1
    done = tap.complete(first, requests, [a], 0.1, 10.030)
    assert done.iteration_duration_seconds == pytest.approx(0.030)
    assert done.timing_source == engine_pb2.TIMING_SOURCE_HOST_STEP
    done = tap.complete(second, requests, [a], 0.1, 10.040)
    assert done.iteration_duration_seconds == pytest.approx(0.010)
    assert done.timing_source == engine_pb2.TIMING_SOURCE_HOST_INTERVAL


def test_prefix_hits_found_at_scheduling_are_told_with_the_arrival():
    tap = SchedulerTap()
    a = request("a")
    tap.arrive(a, 10.0, 60.0)
    state = tap.plan(output({"a": 36}, new=[("a", 64)]), {"a": a}, 10.0)
    assert state.request_events[0].cached_tokens == 64
    assert state.scheduled.sum_prefill_kv_tokens == 64
    assert state.request_events[0].age_seconds == pytest.approx(10.0)  # waited since wall time 50


def test_an_arrival_between_steps_is_told_at_once_and_only_once():
    tap = SchedulerTap()
    a = request("a")
    tap.arrive(a, 10.0, 50.0)
    state = tap.heartbeat(10.0)
    assert state.phase == engine_pb2.ITERATION_PHASE_HEARTBEAT
    assert state.queued.num_prefill_requests == 1
    assert [e.kind for e in state.request_events] == [ARRIVED]
    assert tap.heartbeat(10.1) is None
    assert not tap.plan(output({"a": 100}, new=[("a", 0)]), {"a": a}, 10.2).request_events


def test_a_preempted_request_waits_with_its_whole_context_until_it_is_resumed():
    tap = SchedulerTap()
    a = request("a", output_tokens=5)
    requests = {"a": a}
    tap.arrive(a, 10.0, 50.0)
    tap.plan(output({"a": 100}, new=[("a", 0)]), requests, 10.0)
    tap.plan(output({}, preempted=["a"]), requests, 10.1)
    state = tap.heartbeat(10.1)
    assert state.queued.num_decode_requests == 1
    assert state.queued.sum_decode_kv_tokens == 105
    assert state.request_events[-1].kind == PREEMPTED
    assert state.request_events[-1].age_seconds == 0.0
    resumed = tap.plan(output({"a": 105}, cached=[("a", 0, 5)], resumed=["a"]), requests, 10.2)
    assert resumed.scheduled.num_prefill_requests == 1
    assert resumed.queued.num_decode_requests == 0


def test_a_step_without_tokens_is_none():
    tap = SchedulerTap()
    empty = output({})
    assert tap.plan(empty, {}, 1.0) is None
    assert tap.complete(empty, {}, [], 0.0, 1.1) is None
    assert tap.idle
