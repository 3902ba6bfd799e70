"""A real vLLM on the CPU, a real daemon on a simulated GPU, and `vllm bench serve` between them."""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pyarrow.parquet
import pytest

from tests.engines.real.processes import GPU_UUID, VllmServer, make_model, until
from tests.test_hostile_daemon import RawListener
from throttle.v1 import (
    decision_pb2,
    engine_pb2,
    throttle_service_pb2,
    throttle_service_pb2_grpc,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

ADAPTERS = {
    "stat_logger": (),
    "scheduler": ("--scheduler-cls", "throttle.engines.vllm_scheduler.ThrottleScheduler"),
}
REQUESTS = 200
LATE_SECONDS = 10.0
PROBLEMS = re.compile(r"Traceback|ERROR|throttle adapter failed|throttle is off")


class LateDaemon(throttle_service_pb2_grpc.ThrottleServiceServicer):
    """Accepts, reads, and answers each state ten seconds later."""

    def __init__(self, path):
        self.connections_count = self.answers_count = 0
        self._server = grpc.server(ThreadPoolExecutor(8))
        throttle_service_pb2_grpc.add_ThrottleServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{path}")
        self._server.start()

    def StreamIterations(self, requests, context):  # noqa: N802 - the protocol's name
        next(requests)
        self.connections_count += 1
        accepted = throttle_service_pb2.RegistrationAccepted(registration_id="late")
        yield throttle_service_pb2.StreamIterationsResponse(accepted=accepted)
        ended = threading.Event()
        context.add_callback(ended.set)
        read = queue.SimpleQueue()
        reader = threading.Thread(target=_read_all, args=(requests, read), daemon=True)
        reader.start()
        while not ended.is_set():
            with contextlib.suppress(queue.Empty):
                number, read_seconds = read.get(timeout=0.1)
                ended.wait(LATE_SECONDS - (time.monotonic() - read_seconds))
                decision = decision_pb2.Decision(sequence_number=number, target_clock_mhz=900)
                yield throttle_service_pb2.StreamIterationsResponse(decision=decision)
                self.answers_count += 1

    def close(self):
        self._server.stop(0).wait()


def _read_all(requests, read):
    with contextlib.suppress(grpc.RpcError):
        for request in requests:
            read.put((request.state.sequence_number, time.monotonic()))


HOSTILE = {
    "wrong bytes": lambda path: RawListener(path, lambda c: c.sendall(b"\x00\xff" * 4096)),
    "closes": lambda path: RawListener(path, lambda c: c.close()),
    "never answers": lambda path: RawListener(path, lambda c: None),
    "answers ten seconds late": LateDaemon,
}


def serve(folder, model, adapter, daemon):
    return VllmServer(
        folder,
        make_model(folder / "model", model),
        "--enable-logging-iteration-details",
        "--enable-mfu-metrics",
        "--middleware",
        "throttle.engines.vllm_middleware.RequestMiddleware",
        *ADAPTERS[adapter],
        THROTTLE_ADDRESS=daemon.target,
        THROTTLE_ENGINE_GPUS=GPU_UUID,
        THROTTLE_ENGINE_MODE="act",
        THROTTLE_ENGINE_TTFT_SECONDS="2",
        THROTTLE_ENGINE_TPOT_SECONDS="0.2",
    )


@pytest.fixture(params=[(a, m) for a in ADAPTERS for m in ("qwen3-moe", "mixtral")], ids="-".join)
def served(request, tmp_path, vllm_environment, daemon):
    """A daemon and a vLLM that reports to it, both ready."""
    adapter, model = request.param
    daemon.start()
    folder = tmp_path / "vllm"
    folder.mkdir()
    server = serve(folder, model, adapter, daemon)
    try:
        server.wait()
        until(daemon.engine_status, "registration", 30.0)
        server.adapter, server.name = adapter, f"{adapter}, {model}"
        yield server
    finally:
        server.stop()


def test_every_iteration_request_and_token_reaches_the_daemon_and_is_answered(served, daemon):
    measured = served.bench(prompts=REQUESTS).finish()
    assert (measured["completed"], measured["failed"]) == (REQUESTS, 0)
    until(lambda: served.metrics()["vllm:num_requests_running"] == 0, "an idle engine", 10.0)
    assert served.complete("w7 w8 w9", 5, **{"X-SLO-TTFT-MS": "250"})["completion_tokens"] == 5
    ran = until(served.iterations_count, "iterations in vLLM's log", 10.0)
    truth = served.metrics()
    status = until(lambda: _settled(daemon), "an answer to every state", 30.0)
    metrics = daemon.metrics()
    daemon_counts = {
        "states": metrics["throttle_iterations_received_total"],
        "answers": metrics["throttle_decisions_total"],
    }
    # of plans the newest alone is sent; completed iterations are counted one by one below
    assert status.last_decision.sequence_number >= status.states_count >= ran
    assert not PROBLEMS.search(served.process.text())
    served.stop()  # ends the stream, and with it the recording
    records = until(lambda: _records(daemon), "recording", 30.0)
    completed = records[records.phase == "completed"]
    assert len(completed) == ran == served.iterations_count()
    events = _events(records)
    requests = REQUESTS + 1
    arrived = [event for _, event in events[engine_pb2.REQUEST_EVENT_KIND_ARRIVED]]
    assert len(arrived) == requests
    finished = [event for _, event in events[engine_pb2.REQUEST_EVENT_KIND_FINISHED]]
    assert len(finished) == truth["vllm:request_success_total"] == requests
    assert sum(e.generated_tokens for e in finished) == truth["vllm:generation_tokens_total"]
    prompts = sum(event.prompt_tokens for event in arrived)
    assert prompts == truth["vllm:prompt_tokens_total"]
    # what prefills and decodes computed is what came out: a prompt's last chunk gives a token too
    cached = prompts - int(completed.sum_prefill_tokens.sum())
    assert cached == truth["vllm:prefix_cache_hits_total"]
    generated = int(completed.num_decode_requests.sum()) + requests
    assert generated == truth["vllm:generation_tokens_total"]
    assert completed.iteration_duration_seconds.between(1e-5, 5.0).all()
    _assert_told_before_its_first_iteration(served, status, records, events)
    print(
        f"{served.name}: {ran} iterations run, {len(completed)} received; {requests} requests, "
        f"{prompts} prompt tokens and {generated} output tokens on both sides; "
        f"{daemon_counts['states']:.0f} states, {daemon_counts['answers']:.0f} answers"
    )


def _assert_told_before_its_first_iteration(served, status, records, events):
    """The lone last request found an idle engine, and the daemon heard of it before any step."""
    first_token_row, _ = events[engine_pb2.REQUEST_EVENT_KIND_FIRST_TOKEN][-1]
    if served.adapter == "scheduler":  # in a plan; plans are answered but not recorded
        _, arrival = events[engine_pb2.REQUEST_EVENT_KIND_ARRIVED][-1]
        assert arrival.slos.ttft_seconds == 0.25
        assert status.states_count > len(records)
        return
    states = [engine_pb2.IterationState.FromString(text) for text in records.state_message]
    told = [
        row
        for row, state in enumerate(states)
        if state.phase == engine_pb2.ITERATION_PHASE_HEARTBEAT
        and state.queued.num_prefill_requests == 1
    ]
    assert told
    assert told[-1] < first_token_row


def test_a_daemon_killed_and_restarted_costs_no_request_and_no_iteration(served, daemon):
    # longer than the daemon takes to start again, and the client to try again
    bench = served.bench(prompts=2 * REQUESTS, rate=8)
    until(lambda: _states(daemon) > 300, "load", 120.0)
    daemon.kill()
    before = served.iterations_count()
    until(lambda: served.iterations_count() > before + 200, "iterations without a daemon", 60.0)
    assert bench.running
    daemon.start()
    until(lambda: _states(daemon) > 50, "states after the restart", 60.0)
    measured = bench.finish()
    assert (measured["completed"], measured["failed"]) == (2 * REQUESTS, 0)
    truth = served.metrics()
    assert truth["vllm:request_success_total"] == 2 * REQUESTS
    assert measured["total_output_tokens"] == truth["vllm:generation_tokens_total"]
    assert not PROBLEMS.search(served.process.text())
    print(
        f"{served.name}, daemon killed and restarted: {2 * REQUESTS} requests, 0 failed; "
        f"{served.iterations_count()} iterations, more than 200 of them without a daemon; "
        f"{_states(daemon)} states to the second daemon"
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_hostile_daemons_cost_no_request_and_no_iteration(tmp_path, vllm_environment, adapter):
    """One vLLM, and at its daemon's address one after the other."""
    path = tmp_path / "throttle.sock"
    server = serve(tmp_path, "qwen3-moe", adapter, SimpleNamespace(target=f"unix:{path}"))
    try:
        server.wait()
        for name, listen in HOSTILE.items():
            with contextlib.closing(listen(path)) as listener:
                until(lambda: listener.connections_count, name, 60.0)
                before = server.iterations_count() or 0
                measured = server.bench(prompts=REQUESTS // 2).finish()
                assert (measured["completed"], measured["failed"]) == (REQUESTS // 2, 0), name
                iterations = server.iterations_count() - before
                if isinstance(listener, LateDaemon):
                    until(lambda: listener.answers_count, "a late answer", 2 * LATE_SECONDS)
            path.unlink(missing_ok=True)
            print(f"{adapter}, {name}: {REQUESTS // 2} requests, 0 failed; {iterations} iterations")
        assert not PROBLEMS.search(server.process.text())
    finally:
        server.stop()


def _settled(daemon):
    """The engine's status once every state that the daemon received is answered."""
    status = daemon.engine_status()
    metrics = daemon.metrics()
    received = metrics["throttle_iterations_received_total"]
    answered = metrics["throttle_decisions_total"] + metrics.get(
        "throttle_iterations_dropped_total", 0.0
    )
    return status if status.states_count == received == answered > 0 else None


def _states(daemon):
    status = daemon.engine_status()
    return status.states_count if status else 0


def _records(daemon):
    files = list(daemon.recordings.glob("*.parquet"))
    return pyarrow.parquet.read_table(files[0]).to_pandas() if files else None


def _events(records):
    found = {kind: [] for kind in engine_pb2.RequestEventKind.values()}
    for row, text in enumerate(records.state_message):
        for event in engine_pb2.IterationState.FromString(text).request_events:
            found[event.kind].append((row, event))
    return found
