"""A real daemon process, simulated GPUs in a file, and a small bundle made by recording and
training, as a user would."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from predictors.dataset import read_records
from predictors.training import save, train
from predictors.training_settings import TrainingSettings
from tests.integration.engines import DEADLINE_SECONDS, EngineStream, registration
from tests.integration.processes import daemon_parts, kill_all
from throttle.actuation.simulated import SimulatedGpu, SimulatedGpuFile
from throttle.daemon.messages import StateReader, read_registration
from throttle.daemon.recording import Recording, records_metadata
from throttle.daemon.telemetry import GpuWindow
from throttle.testing import FormulaPredictor
from throttle.v1 import engine_pb2, throttle_service_pb2, throttle_service_pb2_grpc

GPU_NAME = "h200-sxm"
UUIDS = tuple(f"GPU-{name}" for name in "abcdef")


@dataclass
class RunningDaemon:
    """A daemon process and ways to talk to it."""

    process: subprocess.Popen
    target: str
    channel: grpc.Channel
    log: object

    @property
    def stub(self):
        return throttle_service_pb2_grpc.ThrottleServiceStub(self.channel)

    def stream(self, first):
        return EngineStream(self.stub, first)

    def status(self):
        threading.Event().wait(
            0.03
        )  # tests that ask until something holds stay below the gate's rate
        return self.stub.GetStatus(
            throttle_service_pb2.GetStatusRequest(), timeout=DEADLINE_SECONDS
        )

    def terminate(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_SECONDS)

    def parts(self):
        """Process ids by name: supervisor, controller and actuator."""
        return daemon_parts(self.process.pid)

    def kill(self):
        """SIGKILL to all three at once, as when a container is killed."""
        kill_all(self.parts().values())
        self.process.wait(DEADLINE_SECONDS)

    def log_text(self):
        return self.log.read_text("utf-8")


def serve_command(*arguments):
    return [sys.executable, "-m", "throttle.cli", "serve", *map(str, arguments)]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """A directory with one small bundle, recorded and trained on formulas."""
    directory = tmp_path_factory.mktemp("bundles")
    recordings = tmp_path_factory.mktemp("recordings")
    truth = FormulaPredictor()
    clocks = tuple(int(clock) for clock in truth.clocks_mhz)
    profile = read_registration(registration())
    for run in range(8):
        _record(recordings / f"run-{run}.parquet", profile, truth, clocks, run)
    settings = TrainingSettings(
        latency_trees_count=40, power_trees_count=30, threads_count=1, early_stopping_count=10
    )
    save(train(read_records([recordings]), settings), directory)
    return directory


def _record(path, profile, truth, clocks, run):
    draw = random.Random(run)
    reader = StateReader(profile)
    metadata = records_metadata(profile, GPU_NAME, clocks, simulated=True)
    recording = Recording(path, metadata, f"run-{run}")
    now, clock_index = 0.0, draw.randrange(len(clocks))
    for number in range(1, 401):
        before = clocks[clock_index]
        if number % 8 == 0:
            clock_index = draw.randrange(len(clocks))
        clock = clocks[clock_index]
        decode = round(2 ** draw.uniform(0, 8))
        prefill = draw.choice([0, 0, draw.randrange(16, 4000)])
        kv_tokens = decode * draw.randrange(50, 3000)
        shape = np.array([[prefill > 0, prefill, 0, decode, kv_tokens, decode, 0]], dtype=float)
        predicted = truth.predict(shape)
        seconds = float(predicted.latency_seconds[0, clock_index])
        watts = float(predicted.power_watts[0, clock_index])
        now += seconds
        message = engine_pb2.IterationState(
            sequence_number=number,
            phase=engine_pb2.ITERATION_PHASE_COMPLETED,
            engine_time_seconds=now,
            iteration_duration_seconds=seconds,
            scheduled=engine_pb2.ScheduledRequests(
                num_prefill_requests=int(prefill > 0),
                sum_prefill_tokens=prefill,
                num_decode_requests=decode,
                sum_decode_kv_tokens=kv_tokens,
            ),
        )
        window = GpuWindow(clock, before, watts, watts * seconds, seconds)
        recording.append(reader.read(message), message, window, clock)
    recording.close()


@pytest.fixture(scope="module")
def gpus(tmp_path_factory):
    """Six simulated GPUs in a file."""
    with gpu_file(tmp_path_factory) as entry:
        yield entry


@pytest.fixture
def own_gpus(tmp_path_factory):
    """Six more for one test, beside a daemon that holds those of the module."""
    with gpu_file(tmp_path_factory) as entry:
        yield entry


@contextlib.contextmanager
def gpu_file(tmp_path_factory):
    clocks = tuple(int(clock) for clock in FormulaPredictor().clocks_mhz)
    path = tmp_path_factory.mktemp("gpus") / "state"
    entries = [SimulatedGpu(uuid, GPU_NAME, clocks) for uuid in UUIDS]
    with SimulatedGpuFile.create(path, entries) as file:
        yield SimpleNamespace(file=file, path=path)


class DaemonStarter:
    """Starts daemons on the module's GPUs; every one that still runs must stop in order."""

    def __init__(self, make_folder, gpus_path, bundles):
        self._make_folder = make_folder
        # answers wait until GPUs are told, and lowering is not paced: tests know what to expect
        self._defaults = (
            "--simulated-gpus", gpus_path, "--bundles", bundles,
            "--actuation-answer-wait-seconds", 30, "--actuation-lowering-interval-seconds", 0,
        )  # fmt: skip
        self._running = []

    def __call__(self, *arguments):
        folder = self._make_folder("daemon")
        socket, log = folder / "throttle.sock", folder / "log"
        if "--socket" in arguments:  # the last one counts
            socket = arguments[arguments.index("--socket") + 1]
        command = serve_command("--socket", socket, *self._defaults, *arguments)
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        target = f"unix:{socket}"
        channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        daemon = RunningDaemon(process, target, channel, log)
        self._running.append(daemon)
        try:
            grpc.channel_ready_future(channel).result(DEADLINE_SECONDS)
        except grpc.FutureTimeoutError:
            pytest.fail(f"the daemon did not start: {daemon.log_text()}")
        return daemon

    def stop(self):
        for daemon in self._running:
            daemon.channel.close()
            if daemon.process.poll() is None:
                assert daemon.terminate() == 0, daemon.log_text()


@pytest.fixture
def start_daemon(tmp_path_factory, gpus, bundles):
    """Starts daemons for one test."""
    starter = DaemonStarter(tmp_path_factory.mktemp, gpus.path, bundles)
    yield starter
    starter.stop()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, gpus, bundles):
    """One daemon for the tests of a module that leave it running; each has GPUs of its own."""
    starter = DaemonStarter(tmp_path_factory.mktemp, gpus.path, bundles)
    yield starter("--recordings", tmp_path_factory.mktemp("records"))
    starter.stop()
