"""The processes that a daemon consists of, as the kernel knows them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from tests.integration.engines import DEADLINE_SECONDS


def daemon_parts(supervisor):
    """Process ids by name: supervisor, controller and actuator."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    parts = {"supervisor": supervisor}
    for child in map(int, children):
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        actuator = b"throttle.actuation.process" in command or b"crashing_actuator.py" in command
        parts["actuator" if actuator else "controller"] = child
    assert len(parts) == 3, parts
    return parts


def kill_all(processes):
    """SIGKILL to all of them, with none of them running in between; returns once they are gone."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            os.kill(process, number)
    for process in processes:
        wait_until_gone(process)


def wait_until_gone(process):
    """Until the process has ended; a zombie has."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while is_running(process):
        assert time.monotonic() < deadline, f"process {process} still runs"
        time.sleep(0.005)


def is_running(process):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
