"""Dynamo's real mocker and front end, without etcd or NATS, into the ForwardPassMetrics bridge."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet
import pytest

from tests.engines.real.processes import (
    GPU_UUID,
    Process,
    answers,
    engine_python,
    free_port,
    make_model,
    until,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

REQUESTS = 200
PROMPT_TOKENS = 120
OUTPUT_TOKENS = 16


def byte_level_tokenizer(folder):
    """One token for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "vocab": {letter: index for index, letter in enumerate(letters)} | {"</s>": 256},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.fixture
def dynamo(tmp_path, wheel):
    """A mocker and a front end; yields the front end's address and the environment of both."""
    python = engine_python("dynamo")
    subprocess.run(
        [
            python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--force-reinstall", "--no-deps", wheel,
        ],
        check=True,
    )  # fmt: skip
    model = make_model(tmp_path / "model", "qwen3-moe")
    byte_level_tokenizer(model)
    environment = {
        "DYN_FILE_KV": str(tmp_path / "discovery"),
        "DYN_EVENT_PLANE": "zmq",
        "HF_HUB_OFFLINE": "1",
    }
    planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    processes = [
        Process(
            [python, "-m", "dynamo.mocker", "--model-path", model, "--model-name", "m", *planes],
            tmp_path / "mocker.log",
            **environment,
        ),
        Process(
            [
                python, "-m", "dynamo.frontend",
                "--http-host", "127.0.0.1", "--http-port", port, *planes,
            ],
            tmp_path / "frontend.log",
            **environment,
        ),
    ]  # fmt: skip
    try:
        popens = [process.popen for process in processes]
        until(lambda: answers(url + "/v1/models"), "front end", 120.0, popens)
        until(lambda: complete(url, "ready?", 1) or None, "mocker", 120.0, popens)
        yield python, url, environment, model
    finally:
        for process in processes:
            process.stop()


def complete(url, prompt, tokens):
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60.0) as answer:
            return json.loads(answer.read())["usage"]
    except urllib.error.HTTPError:
        return None


def test_every_pass_of_the_mocker_reaches_the_daemon(tmp_path, dynamo, daemon):
    python, url, environment, model = dynamo
    daemon.start()
    bridge = Process(
        [
            python, "-m", "throttle.cli", "bridge", "fpm",
            "--dynamo", "dynamo.backend.generate", "--discovery", "file", "--request-plane", "tcp",
            "--target", daemon.target, "--engine-id", "mocker", "--gpus", GPU_UUID,
            "--mode", "act", "--config-json", model / "config.json", "--kv-blocks", 4096,
        ],
        tmp_path / "bridge.log",
        **environment,
    )  # fmt: skip
    try:
        until(daemon.engine_status, "registration", 60.0, [bridge.popen])
        until(lambda: _heard(daemon, url), "a pass", 60.0, [bridge.popen])
        heard = until(lambda: _quiet(daemon), "the end of it", 30.0).states_count
        prompts = [f"{number:03d} " + "x" * (PROMPT_TOKENS - 4) for number in range(REQUESTS)]
        with ThreadPoolExecutor(8) as pool:
            usages = list(pool.map(lambda prompt: complete(url, prompt, OUTPUT_TOKENS), prompts))
        assert all(usages)
        generated = sum(usage["completion_tokens"] for usage in usages)
        assert generated == REQUESTS * OUTPUT_TOKENS
        until(lambda: _quiet(daemon), "the last pass", 30.0)
        bridge.stop()
        files = until(lambda: list(daemon.recordings.glob("*.parquet")) or None, "recording", 30.0)
        records = pyarrow.parquet.read_table(files[0]).to_pandas().iloc[heard:]
        # each request's first token comes with its prompt, the others one decode each
        assert records.num_decode_requests.sum() == REQUESTS * (OUTPUT_TOKENS - 1)
        prefilled = records.sum_prefill_tokens.sum()
        asked = sum(usage["prompt_tokens"] for usage in usages)
        cached = sum(
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for usage in usages
        )
        assert prefilled == asked - cached
        assert (records.iteration_duration_seconds > 0).all()
        assert " 0 missed, 0 left out" in bridge.text()
        assert " 0 dropped" in bridge.text()
        print(
            f"{len(records)} passes received, none missed; {REQUESTS} requests, {prefilled:.0f} "
            f"prompt tokens and {generated} output tokens on both sides"
        )
    finally:
        bridge.stop()


def _heard(daemon, url):
    """Whether the bridge hears the mocker: ask until a pass comes through."""
    complete(url, "heard?", 1)
    return daemon.engine_status().states_count > 0


def _quiet(daemon):
    """Whether no state came for a second."""
    status = daemon.engine_status()
    return status if status is not None and status.state_age_seconds > 1.0 else None
