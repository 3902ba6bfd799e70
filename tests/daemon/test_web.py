from __future__ import annotations

import http.client
import socket
import threading
import time

import pytest

from throttle.daemon.web import REQUESTS_LIMIT, Page, serve_http
from throttle.errors import ConflictError


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def served(port):
    pages = {"/": lambda accept: Page("text/plain", accept.encode())}
    stop = serve_http(pages, "127.0.0.1", port, request_seconds=2.0)
    yield port
    stop()


def ask(port, method="GET", path="/", headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def test_a_known_path_is_answered_and_no_other(served):
    answer, body = ask(served, headers={"Accept": "text/x"})
    assert (answer.status, body) == (200, b"text/x")
    assert ask(served, "HEAD")[1] == b""
    for path in ("/other", "/../../etc/passwd", "/%2e%2e/"):
        assert ask(served, path=path)[0].status == 404
    assert ask(served, path="/?query")[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_reading_is_allowed(served, method):
    assert ask(served, method)[0].status == 501


def test_every_answer_forbids_scripts_and_requests_elsewhere(served):
    for path in ("/", "/other"):
        policy = ask(served, path=path)[0].headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy


def test_clients_that_send_a_byte_now_and_then_cannot_keep_others_out(served):
    slow = [socket.create_connection(("127.0.0.1", served)) for _ in range(REQUESTS_LIMIT)]
    ended = threading.Event()

    def drip():
        while not ended.wait(0.05):
            for each in slow:
                try:
                    each.send(b"G")
                except OSError:
                    continue

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        deadline = time.monotonic() + 10.0
        while True:
            try:
                assert ask(served)[0].status == 200
                break
            except (OSError, http.client.HTTPException):
                assert time.monotonic() < deadline
                ended.wait(0.05)
    finally:
        ended.set()
        thread.join()
        for each in slow:
            each.close()


def test_a_port_in_use_is_named(served):
    with pytest.raises(ConflictError, match=f"metrics_address 127.0.0.1:{served} cannot be had"):
        serve_http({}, "127.0.0.1", served)
