"""What the image is, and what it does when it runs."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from pathlib import Path

import grpc
import pytest

from tests.container.conftest import ENGINES_COUNT, descendants
from tests.integration.engines import EngineStream, registration, state
from throttle.v1 import throttle_service_pb2_grpc

pytestmark = pytest.mark.container

SIZE_LIMIT_BYTES = 350e6
NOBODY = 65532


@pytest.fixture
def stub(served):
    with grpc.insecure_channel(f"unix:{served.socket}") as channel:
        yield throttle_service_pb2_grpc.ThrottleServiceStub(channel)


def proportional_bytes(pids):
    """Memory of processes together, what they share counted once."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def connect(stub, count):
    """Engines with one state decided for each."""
    streams = []
    for index in range(count):
        stream = EngineStream(stub, registration(f"engine-{index}", [f"GPU-simulated-{index}"]))
        stream.accepted()
        stream.decide(state(1))
        streams.append(stream)
    return streams


def test_the_image_is_small(buildah, image):
    container = buildah("from", "localhost/moe-throttle")
    root = Path(buildah("mount", container))
    files = sum(path.lstat().st_size for path in root.rglob("*") if not path.is_dir())
    buildah("rm", container)
    print(f"\nimage: {image / 1e6:.0f} MB, its files {files / 1e6:.0f} MB")
    assert max(image, files) < SIZE_LIMIT_BYTES


def test_the_image_says_what_it_is_and_whom_it_runs_as(buildah):
    inspected = json.loads(buildah("inspect", "--type", "image", "localhost/moe-throttle"))
    config = inspected["Docker"]["config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["throttle"]
    assert config["Healthcheck"]["Test"] == ["CMD", "throttle", "health"]
    assert "/run/throttle" in config["Volumes"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert "NVIDIA_DRIVER_CAPABILITIES=utility" in config["Env"]


def test_no_compiler_and_no_installer_is_left(container):
    for name in ("gcc", "cc", "g++", "ld", "as", "make", "pip", "pip3", "git"):
        for folder in ("usr/bin", "usr/local/bin", "bin", "opt/throttle/bin"):
            assert not (container.root / folder / name).exists()
    packages = next((container.root / "opt/throttle/lib").glob("python3*/site-packages"))
    assert not list(packages.glob("pip*"))
    assert list((container.root / "usr/share/throttle/models").glob("*/manifest.json"))


def test_it_serves_over_the_shared_socket_from_outside(served, stub):
    (stream,) = connect(stub, 1)
    decision = stream.decide(state(2))
    assert decision.applied
    assert decision.predicted_iteration_seconds > 0  # a shipped bundle predicted
    assert served.run("throttle", "health") == "SERVING"
    with urllib.request.urlopen("http://127.0.0.1:19465/readyz", timeout=10) as answer:
        assert answer.read() == b"serving\n"
    stream.close()


def test_it_runs_as_nobody_without_capabilities(served):
    pids = descendants(served.process.pid)
    assert pids
    for pid in pids:
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )  # fmt: skip
        assert set(status["Uid"].split()) == {str(NOBODY)}
        assert set(status["Gid"].split()) == {str(NOBODY)}
        assert int(status["CapEff"], 16) == 0
    assert (served.socket.stat().st_mode & 0o777) == 0o660


def test_nothing_is_written_outside_its_volume(served, stub):
    def files():
        return {
            path: (status.st_mtime_ns, status.st_size)
            for path in served.root.rglob("*")
            if path.name != ".containerenv"  # buildah's own, there while a command runs
            if (status := path.lstat()) and not path.is_dir()
        }

    before = files()
    (stream,) = connect(stub, 1)
    stream.close()
    served.run("throttle", "status")
    after = files()
    assert {path for path in after if after[path] != before.get(path)} == set()
    assert set(before) == set(after)
    assert {path.name for path in served.volume.iterdir()} >= {"gpus", "throttle.sock"}


def test_start_and_memory(served, stub):
    """Figures; this machine may be busy, so time is held to ten times its budget, memory to it."""
    pids = descendants(served.process.pid)
    (first,) = connect(stub, 1)
    one = proportional_bytes(pids)
    first.close()
    streams = connect(stub, ENGINES_COUNT)
    for number in range(2, 20):
        for stream in streams:
            stream.decide(state(number))
    many = proportional_bytes(pids)
    for stream in streams:
        stream.close()
    started = time.monotonic()
    served.run("true")
    print(
        f"\nstart to SERVING: {served.start_seconds:.1f} s with {os.getloadavg()[0]:.1f} running, "
        f"of which buildah needs {time.monotonic() - started:.1f} s to start anything; "
        f"memory: {one / 1e6:.0f} MB with one engine, {many / 1e6:.0f} MB with {ENGINES_COUNT}"
    )
    assert served.start_seconds < 20.0
    assert one <= 180e6
    assert many <= 250e6
