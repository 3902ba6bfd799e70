from __future__ import annotations

import random

import pytest

from throttle.simulation.engine import Fidelity, SimulatedEngine
from throttle.simulation.experiment import play
from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.plant import Plant
from throttle.simulation.policies.policy import locking
from throttle.simulation.policies.static import MaximumClock
from throttle.simulation.workload import OpenLoop

PLANT = "h200-qwen3-30b-a3b"
NOISELESS = {
    "behavior.latency_noise_ratio": 0.0,
    "behavior.chip_power_spread_ratio": 0.0,
    "behavior.switch_p99_seconds": 0.025,  # the median: no spread
}


@pytest.fixture(scope="session")
def plant():
    return Plant.load(PLANT)


@pytest.fixture(scope="session")
def noiseless_plant():
    return Plant.load(PLANT, NOISELESS)


@pytest.fixture(scope="session")
def tight_plant():
    """A GPU whose memory leaves room for 25 KV blocks."""
    plant = Plant.load(PLANT, NOISELESS)
    engine = plant.parameters.engine
    blocks = 25.5 * engine.kv_block_tokens * plant.architecture.kv_bytes_per_token
    needed = plant._operators.weight_bytes + engine.activation_bytes + blocks
    capacity = needed / engine.memory_utilization_ratio
    tight = Plant.load(PLANT, NOISELESS | {"gpu.memory.capacity_bytes": capacity})
    assert tight.kv_blocks_count == 25
    return tight


class Bench:
    """One engine on one GPU with its lock, wired for a test."""

    def __init__(
        self, plant, requests, *, seed=1, fidelity=Fidelity.FULL, telemetry=None, source=None
    ):
        self.lock = InProcessLock()
        self.gpu = SimulatedGpu(
            plant, self.lock, telemetry or DiscardedTelemetry(), random.Random(seed)
        )
        self.engine = SimulatedEngine(self.gpu, source or OpenLoop(requests), fidelity)

    def play(self, policy=None, **arguments):
        decide = locking(policy or MaximumClock(), self.lock)
        return play(self.engine, self.gpu, decide, **arguments)


@pytest.fixture(scope="session")
def bench():
    return Bench
