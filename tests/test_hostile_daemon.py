"""Whatever listens in the daemon's place, the engine's calls return at once and raise nothing."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.test_client import (
    ARRIVED,
    DEADLINE_SECONDS,
    FINISHED,
    QUICK,
    Server,
    events_of,
    registration,
    state,
)
from throttle.client import ThrottleClient
from throttle.credentials import read_token, tls_credentials
from throttle.engines.reporter import Reporter
from throttle.v1 import engine_pb2, throttle_service_pb2_grpc

#: Far above what a submission takes, also where a busy machine keeps the process off its cores
#: for a while; far below what waiting for anything would.
LONGEST_SUBMIT_SECONDS = 2.0


class RawListener:
    """Accepts connections on a Unix socket and lets a test misbehave on them."""

    def __init__(self, path, misbehave):
        self.connections_count = 0
        self._misbehave = misbehave
        self._changed = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(16)
        self._open = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._open.append(connection)
                with contextlib.suppress(OSError):
                    self._misbehave(connection)
                with self._changed:
                    self.connections_count += 1
                    self._changed.notify_all()

    def wait_for_connections(self, count):
        with self._changed:
            return self._changed.wait_for(lambda: self.connections_count >= count, DEADLINE_SECONDS)

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(DEADLINE_SECONDS)
        for connection in self._open:
            connection.close()


def completed():
    return engine_pb2.IterationState(
        phase=engine_pb2.ITERATION_PHASE_COMPLETED, iteration_duration_seconds=0.02
    )


def submit_many(client, first=1, count=500):
    """An engine's loop; the longest call must be far from waiting for anything."""
    longest = 0.0
    for number in range(first, first + count):
        started = time.perf_counter()
        client.submit(state(number, (ARRIVED, number, 0.0), (FINISHED, number, 0.0)))
        longest = max(longest, time.perf_counter() - started)
    assert longest < LONGEST_SUBMIT_SECONDS
    return client.statistics


@pytest.mark.parametrize(
    ("misbehave", "connections"),
    [
        pytest.param(lambda c: c.sendall(b"\x00\xff" * 4096), 2, id="wrong bytes"),
        pytest.param(lambda c: c.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), 2, id="http"),
        pytest.param(lambda c: None, 1, id="never answers"),
        pytest.param(lambda c: c.close(), 2, id="closes"),
    ],
)
def test_what_is_no_daemon_costs_the_engine_nothing(tmp_path, misbehave, connections):
    path = tmp_path / "throttle.sock"
    listener = RawListener(path, misbehave)
    with ThrottleClient(registration(), f"unix:{path}", backoff=QUICK) as client:
        assert listener.wait_for_connections(1)
        statistics = submit_many(client)
        assert statistics.submitted_count == 500
        assert statistics.sent_count == 0
        assert not client.connected
        assert listener.wait_for_connections(connections)  # it tries again
        listener.close()
        path.unlink()
        server = Server(path).start()
        try:
            stream = server.stream().accept()  # and finds a real one when it comes
            client.submit(state(501))
            while stream.read().sequence_number != 501:
                continue
            stream.end()
        finally:
            server.stop()


def test_a_daemon_that_answers_nonsense_is_left_and_tried_again(tmp_path):
    calls = threading.Semaphore(0)

    def nonsense(requests, context):
        next(requests)
        calls.release()
        yield b"\xff\xff\xff\xff"

    handler = grpc.method_handlers_generic_handler(
        "throttle.v1.ThrottleService",
        {"StreamIterations": grpc.stream_stream_rpc_method_handler(nonsense)},
    )
    path = tmp_path / "throttle.sock"
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        with ThrottleClient(registration(), f"unix:{path}", backoff=QUICK) as client:
            for _ in range(3):
                assert calls.acquire(timeout=DEADLINE_SECONDS)
            submit_many(client)
            assert not client.connected
            assert client.latest_decision is None
    finally:
        server.stop(0).wait()


def test_a_daemon_that_accepts_and_never_reads_or_decides_holds_nobody_up(tmp_path):
    server = Server(tmp_path / "throttle.sock").start()
    try:
        with ThrottleClient(registration(), server.target, backoff=QUICK) as client:
            stream = server.stream().accept()
            assert client.wait_until_connected(DEADLINE_SECONDS)
            submit_many(client, count=5000)
            assert client.latest_decision is None
            stream.end()
    finally:
        server.stop()


def test_answers_that_come_ten_seconds_late_hold_no_iteration_up(tmp_path):
    """Engine time is the test's: an iteration lasts 20 ms of it, a daemon's answer takes 500."""
    late = 500
    server = Server(tmp_path / "throttle.sock").start()
    engine_seconds = 0.0
    with ThrottleClient(registration(), server.target, backoff=QUICK) as client:
        reporter = Reporter(client, tells_arrivals=False, clock=lambda: engine_seconds)
        try:
            stream = server.stream().accept()
            assert client.wait_until_connected(DEADLINE_SECONDS)
            longest = 0.0
            for number in range(1, 2 * late + 1):
                engine_seconds = 0.02 * number
                started = time.perf_counter()
                reporter.send(completed(), idle=False)
                longest = max(longest, time.perf_counter() - started)
                received = stream.read()
                assert received.sequence_number == number  # sent, though none before is answered
                assert received.engine_time_seconds == engine_seconds
                if number <= late:
                    assert client.latest_decision is None
                    continue
                stream.decide(number - late)
                answer = client.wait_for_decision(number - late, DEADLINE_SECONDS)
                assert answer.sequence_number == number - late  # taken for what it answers
            assert longest < LONGEST_SUBMIT_SECONDS
            assert reporter.errors_count == 0
            statistics = client.statistics
            assert statistics.sent_count == statistics.submitted_count == 2 * late
            assert (statistics.overtaken_count, statistics.decisions_count) == (0, late)
            stream.end()
        finally:
            server.stop()


def test_a_closed_stream_loses_no_live_request(tmp_path):
    server = Server(tmp_path / "throttle.sock").start()
    try:
        with ThrottleClient(registration(), server.target, backoff=QUICK) as client:
            stream = server.stream().accept()
            client.submit(state(1, (ARRIVED, 1, 0.0), time=1.0))
            stream.read()
            stream.end()
            stream = server.stream().accept()
            client.submit(state(2, time=3.0))
            assert events_of(stream.read()) == [(ARRIVED, 1, 2.0)]
            stream.end()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A certificate of its own authority for localhost, and its key."""
    folder = tmp_path_factory.mktemp("certificates")
    try:
        subprocess.run(
            [
                "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
                "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
                "-keyout", folder / "key.pem", "-out", folder / "certificate.pem",
            ],
            check=True, capture_output=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return folder


def test_tls_with_certificates_on_both_sides_and_a_token(tmp_path, certificates):
    certificate, key = certificates / "certificate.pem", certificates / "key.pem"
    server = Server(tmp_path / "unused.sock")
    grpc_server = grpc.server(ThreadPoolExecutor(4))
    throttle_service_pb2_grpc.add_ThrottleServiceServicer_to_server(server, grpc_server)
    port = grpc_server.add_secure_port(
        "localhost:0",
        grpc.ssl_server_credentials(
            [(key.read_bytes(), certificate.read_bytes())],
            root_certificates=certificate.read_bytes(),
            require_client_auth=True,
        ),
    )
    grpc_server.start()
    token = tmp_path / "token"
    token.write_text("secret\n")
    try:
        with ThrottleClient(
            registration(),
            f"localhost:{port}",
            credentials=tls_credentials(certificate, certificate, key),
            token=read_token(token),
            backoff=QUICK,
        ) as client:
            stream = server.stream().accept()
            assert client.wait_until_connected(DEADLINE_SECONDS)
            assert stream.metadata["authorization"] == "Bearer secret"
            stream.end()
        with ThrottleClient(
            registration(),
            f"localhost:{port}",
            credentials=tls_credentials(certificate),
            backoff=QUICK,
        ) as client:
            assert not client.wait_until_connected(0.3)  # a certificate is asked for
    finally:
        grpc_server.stop(0).wait()


def test_certificates_and_tokens_that_cannot_be_used_are_refused(tmp_path):
    empty, good = tmp_path / "empty", tmp_path / "good"
    empty.write_text("\n")
    good.write_text("x")
    with pytest.raises(ValueError, match="empty"):
        tls_credentials(empty)
    with pytest.raises(ValueError, match="both of them or neither"):
        tls_credentials(good, certificate_file=good)
    with pytest.raises(OSError, match="missing"):
        tls_credentials(tmp_path / "missing")
    with pytest.raises(ValueError, match="empty"):
        read_token(empty)
    good.write_text("two\nlines")
    with pytest.raises(ValueError, match="token"):
        read_token(good)
