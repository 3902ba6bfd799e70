"""The daemon of the integration tests, asked by strangers."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest
import trustme

from tests.integration.conftest import bundles, gpus, start_daemon  # noqa: F401 - fixtures
from tests.integration.engines import DEADLINE_SECONDS

TOKENS = {"operator": "token-of-the-operator", "one": "token-of-one", "two": "token-of-two"}


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def logged(daemon, event):
    """The lines of one event in a daemon's log."""
    lines = (json.loads(line) for line in daemon.log_text().splitlines() if line.startswith("{"))
    return [line for line in lines if line["event"] == event]


@pytest.fixture
def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def chromium(tmp_path):
    """Runs a headless browser on a page; returns what it prints."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed")

    def run(*arguments):
        return subprocess.run(
            [
                program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--no-first-run", f"--user-data-dir={tmp_path}/profile",
                "--virtual-time-budget=4000", *map(str, arguments),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout  # fmt: skip

    return run


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A certificate authority, what it signed, and another one."""
    folder = tmp_path_factory.mktemp("certificates")
    authority, stranger = trustme.CA(), trustme.CA()

    def issue(name, by):
        made = by.issue_cert(name, common_name=name)
        key, chain = folder / f"{name}.key", folder / f"{name}.pem"
        made.private_key_pem.write_to_path(str(key))
        key.chmod(0o600)
        chain.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        return SimpleNamespace(key=key, certificate=chain)

    roots = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(roots))
    return SimpleNamespace(
        ca=roots,
        server=issue("localhost", authority),
        client=issue("engine-0", authority),
        unlisted=issue("unlisted", authority),
        forged=issue("forged", stranger),
        issue=lambda name: issue(name, authority),
    )


@pytest.fixture
def access_file(tmp_path):
    """Three callers with tokens: one for every GPU, one for GPU-a, one for GPU-b."""
    gpus_of = {"operator": "*", "one": "GPU-a", "two": "GPU-b"}
    path = tmp_path / "access.toml"
    path.write_text(
        "\n".join(
            f'[{name}]\ntoken_sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'
            f'gpus = ["{gpus_of[name]}"]'
            for name, token in TOKENS.items()
        )
    )
    path.chmod(0o600)
    return path
