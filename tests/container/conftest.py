"""The image, built and run without a Docker engine: on a base from debootstrap, by buildah."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from throttle.actuation.simulated import SimulatedGpuFile
from throttle.commands.playing import gpu_entries
from throttle.simulation.plant import Plant
from throttle.v1 import throttle_service_pb2, throttle_service_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/moe-throttle"
START_SECONDS = 120.0
ENGINES_COUNT = 32


def missing():
    """Why the image cannot be built here; empty if it can."""
    tools = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if tools:
        return f"{', '.join(tools)} not installed"
    return "" if os.geteuid() == 0 else "not root"


@pytest.fixture(scope="session")
def folder():
    """Where base, storage and sockets lie; kept, so that a second run builds less."""
    if why := missing():
        pytest.skip(why)
    path = Path(os.environ.get("THROTTLE_CONTAINER_FOLDER", ROOT / "out" / "container"))
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def image(folder):
    """Builds the image; returns its size in bytes as buildah tells it."""
    result = subprocess.run(
        [ROOT / "scripts" / "build_image.sh", folder], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return int(result.stdout.split()[-1])


class Buildah:
    """buildah with a storage of its own."""

    def __init__(self, folder):
        self._command = ["buildah", "--storage-driver", "vfs", "--root", folder / "storage",
                         "--runroot", folder / "run"]  # fmt: skip

    def __call__(self, *arguments):
        result = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def command(self, *arguments):
        return [*map(str, self._command), *map(str, arguments)]


@pytest.fixture(scope="session")
def buildah(folder, image):
    return Buildah(folder)


class Container:
    """A container of the image with a daemon in it, and the volume that it shares with us."""

    def __init__(self, buildah, volume, name, root):
        self.buildah, self.volume, self.name, self.root = buildah, volume, name, root
        self.socket = volume / "throttle.sock"
        self._run = ("run", "--isolation", "chroot", "--volume", f"{volume}:/run/throttle:rw")

    def start(self, log):
        """Start the daemon; returns the process and the seconds until it served."""
        started = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.buildah.command(
                    *self._run,
                    "--env", "THROTTLE_SIMULATED_GPUS=/run/throttle/gpus",
                    "--env", "THROTTLE_METRICS_ADDRESS=127.0.0.1:19465",
                    self.name, "--", "throttle", "serve",
                ),
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            stub = throttle_service_pb2_grpc.ThrottleServiceStub(channel)
            stub.GetStatus(
                throttle_service_pb2.GetStatusRequest(), wait_for_ready=True, timeout=START_SECONDS
            )
        return process, time.monotonic() - started

    def run(self, *command):
        return self.buildah(*self._run, self.name, "--", *command)


def descendants(pid):
    """Process ids of the throttle processes under one process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(path.name)] = (int(fields[1]), command)
    found, below = [], {pid}
    while more := {each for each, (parent, _) in parents.items() if parent in below} - below:
        below |= more
        found += [each for each in more if parents[each][1].startswith(b"/opt/throttle/bin/python")]
    return found


@pytest.fixture
def container(buildah, folder, tmp_path):
    """A container whose volume holds simulated GPUs; ends what it started."""
    volume = tmp_path / "volume"
    volume.mkdir()
    plant = Plant.load("h200-qwen3-30b-a3b")
    uuids = [f"GPU-simulated-{index}" for index in range(ENGINES_COUNT)]
    SimulatedGpuFile.create(volume / "gpus", gpu_entries(plant, uuids)).close()
    for path in (volume, volume / "gpus"):
        os.chown(path, 65532, 65532)
    tmp_path.chmod(0o755)
    name = buildah("from", IMAGE)
    yield Container(buildah, volume, name, Path(buildah("mount", name)))
    buildah("rm", name)


@pytest.fixture
def served(container, tmp_path):
    """The container with its daemon serving."""
    log = tmp_path / "log"
    process, seconds = container.start(log)
    container.log, container.process, container.start_seconds = log, process, seconds
    yield container
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGTERM)
    process.wait(30)
