from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttle.client import ClientStatistics, ReconnectBackoff, ThrottleClient
from throttle.outbox import CARRIED_EVENTS_LIMIT, Outbox
from throttle.v1 import (
    decision_pb2,
    engine_pb2,
    throttle_service_pb2,
    throttle_service_pb2_grpc,
)

QUICK = ReconnectBackoff(initial_seconds=0.01, maximum_seconds=0.05)
DEADLINE_SECONDS = 20.0

ARRIVED = engine_pb2.REQUEST_EVENT_KIND_ARRIVED
FIRST_TOKEN = engine_pb2.REQUEST_EVENT_KIND_FIRST_TOKEN
FINISHED = engine_pb2.REQUEST_EVENT_KIND_FINISHED
ABORTED = engine_pb2.REQUEST_EVENT_KIND_ABORTED


def registration():
    return engine_pb2.EngineRegistration(engine_id="engine", gpu_uuids=["GPU-a"])


def state(number, *events, time=None):
    return engine_pb2.IterationState(
        sequence_number=number,
        phase=engine_pb2.ITERATION_PHASE_HEARTBEAT,
        engine_time_seconds=float(number) if time is None else time,
        request_events=[
            engine_pb2.RequestEvent(kind=kind, request_number=request, age_seconds=age)
            for kind, request, age in events
        ],
    )


def events_of(message):
    return [
        (event.kind, event.request_number, pytest.approx(event.age_seconds))
        for event in message.request_events
    ]


class Stream:
    """One stream as the server sees it; the test says when it reads, answers and ends."""

    def __init__(self, requests, context):
        self._requests = requests
        self.metadata = dict(context.invocation_metadata())
        self.answers = queue.SimpleQueue()
        self.registration = next(requests).registration

    def accept(self):
        self.answers.put(
            throttle_service_pb2.StreamIterationsResponse(
                accepted=throttle_service_pb2.RegistrationAccepted(registration_id="r")
            )
        )
        return self

    def read(self):
        return next(self._requests).state

    def decide(self, number):
        self.answers.put(
            throttle_service_pb2.StreamIterationsResponse(
                decision=decision_pb2.Decision(sequence_number=number, target_clock_mhz=900)
            )
        )

    def end(self):
        self.answers.put(None)


class Server(throttle_service_pb2_grpc.ThrottleServiceServicer):
    """A real gRPC server on a Unix socket whose streams the test plays."""

    def __init__(self, path):
        self.target = f"unix:{path}"
        self._streams = queue.SimpleQueue()
        self._server = None

    def start(self):
        self._server = grpc.server(ThreadPoolExecutor(8))
        throttle_service_pb2_grpc.add_ThrottleServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.target)
        self._server.start()
        return self

    def stop(self):
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None

    def stream(self):
        return self._streams.get(timeout=DEADLINE_SECONDS)

    def StreamIterations(self, request_iterator, context):  # noqa: N802 - the protocol's name
        stream = Stream(request_iterator, context)
        context.add_callback(stream.end)
        self._streams.put(stream)
        yield from iter(stream.answers.get, None)

    def Evaluate(self, request, context):  # noqa: N802
        raise NotImplementedError

    GetStatus = ReleaseControl = Evaluate


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "throttle.sock")
    yield server
    server.stop()


@pytest.fixture
def connect(server):
    clients = []

    def make(**options):
        client = ThrottleClient(
            registration(), server.target, **{"backoff": QUICK, "draw": lambda: 0.0} | options
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close(timeout_seconds=0.05)  # the played server does not answer the end


def test_states_are_sent_and_decisions_come_back(server, connect):
    server.start()
    client = connect()
    stream = server.stream().accept()
    assert stream.registration.engine_id == "engine"
    assert client.wait_until_connected(DEADLINE_SECONDS)
    client.submit(state(1))
    assert stream.read() == state(1)
    stream.decide(1)
    decision = client.wait_for_decision(1, DEADLINE_SECONDS)
    assert decision.target_clock_mhz == 900
    assert client.latest_decision == decision
    assert client.statistics == ClientStatistics(1, 1, 0, 0, 1, 0)


def test_waiting_for_a_decision_ends_at_the_timeout_at_close_and_by_a_newer_one(server, connect):
    server.start()
    client = connect()
    stream = server.stream().accept()
    assert client.wait_for_decision(1, 0.0) is None
    client.submit(state(1))
    stream.decide(5)
    assert client.wait_for_decision(3, DEADLINE_SECONDS).sequence_number == 5
    waited = []
    waiter = threading.Thread(target=lambda: waited.append(client.wait_for_decision(9, 60.0)))
    waiter.start()
    client.close(timeout_seconds=0.05)
    waiter.join(DEADLINE_SECONDS)
    assert waited == [None]


def test_an_absent_daemon_raises_nothing_and_is_found_when_it_comes(server, connect):
    client = connect()
    for number in range(1, 1001):
        client.submit(state(number))
    assert client.latest_decision is None
    assert not client.connected
    server.start()
    stream = server.stream().accept()
    assert stream.read().sequence_number == 1000  # the newest alone
    statistics = client.statistics
    assert (statistics.submitted_count, statistics.overtaken_count) == (1000, 999)
    assert statistics.reconnects_count == 0


def test_a_refusal_is_told_and_tried_again(server, connect):
    server.start()
    client = connect()
    server.stream().end()  # without an acceptance
    server.stream().accept()
    assert client.wait_until_connected(DEADLINE_SECONDS)
    assert client.last_error == ""


def test_events_of_overtaken_states_travel_with_the_newer_one_at_their_true_age(server, connect):
    server.start()
    client = connect()
    stream = server.stream().accept()
    assert client.wait_until_connected(DEADLINE_SECONDS)
    with client._mailbox:  # nothing is sent meanwhile
        client.submit(state(1, (ARRIVED, 7, 0.5), time=10.0))
        client.submit(state(2, (FIRST_TOKEN, 7, 0.0), time=11.0))
        client.submit(state(3, (ARRIVED, 8, 0.25), time=12.0))
    message = stream.read()
    assert message.sequence_number == 3
    assert events_of(message) == [(ARRIVED, 7, 2.5), (FIRST_TOKEN, 7, 1.0), (ARRIVED, 8, 0.25)]
    client.submit(state(4, time=13.0))
    assert stream.read() == state(4, time=13.0)  # once, not again
    assert client.statistics.overtaken_count == 2


def test_after_a_reconnect_every_live_request_is_told_anew_with_its_true_age(server, connect):
    server.start()
    client = connect()
    stream = server.stream().accept()
    client.submit(state(1, (ARRIVED, 1, 0.5), (ARRIVED, 2, 0.0), (ARRIVED, 3, 0.0), time=10.0))
    stream.read()
    client.submit(state(2, (FIRST_TOKEN, 1, 0.0), (FINISHED, 2, 0.0), time=11.0))
    stream.read()
    server.stop()
    server.start()
    stream = server.stream().accept()
    assert stream.registration.engine_id == "engine"
    client.submit(state(3, (ABORTED, 3, 0.0), (ARRIVED, 4, 0.1), time=13.0))
    assert events_of(stream.read()) == [
        (ARRIVED, 1, 3.5), (ARRIVED, 3, 3.0), (FIRST_TOKEN, 1, 2.0),
        (ABORTED, 3, 0.0), (ARRIVED, 4, 0.1),
    ]  # fmt: skip
    client.submit(state(4, time=14.0))
    assert events_of(stream.read()) == []
    assert client.statistics.reconnects_count == 1


def test_events_while_no_daemon_is_there_are_remembered_as_live_requests(server, connect):
    client = connect()
    client.submit(state(1, (ARRIVED, 1, 0.0), (ARRIVED, 2, 0.0), time=1.0))
    client.submit(state(2, (FINISHED, 1, 0.0), time=2.0))
    client.submit(state(3, time=3.0))
    server.start()
    stream = server.stream().accept()
    assert events_of(stream.read()) == [(ARRIVED, 2, 2.0)]


def test_too_many_carried_events_start_a_new_stream_that_tells_them_all(server, connect):
    server.start()
    client = connect(carried_events_limit=3)
    server.stream().accept()
    assert client.wait_until_connected(DEADLINE_SECONDS)
    with client._mailbox:
        for number in range(1, 7):
            client.submit(state(number, (ARRIVED, number, 0.0)))
    stream = server.stream().accept()
    client.submit(state(7))  # whatever the old stream took with it, the new one tells
    message = stream.read()
    assert [event.request_number for event in message.request_events] == [1, 2, 3, 4, 5, 6]


def test_submit_never_raises(server, connect):
    client = connect()
    for wrong in (None, 3, "state", decision_pb2.Decision()):
        client.submit(wrong)
    client.close()
    client.submit(state(1))
    assert client.statistics.refused_count == 4
    assert client.statistics.submitted_count == 0


def test_a_state_with_absurd_times_does_not_spoil_the_later_ones(server, connect):
    client = connect()
    client.submit(state(1, (ARRIVED, 1, float("nan")), time=float("nan")))
    client.submit(state(2, time=2.0))
    server.start()
    assert events_of(server.stream().accept().read()) == [(ARRIVED, 1, 0.0)]


def test_closing_ends_the_stream_and_the_thread(server, connect):
    server.start()
    client = connect()
    stream = server.stream().accept()
    assert client.wait_until_connected(DEADLINE_SECONDS)
    closing = threading.Thread(target=client.close)
    closing.start()
    with pytest.raises(StopIteration):
        stream.read()
    stream.end()
    closing.join(DEADLINE_SECONDS)
    assert not client._thread.is_alive()
    assert not client.connected
    client.close()


def test_token_and_metadata_are_sent(server, connect):
    server.start()
    connect(token="secret", metadata=[("x-node", "n1")])
    metadata = server.stream().metadata
    assert metadata["authorization"] == "Bearer secret"
    assert metadata["x-node"] == "n1"


def test_the_context_manager_closes(server):
    with ThrottleClient(registration(), server.target, backoff=QUICK) as client:
        assert client._thread.is_alive()
    assert not client._thread.is_alive()


def test_the_registration_is_copied(server):
    server.start()
    message = registration()
    with ThrottleClient(message, server.target, backoff=QUICK):
        message.engine_id = "changed"
        stream = server.stream()
        assert stream.registration.engine_id == "engine"
        stream.end()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"registration": "engine"}, TypeError),
        ({"registration": engine_pb2.EngineRegistration(gpu_uuids=["GPU-a"])}, ValueError),
        ({"registration": engine_pb2.EngineRegistration(engine_id="e")}, ValueError),
        ({"registration": registration(), "target": ""}, ValueError),
        ({"registration": registration(), "carried_events_limit": 0}, ValueError),
    ],
)
def test_wrong_use_is_told_at_construction(arguments, error):
    with pytest.raises(error, match="allowed"):
        ThrottleClient(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"initial_seconds": 0.0},
        {"initial_seconds": 2.0, "maximum_seconds": 1.0},
        {"jitter_ratio": 1.5},
    ],
)
def test_a_backoff_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match="allowed"):
        ReconnectBackoff(**arguments)


@given(failures=st.integers(1, 10_000), draw=st.floats(0.0, 0.999))
def test_the_backoff_doubles_up_to_its_maximum_less_the_jitter(failures, draw):
    backoff = ReconnectBackoff(initial_seconds=0.1, maximum_seconds=5.0, jitter_ratio=0.5)
    delay = backoff.delay_seconds(failures, draw)
    full = min(5.0, 0.1 * 2.0 ** (failures - 1)) if failures < 60 else 5.0
    assert full * 0.5 <= delay <= full


def completed(number, *events, time=None):
    message = state(number, *events, time=time)
    message.phase = engine_pb2.ITERATION_PHASE_COMPLETED
    message.iteration_duration_seconds = 0.01
    return message


def test_completed_iterations_wait_in_line_and_only_plans_are_overtaken(server, connect):
    server.start()
    client = connect()
    stream = server.stream().accept()
    assert client.wait_until_connected(DEADLINE_SECONDS)
    with client._mailbox:
        client.submit(completed(1, (ARRIVED, 1, 0.0)))
        client.submit(state(2, (ARRIVED, 2, 0.0)))
        client.submit(completed(3, (FIRST_TOKEN, 1, 0.0)))
        client.submit(completed(4))
    assert stream.read() == completed(1, (ARRIVED, 1, 0.0))
    third = stream.read()
    assert third.sequence_number == 3
    assert events_of(third) == [(ARRIVED, 2, 1.0), (FIRST_TOKEN, 1, 0.0)]
    assert stream.read() == completed(4)
    assert client.wait_until_sent(DEADLINE_SECONDS)
    statistics = client.statistics
    assert (statistics.sent_count, statistics.overtaken_count) == (3, 1)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_beyond_its_limit_the_line_drops_the_oldest_and_no_event(server, connect, limit):
    server.start()
    client = connect(completed_states_limit=limit)
    stream = server.stream().accept()
    assert client.wait_until_connected(DEADLINE_SECONDS)
    with client._mailbox:
        for number in range(1, 11):
            client.submit(completed(number, (ARRIVED, number, 0.0)))
    kept = max(limit, 1)
    read = [stream.read() for _ in range(kept)]
    assert [message.sequence_number for message in read] == list(range(11 - kept, 11))
    told = [event.request_number for message in read for event in message.request_events]
    assert told == list(range(1, 11))
    assert client.statistics.overtaken_count == 10 - kept


def test_without_a_daemon_no_line_forms(server, connect):
    client = connect()
    for number in range(1, 101):
        client.submit(completed(number, (ARRIVED, number, 0.0)))
    assert len(client._outbox) == 1
    server.start()
    stream = server.stream().accept()
    message = stream.read()
    assert message.sequence_number == 100
    assert len(message.request_events) == 100


def test_a_lost_stream_keeps_the_newest_of_the_line_and_every_request(server, connect):
    server.start()
    client = connect()
    stream = server.stream().accept()
    assert client.wait_until_connected(DEADLINE_SECONDS)
    with client._mailbox:
        for number in range(1, 6):
            client.submit(completed(number, (ARRIVED, number, 0.0)))
        client._disconnect()
        assert len(client._outbox) == 1
    stream.end()
    message = server.stream().accept().read()
    assert message.sequence_number == 5
    assert [event.request_number for event in message.request_events] == [1, 2, 3, 4, 5]


@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.integers(0, 3), st.booleans()), min_size=1, max_size=60
    ),
    limit=st.integers(0, 4),
)
def test_every_event_is_sent_exactly_once_and_in_order(steps, limit):
    """Any mix of plans and completed iterations, sent at any pace, without a network."""
    outbox = Outbox(CARRIED_EVENTS_LIMIT, limit)
    arrived, told, numbers = 0, [], []

    def send():
        message = outbox.take(replay=False)
        numbers.append(message.sequence_number)
        told.extend(event.request_number for event in message.request_events)
        assert all(event.age_seconds >= 0 for event in message.request_events)

    for number, (is_completed, events, sends) in enumerate(steps, start=1):
        make = completed if is_completed else state
        message = make(number, *((ARRIVED, arrived + k + 1, 0.0) for k in range(events)))
        assert not outbox.put(message, connected=True)
        arrived += events
        if sends:
            send()
    while not outbox.empty:
        send()
    assert told == list(range(1, arrived + 1))
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == len(steps)
    assert outbox._carried_count == 0
    assert len(numbers) + outbox.overtaken_count == len(steps)
