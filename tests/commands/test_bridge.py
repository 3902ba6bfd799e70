"""`throttle bridge` between a played engine and a played daemon."""

from __future__ import annotations

import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.engines.samples import DATA
from tests.test_client import DEADLINE_SECONDS, Server
from throttle.cli import main

TRTLLM = json.loads(DATA.joinpath("written", "trtllm_statistics.json").read_text())
PAGES = [path.read_text() for path in sorted(DATA.joinpath("vllm-0.32.0").glob("metrics_*.txt"))]


@pytest.fixture
def page():
    """An HTTP server whose answers the test lists; the last one stays."""
    answers = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = (answers.pop(0) if len(answers) > 1 else answers[0]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.answers = answers
    server.url = f"http://127.0.0.1:{server.server_port}/metrics"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def daemon(tmp_path):
    server = Server(tmp_path / "throttle.sock").start()
    yield server
    server.stop()


def bridge(daemon, source, *arguments):
    return [
        "bridge", source, "--target", daemon.target, "--engine-id", "e", "--gpus", "GPU-a,GPU-b",
        "--model", "qwen3-30b-a3b", *map(str, arguments),
    ]  # fmt: skip


def play(daemon, arguments, wanted):
    """Run the command, read as many states from the daemon's side, and send it SIGTERM."""
    seen = []

    def receive():
        try:
            stream = daemon.stream().accept()
            seen.append(stream.registration)
            seen.extend(stream.read() for _ in range(wanted))
            stream.end()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    reader = threading.Thread(target=receive)
    reader.start()
    try:
        assert main(arguments) == 0
    finally:
        reader.join(DEADLINE_SECONDS)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return seen


def test_scraped_pages_reach_the_daemon_with_the_engines_own_kv_blocks(page, daemon):
    page.answers += PAGES
    arguments = bridge(daemon, "scrape", "--url", page.url, "--period-seconds", 0.05)
    registration, *states = play(daemon, arguments, 10)
    assert registration.engine_name == "vllm"
    assert list(registration.gpu_uuids) == ["GPU-a", "GPU-b"]
    assert registration.limits.kv_blocks_count == 512
    assert registration.limits.kv_block_tokens == 128
    assert [state.sequence_number for state in states] == list(range(1, 11))


def test_polled_statistics_reach_the_daemon(page, daemon):
    page.answers += [json.dumps(TRTLLM), "[]"]
    arguments = bridge(
        daemon, "trtllm", "--url", page.url, "--period-seconds", 0.05, "--kv-blocks", 1000,
        "--mode", "act", "--tpot-seconds", 0.05,
    )  # fmt: skip
    registration, *states = play(daemon, arguments, 3)
    assert registration.default_slos.tpot_seconds == 0.05
    assert [state.scheduled.num_decode_requests for state in states] == [4, 5, 5]


def test_published_passes_reach_the_daemon(daemon):
    zmq = pytest.importorskip("zmq")
    payload = bytes.fromhex(
        DATA.joinpath("dynamo-1.6.1", "mocker_forward_pass_metrics.hex").read_text().split()[8]
    )
    stop = threading.Event()
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        port = publisher.bind_to_random_port("tcp://127.0.0.1")

        def publish():
            while not stop.wait(0.01):
                publisher.send_multipart([b"", b"\0" * 8, payload])

        thread = threading.Thread(target=publish)
        thread.start()
        arguments = bridge(
            daemon, "fpm", "--endpoint", f"tcp://127.0.0.1:{port}", "--kv-blocks", 10,
            "--timing", "gpu",
        )  # fmt: skip
        try:
            _, state, *_ = play(daemon, arguments, 2)
        finally:
            stop.set()
            thread.join()
    assert state.scheduled.num_decode_requests > 0


@pytest.mark.parametrize(
    ("answer", "arguments", "problem"),
    [
        ("up 1\n", ("scrape",), "no metrics of vLLM, SGLang or llama.cpp"),
        ("<html>", ("trtllm", "--kv-blocks", 9), "enable_iter_perf_stats"),
        ("[]", ("trtllm",), "kv-blocks is not given"),
        ("[]", ("trtllm", "--kv-blocks", 9, "--period-seconds", 0), "period-seconds is 0.0"),
        ("[]", ("trtllm", "--kv-blocks", 9, "--token-file", "/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_work_ends_in_one_line(page, daemon, answer, arguments, problem, capsys):  # noqa: PLR0917
    page.answers.append(answer)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    source, *others = arguments
    try:
        assert main(bridge(daemon, source, "--url", page.url, *others)) == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert problem in capsys.readouterr().err
