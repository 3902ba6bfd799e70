from __future__ import annotations

import pytest
import structlog
from prometheus_client import CollectorRegistry

from throttle.actuation.local import LocalActuator
from throttle.actuation.simulated import SimulatedBackend, SimulatedGpu, SimulatedGpuFile
from throttle.control.selection import Decision, Reason
from throttle.daemon.brains import EngineBrain
from throttle.daemon.mailbox import Arrival
from throttle.daemon.messages import StateReader, read_registration
from throttle.daemon.metrics import DaemonMetrics
from throttle.daemon.telemetry import Telemetry, TelemetrySettings
from throttle.v1 import engine_pb2

CLOCKS = (600, 900, 1200, 1500)


class FakeClock:
    """Monotonic seconds that pass when a test says so."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


class ScriptedBrain:
    """Decides what it was told to, and remembers what it saw."""

    latency_bias_ratio = 1.0
    coverage_ratio = None

    def __init__(self):
        self.target_mhz = 900
        self.long_run_watts = (0.0, 0.0)
        self.error = None
        self.observed = []
        self.decided = []

    def observe(self, state, observed_clock_mhz, observed_power_watts=None):
        self.observed.append((state.sequence_number, observed_clock_mhz))

    def decide(self, state):
        self.decided.append(state.sequence_number)
        if self.error is not None:
            raise self.error
        average, default = self.long_run_watts
        return Decision(
            self.target_mhz,
            Reason.CRUISE,
            long_run_power_watts=average,
            default_long_run_power_watts=default,
        )

    def evaluate(self, state):
        raise NotImplementedError


class ScriptedFactory:
    """Hands out one brain."""

    def __init__(self, brain):
        self.brain = brain
        self.asked = []

    def build(self, profile, gpu):
        self.asked.append((profile, gpu))
        return EngineBrain(self.brain, "scripted", gpu.clocks_mhz if gpu else CLOCKS)

    def warm_up(self):
        return iter(())


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def brain():
    return ScriptedBrain()


@pytest.fixture
def factory(brain):
    return ScriptedFactory(brain)


@pytest.fixture
def gpus(tmp_path):
    entries = [SimulatedGpu(f"GPU-{name}", "h200-sxm", CLOCKS) for name in "abc"]
    with SimulatedGpuFile.create(tmp_path / "gpus", entries) as file:
        yield file


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return DaemonMetrics(registry)


@pytest.fixture
def actuator(gpus, clock, metrics):
    actuator = LocalActuator(SimulatedBackend(gpus), gpus.uuids(), clock, metrics.count_change)
    actuator.reset_all()
    return actuator


@pytest.fixture
def telemetry(actuator, clock):
    return Telemetry(actuator.read, actuator.uuids(), clock, TelemetrySettings(), when_asked=True)


@pytest.fixture
def logs():
    """What is logged, as structlog's own capture gives it."""
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
def registered():
    """Makes profiles; keywords change fields of the registration."""

    def make(mode=engine_pb2.CONTROL_MODE_ACT, **changes):
        message = engine_pb2.EngineRegistration(
            engine_id="engine",
            model=engine_pb2.ModelDescriptor(name="qwen3-30b-a3b"),
            gpu_uuids=["GPU-a"],
            limits=engine_pb2.EngineLimits(
                running_requests_count=8,
                batched_tokens_count=512,
                kv_blocks_count=1000,
                kv_block_tokens=16,
            ),
            mode=mode,
            lease_timeout_seconds=2.0,
        )
        for name, value in changes.items():
            if isinstance(value, list):
                message.ClearField(name)
                getattr(message, name).extend(value)
            else:
                setattr(message, name, value)
        return read_registration(message)

    return make


@pytest.fixture
def arrival(registered):
    """Makes arrivals: validated states with their messages, numbered on."""
    reader = StateReader(registered())
    number = 0

    def make(phase=engine_pb2.ITERATION_PHASE_COMPLETED, **changes):
        nonlocal number
        number += 1
        message = engine_pb2.IterationState(
            sequence_number=number,
            phase=phase,
            engine_time_seconds=float(number),
            scheduled=engine_pb2.ScheduledRequests(num_decode_requests=2, sum_decode_kv_tokens=64),
            **changes,
        )
        if phase == engine_pb2.ITERATION_PHASE_COMPLETED:
            message.iteration_duration_seconds = 0.02
        return Arrival(reader.read(message), message)

    return make
