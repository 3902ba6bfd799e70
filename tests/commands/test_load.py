"""The load generator against a server that answers like an engine."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from throttle.cli import main
from throttle.commands.loading import Answer, Endpoint, Limits, LoadGenerator, summary
from throttle.errors import InvalidInputError, ThrottleError
from throttle.simulation.requests import Request


class FakeEngine(ThreadingHTTPServer):
    """Streams as many tokens as asked for; remembers what came and how much ran at once."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.running, self.most_running = [], 0, 0
        self.lock = threading.Lock()
        self.status = 200
        self.silent = threading.Event()  # set: tokens wait until it is cleared or a test ends
        self.released = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Say nothing."""

    def do_POST(self):
        engine = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with engine.lock:
            engine.bodies.append(body)
            engine.running += 1
            engine.most_running = max(engine.most_running, engine.running)
        try:
            if engine.silent.is_set():
                engine.released.wait(20.0)
                return
            self.send_response(engine.status)
            self.end_headers()
            if engine.status != 200:
                self.wfile.write(b"no such model")
                return
            for number in range(body["max_tokens"]):
                self._event({"choices": [{"text": str(number)}]})
            self._event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        finally:
            with engine.lock:  # before the client can know that it is done
                engine.running -= 1
        self.wfile.write(b"data: [DONE]\n\n")

    def finish(self):
        with contextlib.suppress(BrokenPipeError):  # the client gave up
            super().finish()

    def _event(self, event):
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@pytest.fixture
def engine():
    server = FakeEngine()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def _load(engine, limits, **fields):
    endpoint = Endpoint(engine.url, "model", **fields)
    return LoadGenerator(endpoint, limits, time.monotonic, random.Random(1))


def test_every_request_arrives_with_its_lengths_and_is_timed(engine):
    requests = [Request(number, 0.002 * number, 10 + number, 5) for number in range(1, 21)]
    answers = _load(engine, Limits(30.0), ignore_eos=True).run(requests)
    assert sorted(len(body["prompt"]) for body in engine.bodies) == list(range(11, 31))
    assert all(body["ignore_eos"] and body["stream"] for body in engine.bodies)
    figures = summary(answers, 1.0)
    assert (figures["completed_count"], figures["failed_count"]) == (20, 0)
    assert figures["output_tokens_count"] == 100
    assert 0.0 < figures["ttft_p50_seconds"] <= figures["ttft_p99_seconds"] < 30.0
    assert 0.0 <= figures["tpot_p50_seconds"] < 30.0


def test_no_more_than_the_limit_run_at_once_and_none_beyond_the_count(engine):
    requests = (Request(number, 0.0, 4, 3) for number in range(1, 10_000))
    answers = _load(engine, Limits(30.0, requests_count=40, concurrency_count=3)).run(requests)
    assert len(answers) == len(engine.bodies) == 40
    assert engine.most_running <= 3


def test_nothing_is_sent_after_the_duration(engine):
    requests = [Request(1, 0.0, 4, 3), Request(2, 3600.0, 4, 3)]
    answers = _load(engine, Limits(1.0)).run(requests)
    assert len(answers) == 1


def test_a_silent_engine_ends_a_request_after_the_timeout(engine):
    engine.silent.set()
    answers = _load(engine, Limits(5.0), timeout_seconds=0.2).run([Request(1, 0.0, 4, 3)])
    assert "timed out" in answers[0].failure


def test_an_engine_that_only_fails_stops_the_load(engine):
    engine.status = 404
    requests = (Request(number, 0.0, 4, 3) for number in range(1, 10_000))
    with pytest.raises(ThrottleError, match=r"failed 20 requests in a row.*status 404"):
        _load(engine, Limits(30.0, concurrency_count=4)).run(requests)
    assert len(engine.bodies) < 100


def test_one_failure_is_counted_and_named():
    figures = summary([Answer(0.0, 0.1, 0.02, 8), Answer(0.5, failure="reset")], 2.0)
    assert (figures["failed_count"], figures["late_count"]) == (1, 1)
    assert figures["failures"] == ["reset"]
    assert figures["output_tokens_per_second"] == 4.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Endpoint("ftp://host", "m"),
        lambda: Endpoint("http://", "m"),
        lambda: Endpoint("http://host", "m", timeout_seconds=0.0),
        lambda: Limits(0.0),
        lambda: Limits(float("inf")),
        lambda: Limits(1.0, concurrency_count=0),
    ],
)
def test_what_would_not_end_or_goes_nowhere_is_refused(make):
    with pytest.raises(InvalidInputError, match="allowed"):
        make()


def test_the_command_plays_poisson_arrivals_and_writes_the_figures(engine, tmp_path, capsys):
    path = tmp_path / "figures.json"
    arguments = ["--rate", "500", "--requests", "30", "--output-tokens", "2", "4"]
    arguments += ["--json", str(path)]
    assert main(["load", "--url", engine.url, "--model", "model", *arguments]) == 0
    figures = json.loads(path.read_text("utf-8"))
    assert figures == json.loads(capsys.readouterr().out)
    assert figures["completed_count"] == 30


def test_the_command_plays_a_trace(engine, capsys):
    arguments = ["--trace", "azure2023_conv_10min", "--compression", "1000", "--requests", "25"]
    assert main(["load", "--url", engine.url, "--model", "model", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["completed_count"] == 25


def test_the_command_refuses_lengths_out_of_order(engine, capsys):
    arguments = ["--rate", "1", "--prompt-tokens", "9", "3"]
    assert main(["load", "--url", engine.url, "--model", "model", *arguments]) == 1
    assert "--prompt-tokens is (9, 3)" in capsys.readouterr().err
