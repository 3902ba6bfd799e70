"""Real processes on GPUs whose locks outlive them: a simulated file, and the fake NVML."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.processes import daemon_parts, is_running, kill_all
from throttle.actuation.fake_nvml.library import environment
from throttle.actuation.fake_nvml.machine import FakeGpu, FakeMachine
from throttle.actuation.journal import left_slow_uuids
from throttle.actuation.orders import Orders
from throttle.actuation.settings import ActuationSettings
from throttle.actuation.simulated import SimulatedGpu, SimulatedGpuFile

DEADLINE_SECONDS = 60.0
UUIDS = ("GPU-0", "GPU-1")
CLOCKS = (345, 600, 900, 1980)


@dataclass
class World:
    """Two GPUs and what belongs to them."""

    backend: str
    directory: Path
    environment: dict
    read_locks: object
    machine: object
    simulated_gpus: str = ""
    started: list = field(default_factory=list)
    channels: list = field(default_factory=list)

    def locks(self):
        """Highest clock allowed by GPU; 0 at default."""
        return self.read_locks()

    def orders(self, gpus=UUIDS, **settings):
        chosen = {
            "lease_seconds": 1.0,
            "call_deadline_seconds": 0.5,
            "answer_wait_seconds": 10.0,
        } | settings
        return Orders(
            backend=self.backend,
            simulated_gpus=self.simulated_gpus,
            gpus=gpus,
            directory=str(self.directory),
            holder="the daemon of a test",
            settings=ActuationSettings(**chosen),
            log_json=True,
        )

    def start(self, step="", **changes):
        """Start a small daemon; it dies at a step of its journal if one is named."""
        return self.start_command(
            [
                str(Path(__file__).with_name("small_daemon.py")),
                self.orders(**changes).to_json(),
                json.dumps(step),
            ]
        )

    def start_command(self, command, pass_fds=()):
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment},
            pass_fds=pass_fds,
        )
        self.started.append(process)
        return process

    def started_and_set(self, **changes):
        """A small daemon that holds both GPUs at 600 MHz, and its processes."""
        process, parts = self.started_and_claimed(**changes)
        say_set(process)
        process.stdout.readline()
        assert self.all_slow(), self.locks()
        return process, parts

    def started_and_claimed(self, step="", **changes):
        """A small daemon that waits to be told to set the clock, and its processes."""
        process = self.start(step, **changes)
        assert process.stdout.readline() == "claimed\n", process.stderr.read()
        return process, daemon_parts(process.pid)

    def start_actuator(self, gpus=UUIDS, **changes):
        """The privileged process alone, and this process's end of its channel."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        orders = dataclasses.replace(
            self.orders(gpus, **changes), channel=theirs.fileno(), parent=os.getpid()
        )
        process = self.start_command(
            ["-I", "-m", "throttle.actuation.process", orders.to_json()],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        ours.settimeout(DEADLINE_SECONDS)
        self.channels.append(ours)
        return process, ours

    def serve(self, socket_path, bundles, **flags):
        """The whole daemon on these GPUs."""
        flags = {
            "socket": socket_path,
            "backend": self.backend,
            "gpus": ",".join(UUIDS),
            "log-level": "error",
            "bundles": bundles,
            "actuation-state-directory": self.directory,
            "actuation-lowering-interval-seconds": 0,
        } | {name.replace("_", "-"): value for name, value in flags.items()}
        if self.simulated_gpus:
            flags["simulated-gpus"] = self.simulated_gpus
        command = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        process = subprocess.Popen(
            [sys.executable, "-m", "throttle.cli", "serve", *command],
            env={**os.environ, **self.environment},
        )
        self.started.append(process)
        return process

    def all_slow(self):
        return all(self.locks().values())

    def default_within(self, seconds, since=None):
        """Wait until every GPU is at default clocks; how long that took."""
        started = time.monotonic() if since is None else since
        while any(self.locks().values()):
            if time.monotonic() - started > seconds:
                pytest.fail(f"after {seconds} s still {self.locks()}")
            time.sleep(0.002)
        return time.monotonic() - started

    def left_slow(self):
        """GPUs that the journal would have reset."""
        return list(left_slow_uuids(self.directory)) if self.directory.exists() else []

    def throttle(self, *arguments):
        """Run a command of the command line on these GPUs."""
        command = [sys.executable, "-m", "throttle.cli", *map(str, arguments)]
        command += ["--backend", self.backend, "--gpus", ",".join(UUIDS)]
        command += ["--actuation-state-directory", str(self.directory)]
        if self.simulated_gpus:
            command += ["--simulated-gpus", self.simulated_gpus]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
            env={**os.environ, **self.environment},
        )

    def end(self):
        for channel in self.channels:
            channel.close()
        for process in self.started:
            with contextlib.suppress(AssertionError, FileNotFoundError):
                kill_all([each for each in daemon_parts(process.pid).values() if is_running(each)])
            process.kill()
            process.communicate()


def say_set(process):
    """Let a small daemon set its clock."""
    process.stdin.write("set\n")
    process.stdin.flush()


@pytest.fixture(params=["simulated", "nvml"])
def world(request, tmp_path, nvml_library):
    if request.param == "simulated":
        made = make_simulated_world(tmp_path)
    else:
        made = make_nvml_world(tmp_path, nvml_library)
    yield made
    made.end()


@pytest.fixture
def nvml_world(tmp_path, nvml_library):
    made = make_nvml_world(tmp_path, nvml_library)
    yield made
    made.end()


@pytest.fixture
def simulated_world(tmp_path):
    made = make_simulated_world(tmp_path)
    yield made
    made.end()


def make_simulated_world(tmp_path):
    gpus = [SimulatedGpu(uuid, "h200-sxm", CLOCKS) for uuid in UUIDS]
    file = SimulatedGpuFile.create(tmp_path / "gpus", gpus)
    return World(
        "simulated",
        tmp_path / "state",
        {},
        lambda: {uuid: file.read_lock_mhz(uuid) for uuid in UUIDS},
        file,
        str(tmp_path / "gpus"),
    )


def make_nvml_world(tmp_path, nvml_library):
    machine = FakeMachine.create(tmp_path / "machine", [FakeGpu("h100", uuid) for uuid in UUIDS])
    return World(
        "nvml",
        tmp_path / "state",
        dict(environment(nvml_library, tmp_path / "machine")),
        lambda: {uuid: (machine.gpu(uuid).lock_mhz or (0, 0))[1] for uuid in UUIDS},
        machine,
    )


def pytest_terminal_summary(terminalreporter):
    """The crash matrix as a table: how long each GPU was left slow."""
    rows = [
        f"| {report.nodeid.rpartition('::')[2]} | {dict(report.user_properties)[name]:.3f} |"
        for report in terminalreporter.stats.get("passed", [])
        for name in ("default_seconds",)
        if name in dict(report.user_properties)
    ]
    if not os.environ.get("TEST_SAFETY"):
        return
    if rows:
        terminalreporter.write_sep("=", "crash matrix")
        terminalreporter.write_line("| case | default clocks after, seconds |\n|---|---:|")
    for row in rows:
        terminalreporter.write_line(row)
    for report in terminalreporter.stats.get("passed", []):
        figures = {n: v for n, v in report.user_properties if n != "default_seconds"}
        if figures:
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {figures}")
