"""`throttle bridge`: report an engine from outside it, by what it publishes."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Final

from throttle.client import DEFAULT_TARGET
from throttle.engines.options import EngineOptions
from throttle.engines.reporter import Reporter
from throttle.errors import ThrottleError
from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

_MODES: Final = {
    "act": engine_pb2.CONTROL_MODE_ACT,
    "shadow": engine_pb2.CONTROL_MODE_SHADOW,
    "record": engine_pb2.CONTROL_MODE_RECORD,
}
_TIMING: Final = {
    "gpu": engine_pb2.TIMING_SOURCE_GPU_EVENT,
    "host": engine_pb2.TIMING_SOURCE_HOST_INTERVAL,
}
_SLOS: Final = ("ttft_seconds", "tbt_seconds", "tpot_seconds", "e2e_seconds")

#: A scrape tells of many iterations at once; all of them are to reach the daemon.
_COMPLETED_STATES: Final = 2048
_HTTP_SECONDS: Final = 5.0
_CONNECT_SECONDS: Final = 5.0

_log = logging.getLogger("throttle.bridge")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "bridge",
        help="report an engine from outside it",
        description="Report one engine until SIGTERM or SIGINT. Adapters inside vLLM tell more: "
        "see docs/integration.md.",
    )
    sources = parser.add_subparsers(title="sources", metavar="SOURCE", required=True)

    scrape = sources.add_parser("scrape", help="the engine's Prometheus page")
    scrape.add_argument("--url", required=True, help="such as http://127.0.0.1:8000/metrics")
    scrape.add_argument("--engine", choices=["vllm", "sglang", "llamacpp"], help="default: guessed")
    scrape.add_argument("--period-seconds", type=float, default=0.25, help="default: %(default)s")
    scrape.set_defaults(run=_run, report=_scrape)

    fpm = sources.add_parser("fpm", help="ForwardPassMetrics of SGLang, Dynamo and vLLM")
    source = fpm.add_mutually_exclusive_group(required=True)
    source.add_argument("--endpoint", help="ZMQ address, such as tcp://127.0.0.1:20380")
    source.add_argument("--dynamo", metavar="NAMESPACE.COMPONENT.ENDPOINT", help="event plane")
    fpm.add_argument("--discovery", default="etcd", help="of Dynamo; default: %(default)s")
    fpm.add_argument("--request-plane", default="nats", help="of Dynamo; default: %(default)s")
    fpm.add_argument("--worker-id", default="", help="default: the first that is heard")
    fpm.add_argument("--dp-rank", type=int, default=0, help="default: %(default)s")
    fpm.add_argument(
        "--timing", choices=list(_TIMING), default="host", help="gpu for SGLang; default: host"
    )
    fpm.set_defaults(run=_run, report=_forward_pass_metrics)

    trtllm = sources.add_parser("trtllm", help="iteration statistics of trtllm-serve")
    trtllm.add_argument("--url", required=True, help="such as http://127.0.0.1:8000/metrics")
    trtllm.add_argument("--dp-rank", type=int, default=0, help="default: %(default)s")
    trtllm.add_argument("--period-seconds", type=float, default=0.1, help="default: %(default)s")
    trtllm.set_defaults(run=_run, report=_trtllm)

    for source_parser in (scrape, fpm, trtllm):
        _add_registration(source_parser)


def _add_registration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the engine, and the daemon that it is reported to")
    group.add_argument("--target", default=DEFAULT_TARGET, help="default: %(default)s")
    group.add_argument("--engine-id", required=True)
    group.add_argument("--gpus", required=True, help="UUIDs, separated by commas")
    model = group.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", default="", help="name in the catalogue")
    model.add_argument("--config-json", type=Path, help="the model's Hugging Face config.json")
    group.add_argument("--mode", choices=list(_MODES), default="shadow", help="default: shadow")
    for name in _SLOS:
        group.add_argument(f"--{name.replace('_', '-')}", type=float)
    for name, default in (
        ("tensor-parallel", 1),
        ("pipeline-parallel", 1),
        ("expert-parallel", 1),
        ("running-requests", 256),
        ("batched-tokens", 8192),
        ("kv-block-tokens", 16),
    ):
        group.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    group.add_argument("--kv-blocks", type=int, default=0, help="scraped pages may tell it")
    group.add_argument("--lease-seconds", type=float, default=0.0)
    for name in ("ca-file", "certificate-file", "key-file", "token-file"):
        group.add_argument(f"--{name}", default="")


def _run(arguments: argparse.Namespace) -> int:
    """Report until a signal comes."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    arguments.report(arguments, stop)
    return 0


def _scrape(arguments: argparse.Namespace, stop: threading.Event) -> None:
    from throttle.engines.scrape import ENGINES, WindowReader, engine_of, read_page  # noqa: PLC0415

    text = _first_page(arguments, stop)
    if text is None:
        return
    engine = arguments.engine or engine_of(text)
    if engine is None:
        raise ThrottleError(
            f"{arguments.url} has no metrics of vLLM, SGLang or llama.cpp; start SGLang with "
            "--enable-metrics and llama-server with --metrics"
        )
    names = ENGINES[engine]
    page = read_page(text, names)
    with _reporter(arguments, engine, page.kv_blocks_count, page.kv_block_tokens) as reporter:
        reader = WindowReader(names, arguments.kv_blocks * arguments.kv_block_tokens)
        for _ in reader.read(page, reporter.now_seconds()):
            continue
        for answer in _poll(arguments, stop):
            states = reader.read(read_page(answer, names), reporter.now_seconds())
            for at_seconds, state in states:
                reporter.send(state, idle=False, at_seconds=at_seconds)


def _trtllm(arguments: argparse.Namespace, stop: threading.Event) -> None:
    from throttle.engines.trtllm import IterationStatisticsReader  # noqa: PLC0415

    reader = IterationStatisticsReader(arguments.dp_rank)
    with _reporter(arguments, "tensorrt-llm") as reporter:
        for answer in _poll(arguments, stop):
            try:
                entries = json.loads(answer)
                states = list(reader.read(entries if isinstance(entries, list) else [entries]))
            except (ValueError, TypeError, AttributeError) as error:
                raise ThrottleError(
                    f"{arguments.url} does not answer iteration statistics as JSON ({error}); set "
                    "enable_iter_perf_stats in the options of trtllm-serve"
                ) from None
            now = reporter.now_seconds()
            for age_seconds, state in states:
                reporter.send(state, idle=False, at_seconds=now - age_seconds)
    if reader.missed_count:
        _log.warning("%d iterations were not told; poll more often", reader.missed_count)


def _forward_pass_metrics(arguments: argparse.Namespace, stop: threading.Event) -> None:
    from throttle.engines.forward_pass_metrics import (  # noqa: PLC0415
        ForwardPassReader,
        dynamo_payloads,
        zmq_payloads,
    )

    reader = ForwardPassReader(_TIMING[arguments.timing], arguments.worker_id, arguments.dp_rank)

    def payloads() -> Iterator[bytes | None]:
        if arguments.endpoint:
            return zmq_payloads(arguments.endpoint)
        return dynamo_payloads(arguments.dynamo, arguments.discovery, arguments.request_plane)

    with _reporter(arguments, "forward-pass-metrics") as reporter:
        for payload in _aside(payloads, stop):
            state = reader.read(payload)
            if state is not None:
                reporter.send(state, idle=False)
    _log.info(
        "%d messages heard, %d missed, %d left out",
        reader.messages_count,
        reader.missed_count,
        reader.refused_count,
    )


@contextlib.contextmanager
def _reporter(
    arguments: argparse.Namespace,
    engine_name: str,
    kv_blocks_count: int = 0,
    kv_block_tokens: int = 0,
) -> Iterator[Reporter]:
    options = EngineOptions(
        address=arguments.target,
        engine_id=arguments.engine_id,
        model=arguments.model,
        mode=_MODES[arguments.mode],
        slos={name: value for name in _SLOS if (value := getattr(arguments, name)) is not None},
        lease_seconds=arguments.lease_seconds,
        ca_file=arguments.ca_file,
        certificate_file=arguments.certificate_file,
        key_file=arguments.key_file,
        token_file=arguments.token_file,
    )
    blocks = arguments.kv_blocks or kv_blocks_count
    if not blocks:
        raise ThrottleError(
            "kv-blocks is not given and the engine does not tell it; allowed: the KV blocks of the "
            "engine, 1 or more"
        )
    registration = engine_pb2.EngineRegistration(
        engine_name=engine_name,
        parallelism=engine_pb2.Parallelism(
            tensor_parallel_count=arguments.tensor_parallel,
            pipeline_parallel_count=arguments.pipeline_parallel,
            data_parallel_count=1,
            expert_parallel_count=arguments.expert_parallel,
        ),
        gpu_uuids=[part.strip() for part in arguments.gpus.split(",") if part.strip()],
        role=engine_pb2.ENGINE_ROLE_MIXED,
        limits=engine_pb2.EngineLimits(
            running_requests_count=arguments.running_requests,
            batched_tokens_count=arguments.batched_tokens,
            kv_blocks_count=blocks,
            kv_block_tokens=(not arguments.kv_blocks and kv_block_tokens)
            or arguments.kv_block_tokens,
        ),
    )
    try:
        if arguments.config_json is not None:
            registration.model.config_json = arguments.config_json.read_text("utf-8")
        options.apply(registration)
        client = options.connect(registration, completed_states_limit=_COMPLETED_STATES)
    except (OSError, ValueError) as error:
        raise ThrottleError(str(error)) from None
    # what a page tells of an arrival comes too late to wake a parked GPU
    reporter = Reporter(client, tells_arrivals=False)
    client.wait_until_connected(_CONNECT_SECONDS)  # what comes before is lost
    try:
        yield reporter
    finally:
        client.wait_until_sent(2.0)
        last_error = client.last_error
        reporter.close()
        statistics = client.statistics
        _log.info(
            "%d states sent, %d dropped, %d decisions",
            statistics.sent_count,
            statistics.overtaken_count,
            statistics.decisions_count,
        )
        if last_error:
            _log.warning("not connected at the end: %s", last_error)


def _first_page(arguments: argparse.Namespace, stop: threading.Event) -> str | None:
    """The first answer; what a page names is needed before anything can be registered."""
    return next(_poll(arguments, stop), None)


def _poll(arguments: argparse.Namespace, stop: threading.Event) -> Iterator[str]:
    """What the URL answers, once a period, until the stop; silence is logged once."""
    period = arguments.period_seconds
    if not period > 0:
        raise ThrottleError(f"period-seconds is {period}; allowed: above 0")
    due = time.monotonic()
    silent = False
    while not stop.wait(max(due - time.monotonic(), 0.0)):
        due = max(due + period, time.monotonic())
        try:
            with urllib.request.urlopen(arguments.url, timeout=_HTTP_SECONDS) as answer:  # noqa: S310 - the operator's URL
                text = answer.read().decode("utf-8", "replace")
        except (urllib.error.URLError, OSError, ValueError) as error:
            if not silent:
                _log.warning("%s does not answer: %s", arguments.url, error)
            silent = True
            continue
        if silent:
            _log.info("%s answers again", arguments.url)
            silent = False
        yield text


def _aside(
    payloads: Callable[[], Iterator[bytes | None]], stop: threading.Event
) -> Iterator[bytes]:
    """Read a source that blocks on a thread of its own, so that a signal is heard."""
    heard: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

    def listen() -> None:
        try:
            for payload in payloads():
                if stop.is_set():
                    return
                if payload is not None:
                    heard.put(payload)
            heard.put(ThrottleError("the source has ended"))
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            heard.put(error)

    threading.Thread(target=listen, name="source", daemon=True).start()
    while not stop.is_set():
        try:
            item = heard.get(timeout=0.2)
        except queue.Empty:
            continue
        if isinstance(item, BaseException):
            raise item
        yield item
