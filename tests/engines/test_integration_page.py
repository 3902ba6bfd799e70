from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.test_client import DEADLINE_SECONDS, Server
from throttle.cli import main
from throttle.daemon.messages import StateReader, read_registration
from throttle.engines.options import EngineOptions

PAGE = Path(__file__).resolve().parents[2].joinpath("docs", "integration.md").read_text()


def test_the_example_for_other_engines_sends_what_the_daemon_accepts(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 34
    server = Server(tmp_path / "throttle.sock").start()
    names = {}
    exec(example.replace("unix:///run/throttle/throttle.sock", server.target), names)
    client = names["client"]
    try:
        stream = server.stream().accept()
        reader = StateReader(read_registration(stream.registration))
        batch = [
            SimpleNamespace(number=n, context_tokens=100, prompt_tokens=90, output_tokens=10)
            for n in (1, 2)
        ]
        assert client.wait_until_connected(DEADLINE_SECONDS)
        names["after_each_iteration"](batch, time.monotonic() - 0.02)
        state = reader.read(stream.read())
        assert state.scheduled.sum_decode_kv_tokens == 200
        assert state.progress.request_numbers == [1, 2]
        stream.end()
    finally:
        client.close(0.1)
        server.stop()


def test_every_variable_on_the_page_is_read_and_every_one_that_is_read_is_on_the_page():
    values = {
        "THROTTLE_ADDRESS": "localhost:7077",
        "THROTTLE_ENGINE_ID": "e",
        "THROTTLE_ENGINE_GPUS": "GPU-a, GPU-b",
        "THROTTLE_ENGINE_MODEL": "m",
        "THROTTLE_ENGINE_MODE": "act",
        "THROTTLE_ENGINE_TTFT_SECONDS": "1",
        "THROTTLE_ENGINE_TBT_SECONDS": "2",
        "THROTTLE_ENGINE_TPOT_SECONDS": "3",
        "THROTTLE_ENGINE_E2E_SECONDS": "4",
        "THROTTLE_ENGINE_LEASE_SECONDS": "6",
        "THROTTLE_ENGINE_CA_FILE": "ca",
        "THROTTLE_ENGINE_CERTIFICATE_FILE": "certificate",
        "THROTTLE_ENGINE_KEY_FILE": "key",
        "THROTTLE_ENGINE_TOKEN_FILE": "token",
    }
    asked = []

    class Environ(dict):
        def get(self, key, default=None):
            asked.append(key)
            return super().get(key, default)

    options = EngineOptions.from_environ(Environ(values))
    assert set(asked) == set(values)
    assert options.gpu_uuids == ("GPU-a", "GPU-b")
    assert options.slos == {
        "ttft_seconds": 1.0, "tbt_seconds": 2.0, "tpot_seconds": 3.0, "e2e_seconds": 4.0,
    }  # fmt: skip
    for name in values:
        short = name.removeprefix("THROTTLE_ENGINE").removesuffix("_SECONDS")
        assert f"`{name}`" in PAGE or f"`{short}`" in PAGE or f"`{short}_`" in PAGE, name


@pytest.mark.parametrize("source", ["scrape", "fpm", "trtllm"])
def test_the_pages_bridge_commands_name_flags_that_exist(source, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bridge", source, "--help"])
    assert ended.value.code == 0
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    commands = [
        match
        for match in re.findall(r"throttle bridge .*?(?:\n\n|$)", PAGE, re.DOTALL)
        if match.startswith(f"throttle bridge {source}")
    ]
    assert commands
    for command in commands:
        line = re.sub(r"\\\n", " ", command).splitlines()[0]
        assert set(re.findall(r"--[a-z-]+", line)) <= known
