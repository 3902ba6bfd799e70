"""Noise at the two doors: the actuator's channel and the gRPC surface.

Seconds long in `make test`, five minutes each in `make test-safety`.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import DecodeError

from tests.integration.engines import idle, registration, state
from tests.integration.processes import daemon_parts, is_running
from tests.safety.conftest import CLOCKS, UUIDS
from tests.safety.test_requirements import Client
from throttle.actuation.messages import (
    REPLY_BYTES,
    REQUEST_BYTES,
    Ask,
    Request,
    Status,
    read_request,
)
from throttle.actuation.simulated import SimulatedGpu, SimulatedGpuFile
from throttle.errors import InvalidInputError
from throttle.v1 import engine_pb2, throttle_service_pb2, throttle_service_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
FUZZ_SECONDS = 300.0 if os.environ.get("TEST_SAFETY") else 3.0
#: What a process may grow by under noise, bytes.
GROWTH_LIMIT = 48 * 2**20
SEED = 20_26
#: Far in every byte from the numbers of the seeds: answers to noise may still be on their way
#: when the first honest request is sent, and must not pass for its own.
NUMBER_NO_NOISE_CARRIES = 0x3C5A_96A5_C396_6900

pytestmark = pytest.mark.timeout(FUZZ_SECONDS + 300.0)

ACTUATOR_SEEDS = (
    Request(Ask.CLAIM, 1, gpus=1, owner="engine").pack(),
    Request(Ask.CLAIM, 2, gpus=3, owner="x" * 100).pack(),
    Request(Ask.RELEASE, 3, epoch=1).pack(),
    Request(Ask.RESET_ALL, 4).pack(),
    Request(Ask.RENEW).pack(),
    Request(Ask.SET, 5, epoch=1, clock_mhz=600, why="noise").pack(),
)


def resident_bytes(process):
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024


def noise(draw, seeds):
    """Bytes at random, or a good message that was bent, cut, repeated or spliced."""
    kind = draw.randrange(6)
    if kind == 0:
        return draw.randbytes(draw.randrange(1, 2 * REQUEST_BYTES))
    packet = bytearray(draw.choice(seeds))
    if kind == 1 and packet:
        del packet[draw.randrange(len(packet)) :]
    elif kind == 2:
        packet += draw.randbytes(draw.randrange(1, 64))
    elif kind == 3:
        other = draw.choice(seeds)
        cut = draw.randrange(len(other) + 1)
        packet[cut:] = other[cut:]
    for _ in range(draw.randrange(1, 9)):
        if packet:
            packet[draw.randrange(len(packet))] = draw.choice(
                [0, 1, 127, 128, 255, draw.randrange(256)]
            )
    return bytes(packet) or b"\0"


def would_set(packet):
    """Whether it is a well-formed wish for a clock: that may be granted, and is no noise."""
    try:
        return read_request(packet, len(UUIDS)).kind is Ask.SET
    except InvalidInputError:
        return False


def test_noise_on_the_actuators_channel_slows_no_gpu_and_breaks_nothing(
    simulated_world, record_property
):
    process, channel = simulated_world.start_actuator(lease_seconds=60.0)
    client = Client(channel)
    before = resident_bytes(process.pid)
    draw, count = random.Random(SEED), 0
    deadline = time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < deadline:
        for _ in range(64):
            packet = noise(draw, ACTUATOR_SEEDS)
            if not would_set(packet):
                channel.send(packet)
                count += 1
        channel.setblocking(False)  # noqa: FBT003 - the standard library's signature
        with contextlib.suppress(BlockingIOError):
            while channel.recv(REPLY_BYTES + 1):
                continue
        channel.settimeout(60.0)
        assert not any(simulated_world.locks().values())
    record_property("packets_count", count)
    grown = resident_bytes(process.pid) - before
    record_property("grown_bytes", grown)
    assert process.poll() is None
    assert grown < GROWTH_LIMIT
    client.number = NUMBER_NO_NOISE_CARRIES
    assert client.ask(Ask.RESET_ALL).status is Status.DONE
    for epoch in range(1, 20_000):  # end what the noise has claimed, then all is as ever
        if client.ask(Ask.CLAIM, gpus=0b11, owner="after").status is Status.DONE:
            break
        client.ask(Ask.RELEASE, epoch=epoch)
    else:
        pytest.fail("the GPUs stay held")


GRPC_SEEDS = {
    "StreamIterations": [
        throttle_service_pb2.StreamIterationsRequest(
            registration=registration(mode=engine_pb2.CONTROL_MODE_SHADOW, gpu_uuids=["GPU-0"])
        ).SerializeToString(),
        *(
            throttle_service_pb2.StreamIterationsRequest(state=each).SerializeToString()
            for each in (state(1), state(2), idle(3, 1.0))
        ),
    ],
    "Evaluate": [
        throttle_service_pb2.EvaluateRequest(
            registration=registration(gpu_uuids=["GPU-0"]), state=state(1)
        ).SerializeToString()
    ],
    "GetStatus": [b""],
    "ReleaseControl": [
        throttle_service_pb2.ReleaseControlRequest(engine_id="engine").SerializeToString()
    ],
}


def one_bundle(tmp_path, name="h200-sxm__qwen3-30b-a3b__tp1ep1"):
    """A folder with one of the shipped bundles: the others take their time to load."""
    folder = tmp_path / "bundles"
    folder.mkdir()
    (folder / name).symlink_to(ROOT / "models" / name)
    return folder


@pytest.fixture
def served(tmp_path):
    """A whole daemon with a shipped bundle, on GPUs of its own."""
    gpus = [SimulatedGpu(uuid, "h200-sxm", CLOCKS) for uuid in UUIDS]
    file = SimulatedGpuFile.create(tmp_path / "gpus", gpus)
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "throttle.cli", "serve", "--socket", tmp_path / "socket",
                "--simulated-gpus", tmp_path / "gpus", "--bundles", one_bundle(tmp_path),
                "--log-level", "error",
                # the noise is meant for the service, not for the gate before it
                "--limits-calls-per-second", "1000000", "--limits-states-per-second", "1000000",
            ],
            stdout=output,
            stderr=output,
        )  # fmt: skip
    try:
        with grpc.insecure_channel(f"unix:{tmp_path / 'socket'}") as channel:
            grpc.channel_ready_future(channel).result(120.0)
            yield process, channel, file, log
    finally:
        process.terminate()
        status = process.wait(60.0)
    assert status == 0, log.read_text()


REQUESTS = {
    "StreamIterations": throttle_service_pb2.StreamIterationsRequest,
    "Evaluate": throttle_service_pb2.EvaluateRequest,
    "GetStatus": throttle_service_pb2.GetStatusRequest,
    "ReleaseControl": throttle_service_pb2.ReleaseControlRequest,
}
#: grpcio keeps some 16 KB of every message that protobuf cannot parse, before our code sees it.
UNPARSABLE_LIMIT = 500


def parses(method, packet):
    try:
        REQUESTS[method].FromString(packet)
    except DecodeError:
        return False
    return True


def acts(packet):
    """Whether it is a registration that may set clocks, by chance."""
    message = throttle_service_pb2.StreamIterationsRequest()
    try:
        message.ParseFromString(packet)
    except Exception:  # noqa: BLE001 - noise is what it is
        return False
    return message.registration.mode == engine_pb2.CONTROL_MODE_ACT


class Harmless:
    """Packets without what would set clocks, and with only so many that cannot be parsed."""

    def __init__(self):
        self.unparsable_count = 0

    def of(self, method, packets):
        for packet in packets:
            bad = not parses(method, packet)
            if bad and self.unparsable_count >= UNPARSABLE_LIMIT:
                continue
            self.unparsable_count += bad
            if method != "StreamIterations" or not acts(packet):
                yield packet


def test_noise_on_the_grpc_surface_slows_no_gpu_and_breaks_nothing(served, record_property):
    process, channel, file, log = served
    controller = daemon_parts(process.pid)["controller"]
    draw, codes, harmless = random.Random(SEED), {}, Harmless()
    prefix = "/throttle.v1.ThrottleService/"
    before = None
    started = time.monotonic()
    while time.monotonic() < started + FUZZ_SECONDS:
        method = draw.choice(list(GRPC_SEEDS))
        seeds = GRPC_SEEDS[method]
        try:
            if method == "StreamIterations":
                packets = [seeds[0]] * draw.randrange(2) + [
                    noise(draw, seeds) for _ in range(draw.randrange(1, 6))
                ]
                packets = list(harmless.of(method, packets))
                for _ in channel.stream_stream(prefix + method)(iter(packets), timeout=20.0):
                    continue
            else:
                for packet in harmless.of(method, [noise(draw, seeds)]):
                    channel.unary_unary(prefix + method)(packet, timeout=20.0)
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
            if error.code() is grpc.StatusCode.INTERNAL:
                # grpc itself answers so when a message cannot be parsed; a bug of ours is logged
                code += " (unparsable)" if "deserializing" in error.details() else ""
        codes[code] = codes.get(code, 0) + 1
        if before is None and time.monotonic() > started + FUZZ_SECONDS / 3:
            before = resident_bytes(controller)  # caches and threads are there by now
    grown = resident_bytes(controller) - (before or 0)
    record_property("calls_count", sum(codes.values()))
    record_property("codes", codes)
    record_property("grown_bytes", grown)
    assert "internal_error" not in log.read_text()
    assert "INTERNAL" not in codes, codes
    assert is_running(controller)
    assert grown < GROWTH_LIMIT
    assert not any(file.read_lock_mhz(uuid) for uuid in UUIDS)
    status = throttle_service_pb2_grpc.ThrottleServiceStub(channel).GetStatus(
        throttle_service_pb2.GetStatusRequest(), timeout=20.0
    )
    assert len(status.gpus) == len(UUIDS)
