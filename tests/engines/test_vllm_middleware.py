from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

from throttle.engines.request_slos import read_slos
from throttle.engines.vllm_middleware import RequestMiddleware
from throttle.v1 import engine_pb2


class Application:
    """What stands behind the middleware: keeps the body it is given."""

    def __init__(self):
        self.body = None
        self.scope = None

    async def __call__(self, scope, receive, send):
        self.scope = scope
        parts = []
        message = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            parts.append(message.get("body", b""))
        self.body = b"".join(parts)
        self.after = await receive()


class StatLogger:
    def __init__(self):
        self.arrivals_count = 0

    def note_arrival(self):
        self.arrivals_count += 1


def ask(body, headers=(), path="/v1/completions", loggers=(), chunks=1):
    application = Application()
    adapter = SimpleNamespace(per_engine_stat_loggers=dict(enumerate(loggers)))
    manager = SimpleNamespace(stat_loggers=[adapter, SimpleNamespace()])
    client = SimpleNamespace(logger_manager=manager)
    scope = {
        "type": "http",
        "path": path,
        "headers": [(b"content-length", str(len(body)).encode()), *headers],
        "app": SimpleNamespace(state=SimpleNamespace(engine_client=client)),
    }
    size = -(-len(body) // chunks)
    messages = [
        {
            "type": "http.request",
            "body": body[index * size : (index + 1) * size],
            "more_body": index < chunks - 1,
        }
        for index in range(chunks)
    ]
    messages.append({"type": "http.disconnect"})

    async def receive():
        return messages.pop(0)

    asyncio.run(RequestMiddleware(application)(scope, receive, None))
    return application


TTFT = (b"x-slo-ttft-ms", b"250")
BODY = json.dumps({"prompt": "hello", "max_tokens": 3}).encode()


@pytest.mark.parametrize("chunks", [1, 3])
def test_slo_headers_become_arguments_of_the_sampling(chunks):
    application = ask(BODY, [TTFT, (b"x-slo-tpot-ms", b"40")], chunks=chunks)
    document = json.loads(application.body)
    assert document["prompt"] == "hello"
    assert document["vllm_xargs"] == {"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "40"}
    headers = dict(application.scope["headers"])
    assert headers[b"content-length"] == str(len(application.body)).encode()
    assert application.after["type"] == "http.disconnect"


def test_what_the_body_says_itself_wins():
    body = json.dumps({"vllm_xargs": {"x-slo-ttft-ms": "90", "k": 1}}).encode()
    application = ask(body, [TTFT])
    assert json.loads(application.body)["vllm_xargs"] == {"x-slo-ttft-ms": "90", "k": 1}


@pytest.mark.parametrize(
    ("body", "headers", "path"),
    [
        (BODY, (), "/v1/completions"),
        (b"no json", [TTFT], "/v1/completions"),
        (b"[1, 2]", [TTFT], "/v1/completions"),
        (BODY, [TTFT], "/metrics"),
    ],
)
def test_other_requests_pass_as_they_came(body, headers, path):
    assert ask(body, headers, path).body == body


def test_arrivals_are_told_to_the_stat_logger():
    logger = StatLogger()
    ask(BODY, loggers=[logger])
    ask(BODY, path="/health", loggers=[logger])
    assert logger.arrivals_count == 1


def test_a_stat_logger_that_fails_costs_no_request():
    class Broken(StatLogger):
        def note_arrival(self):
            raise RuntimeError

    assert ask(BODY, loggers=[Broken()]).body == BODY


def test_a_client_that_goes_away_while_it_sends_is_passed_on():
    seen = []

    async def application(scope, receive, send):
        seen.append(await receive())

    async def receive():
        return {"type": "http.disconnect"}

    scope = {"type": "http", "path": "/v1/completions", "headers": [TTFT]}
    asyncio.run(RequestMiddleware(application)(scope, receive, None))
    assert seen == [{"type": "http.disconnect"}]


def test_limits_are_read_from_milliseconds_and_nonsense_is_left_out():
    slos = engine_pb2.ServiceLevelObjectives()
    values = {
        "x-slo-ttft-ms": "250",
        "x-slo-tpot-ms": 40,
        "x-slo-e2e-ms": "soon",
        "x-slo-tbt-ms": 0,
    }
    read_slos(values, slos)
    assert slos == engine_pb2.ServiceLevelObjectives(ttft_seconds=0.25, tpot_seconds=0.04)
    read_slos({"x-slo-e2e-ms": "nan", "x-slo-tbt-ms": "inf"}, slos)
    assert not slos.HasField("e2e_seconds")
    assert not slos.HasField("tbt_seconds")
