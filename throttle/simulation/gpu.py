"""A simulated GPU in simulated time: clocks, switching delay, energy, and what a driver shows."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from throttle.simulation.operators import IterationWork
    from throttle.simulation.plant import IterationCost, Plant

_SENSOR_WINDOW_SECONDS = 1.0  # NVML power on Hopper is a moving average of about a second
_SENSOR_REFRESH_SECONDS = 0.1
_STANDARD_NORMAL_P99 = 2.3263478740408408


class LockSource(Protocol):
    """Where a GPU reads the clock that it is locked to."""

    def lock_mhz(self) -> int:
        """Highest allowed SM clock in MHz; 0 means no lock."""
        ...


class TelemetrySink(Protocol):
    """Where a GPU shows what a driver would show."""

    def publish(
        self,
        sm_clock_mhz: float,
        power_watts: float,
        energy_joules: float,
        gpu_time_seconds: float,
    ) -> None:
        """Take one reading.

        Args:
            sm_clock_mhz: SM clock now.
            power_watts: Moving average over the last second, refreshed each 0.1 s.
            energy_joules: Energy counter, unfiltered.
            gpu_time_seconds: Simulated time of the reading.
        """
        ...


class InProcessLock:
    """A lock that lives in this process, for experiments without a daemon."""

    def __init__(self) -> None:
        self._clock_mhz = 0

    def set_mhz(self, clock_mhz: int) -> None:
        """Lock the GPU to this clock; 0 takes the lock away."""
        self._clock_mhz = clock_mhz

    def lock_mhz(self) -> int:
        """Highest allowed SM clock in MHz; 0 means no lock."""
        return self._clock_mhz


class DiscardedTelemetry:
    """Telemetry that nobody reads."""

    def publish(
        self,
        sm_clock_mhz: float,
        power_watts: float,
        energy_joules: float,
        gpu_time_seconds: float,
    ) -> None:
        """Drop one reading."""


class Execution(NamedTuple):
    """One iteration as it ran.

    Attributes:
        duration_seconds: Simulated time that it took, noise and clock changes included.
        cost: The plant's noiseless cost at the clock at which it ended.
    """

    duration_seconds: float
    cost: IterationCost


class SimulatedGpu:
    """Runs work and idles in simulated time at the clock that its lock allows.

    Without a lock a live context holds the maximum clock, idle or not, as drivers do. The lock is
    polled whenever work or idling starts; a changed lock takes effect after the decision latency
    and a drawn switching delay, in the middle of an iteration if need be. Changes take effect in
    the order in which they were asked.

    Args:
        plant: What work costs. Its chip spread is drawn here.
        lock: Where to read the lock.
        telemetry: Where to show clock, power and energy.
        generator: Seeds the chip's spread, the noise and the switching delays, each its own
            series: two policies on one seed meet the same chip and the same noise.
    """

    def __init__(
        self,
        plant: Plant,
        lock: LockSource,
        telemetry: TelemetrySink,
        generator: random.Random,
    ) -> None:
        self.plant = plant.draw_chip(generator)
        self._lock = lock
        self._telemetry = telemetry
        self._noise_generator = random.Random(generator.getrandbits(64))  # noqa: S311
        self._switch_generator = random.Random(generator.getrandbits(64))  # noqa: S311
        behavior = plant.parameters.behavior
        self._noise = behavior.latency_noise_ratio
        self._decision_latency = behavior.decision_latency_seconds
        self._switch_mu = math.log(behavior.switch_median_seconds)
        tail = behavior.switch_p99_seconds / behavior.switch_median_seconds
        self._switch_sigma = math.log(tail) / _STANDARD_NORMAL_P99
        self._maximum = plant.maximum_clock_mhz
        self._asked_mhz = self._maximum  # what the last lock seen asks for
        self._target_mhz = self._maximum  # what the GPU is set to now
        self._effective_mhz = self._maximum  # what it runs at, the power cap included
        self._pending: deque[tuple[float, int]] = deque()  # (time of effect, clock)
        self._sensor: deque[tuple[float, float]] = deque([(0.0, 0.0)])  # (time, energy)
        self._sensor_due = 0.0
        self._sensor_watts = self.plant.idle_power_watts(self._maximum)
        self.time_seconds = 0.0
        self.energy_joules = 0.0
        self.idle_energy_joules = 0.0
        self.clock_changes_count = 0

    @property
    def clock_mhz(self) -> int:
        """SM clock now; below the target while the power cap binds."""
        return self._effective_mhz

    @property
    def target_clock_mhz(self) -> int:
        """The clock that the GPU is set to."""
        return self._target_mhz

    @property
    def idle_power_watts(self) -> float:
        """Power that this GPU draws without work at the clock it is set to."""
        return self.plant.idle_power_watts(self._target_mhz)

    def run(self, work: IterationWork) -> Execution:
        """Run one iteration and move time to its end."""
        self._poll_lock()
        started = self.time_seconds
        noise = math.exp(self._noise_generator.gauss(0.0, self._noise))
        remaining = 1.0
        while True:
            cost = self.plant.iteration(work, self._target_mhz)
            self._effective_mhz = cost.effective_clock_mhz
            duration = cost.latency_seconds * noise
            end = self.time_seconds + remaining * duration
            if not self._pending or self._pending[0][0] >= end:
                break
            effect = max(self._pending[0][0], self.time_seconds)
            remaining -= (effect - self.time_seconds) / duration
            self._spend(effect, cost.power_watts)
            self._switch()
        self._spend(end, cost.power_watts)
        self._show()
        return Execution(end - started, cost)

    def idle(self, until_seconds: float) -> None:
        """Idle until a time, which lies not before now."""
        self._poll_lock()
        before = self.energy_joules
        while self._pending and self._pending[0][0] < until_seconds:
            self._spend(max(self._pending[0][0], self.time_seconds), self.idle_power_watts)
            self._switch()
        self._effective_mhz = self._target_mhz
        self._spend(until_seconds, self.idle_power_watts)
        self.idle_energy_joules += self.energy_joules - before
        self._show()

    def _poll_lock(self) -> None:
        locked = self._lock.lock_mhz()
        asked = self.plant.snap_mhz(locked) if locked else self._maximum
        if asked == self._asked_mhz:
            return
        self._asked_mhz = asked
        delay = math.exp(self._switch_generator.gauss(self._switch_mu, self._switch_sigma))
        effect = self.time_seconds + self._decision_latency + delay
        if self._pending:
            effect = max(effect, self._pending[-1][0])
        self._pending.append((effect, asked))

    def _switch(self) -> None:
        _, clock = self._pending.popleft()
        if clock != self._target_mhz:
            self.clock_changes_count += 1
        self._target_mhz = clock

    def _spend(self, until_seconds: float, power_watts: float) -> None:
        self.energy_joules += (until_seconds - self.time_seconds) * power_watts
        self.time_seconds = until_seconds

    def _show(self) -> None:
        """Refresh the power sensor when it is due, and publish."""
        now, energy = self.time_seconds, self.energy_joules
        if now >= self._sensor_due:
            self._sensor_due = now + _SENSOR_REFRESH_SECONDS
            sensor = self._sensor
            sensor.append((now, energy))
            while len(sensor) > 2 and sensor[1][0] <= now - _SENSOR_WINDOW_SECONDS:
                sensor.popleft()
            first_time, first_energy = sensor[0]
            if now > first_time:
                self._sensor_watts = (energy - first_energy) / (now - first_time)
        self._telemetry.publish(self._effective_mhz, self._sensor_watts, energy, now)
