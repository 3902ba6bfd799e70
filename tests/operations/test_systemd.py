"""The unit, and what the daemon tells systemd."""

from __future__ import annotations

import configparser
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.integration.engines import DEADLINE_SECONDS
from throttle.daemon.systemd import ServiceManager

UNIT = Path(__file__).resolve().parents[2] / "docker" / "systemd" / "throttle.service"


@pytest.fixture
def told(tmp_path):
    """A notification socket, and what came through it."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        receiver.settimeout(DEADLINE_SECONDS)
        yield path, lambda: receiver.recv(4096).decode()


def test_the_daemon_tells_when_it_is_ready_alive_and_stopping(told, start_daemon, monkeypatch):
    path, receive = told
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    daemon = start_daemon()
    assert receive().startswith("READY=1\n")
    assert receive() == "WATCHDOG=1"
    assert receive() == "WATCHDOG=1"
    assert daemon.terminate() == 0
    while (text := receive()) == "WATCHDOG=1":
        continue
    assert text.startswith("STOPPING=1\n")


def test_the_watchdog_is_kicked_twice_in_each_interval(told):
    path, receive = told
    seconds = 100.0
    environ = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "1"}
    manager = ServiceManager(environ, lambda: seconds)
    assert environ == {}  # nothing that this process starts speaks for it
    manager.alive()
    seconds = 109.9
    manager.alive()
    seconds = 110.0
    manager.alive()
    manager.alive()
    manager.stopping()
    assert receive() == "WATCHDOG=1"
    assert receive().startswith("STOPPING=1")


def test_without_systemd_nothing_is_told():
    ServiceManager({}, lambda: 0.0).ready()


def directives():
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read(UNIT)
    return parser


def test_the_unit_resets_after_every_end_and_is_watched():
    service = directives()["Service"]
    assert " reset --all-configured " in service["ExecStopPost"]
    assert (service["Type"], service["Restart"]) == ("notify", "always")
    assert int(service["WatchdogSec"]) > 0
    assert "CAP_SYS_ADMIN" in service["CapabilityBoundingSet"].split()
    for dangerous in ("CAP_SYS_PTRACE", "CAP_SYS_MODULE", "CAP_DAC_OVERRIDE", "CAP_NET_ADMIN"):
        assert dangerous not in service["CapabilityBoundingSet"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_understands_the_unit_and_finds_it_hardened():
    verified = subprocess.run(
        ["systemd-analyze", "verify", UNIT], capture_output=True, text=True, check=False
    )
    lines = [line for line in verified.stderr.splitlines() if "/opt/throttle/bin/" not in line]
    assert lines == []
    subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=40", UNIT],
        capture_output=True, check=True,
    )  # fmt: skip
