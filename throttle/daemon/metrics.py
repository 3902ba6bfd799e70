"""What Prometheus may ask. Application prefix, base units, no request ever a label."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prometheus_client import (
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from throttle import __version__
from throttle.daemon.answers import reason_names
from throttle.errors import ActuationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client import CollectorRegistry, Metric

    from throttle.actuation.actuator import Actuator
    from throttle.actuation.hand import ClockChange
    from throttle.daemon.telemetry import Telemetry
    from throttle.v1 import decision_pb2

_HERTZ_PER_MHZ = 1e6

#: From one tenth of a millisecond to half a second, for decisions and writes.
_DURATION_BUCKETS: Final = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5)

#: From a few tokens to a long answer on many GPUs.
_ENERGY_BUCKETS: Final = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)


# a gauge of creation time beside every counter serves nobody who scrapes
disable_created_metrics()  # type: ignore[no-untyped-call]

#: Clock changes remembered for the status page.
_CHANGES_COUNT: Final = 30


@dataclass(frozen=True, slots=True)
class EngineChange:
    """An engine's clock changed.

    Attributes:
        unix_seconds: When.
        engine_id: The engine.
        from_mhz: Clock before; 0 for default clocks.
        to_mhz: Clock now; 0 for default clocks.
        reason: Why, in lower case.
    """

    unix_seconds: float
    engine_id: str
    from_mhz: int
    to_mhz: int
    reason: str


class DaemonMetrics:
    """The daemon's metrics, in a registry of their own."""

    def __init__(
        self, registry: CollectorRegistry, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.registry = registry
        self.reload_problem = ""  # why the last reload was refused
        self._wall_clock = wall_clock
        self._changes: deque[EngineChange] = deque(maxlen=_CHANGES_COUNT)
        self.iterations_received = Counter(
            "throttle_iterations_received_total", "States received.", registry=registry
        )
        self.iterations_dropped = Counter(
            "throttle_iterations_dropped_total",
            "States that no decision of their own answered.",
            ["reason"],
            registry=registry,
        )
        self.decisions = Counter(
            "throttle_decisions_total",
            "Decisions answered; held ones left the clock as it was.",
            ["outcome", "reason"],
            registry=registry,
        )
        self.decision_duration = Histogram(
            "throttle_decision_duration_seconds",
            "Time spent on one decision, actuation left out.",
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self.actuation_duration = Histogram(
            "throttle_actuation_duration_seconds",
            "Time of one write of a clock.",
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self.clock_changes = Counter(
            "throttle_clock_changes_total", "Changes of a target.", ["gpu"], registry=registry
        )
        self.breaker_trips = Counter(
            "throttle_slo_breaker_trips_total",
            "Times that throttling an engine was given up for a while: its requests missed limits.",
            registry=registry,
        )
        self.predicted_energy = Counter(
            "throttle_predicted_energy_joules_total",
            "Energy predicted for the load as it came, idle time included: at the clocks decided "
            "on, and had GPUs always been at default clocks, where batches are smaller and more "
            "iterations run. From when an engine's load is known.",
            ["clocks"],
            registry=registry,
        )
        self.faults = Counter(
            "throttle_faults_total",
            "Decisions that failed and became default clocks.",
            registry=registry,
        )
        self.leases_expired = Counter(
            "throttle_leases_expired_total",
            "Leases that ended because an engine was silent.",
            registry=registry,
        )
        self.calls_refused = Counter(
            "throttle_calls_refused_total",
            "Calls refused before they were looked at.",
            ["reason"],
            registry=registry,
        )
        self.registrations = Counter(
            "throttle_registrations_total", "Registrations.", ["outcome"], registry=registry
        )
        self.reloads = Counter(
            "throttle_reloads_total",
            "Reloads of configuration, access list and bundles; a refused one keeps what was.",
            ["outcome"],
            registry=registry,
        )
        self.reload_refused = Gauge(
            "throttle_reload_refused",
            "1 while the last reload was refused and what was before is in force.",
            registry=registry,
        )
        self.request_energy = Histogram(
            "throttle_request_energy_joules",
            "Energy given to a finished request, in proportion to the tokens computed for it.",
            buckets=_ENERGY_BUCKETS,
            registry=registry,
        )
        self.engines = Gauge("throttle_engines_count", "Engines connected.", registry=registry)
        for counter, labels in (  # there from the start: a rate needs a first value
            (self.iterations_dropped, ("overtaken",)),
            (self.calls_refused, ("unauthenticated", "rate")),
            (self.registrations, ("accepted", "refused")),
            (self.reloads, ("applied", "refused")),
        ):
            for label in labels:
                counter.labels(label)
        ProcessCollector(registry=registry)
        Info("throttle_build", "Version of the service.", registry=registry).info(
            {"version": __version__}
        )

    def count_decision(self, decision: decision_pb2.Decision, outcome: str, reason: str) -> None:
        """Count one answer.

        Args:
            decision: The answer.
            outcome: applied, held (the GPUs were not touched) or fallback (default clocks).
            reason: Name of its reason in lower case.
        """
        self.decisions.labels(outcome, reason).inc()
        self.decision_duration.observe(decision.decision_duration_seconds)

    def count_energy(self, decision: decision_pb2.Decision, seconds: float) -> None:
        """Count what is predicted for the time that a decision was in force.

        Args:
            decision: The answer.
            seconds: How long.
        """
        self.predicted_energy.labels("decided").inc(decision.long_run_power_watts * seconds)
        self.predicted_energy.labels("default").inc(decision.default_long_run_power_watts * seconds)

    def note_change(self, engine_id: str, from_mhz: int, to_mhz: int, reason: str) -> None:
        """Remember that an engine's clock changed."""
        self._changes.append(EngineChange(self._wall_clock(), engine_id, from_mhz, to_mhz, reason))

    def recent_changes(self) -> list[EngineChange]:
        """The last changes, newest first."""
        return list(self._changes)[::-1]

    def count_change(self, change: ClockChange) -> None:
        """Count one write that changed a GPU's target."""
        self.clock_changes.labels(change.gpu_uuid).inc()
        self.actuation_duration.observe(change.duration_seconds)


class GpuCollector:
    """What is known of every configured GPU when Prometheus asks."""

    def __init__(self, actuator: Actuator, telemetry: Telemetry) -> None:
        self._actuator = actuator
        self._telemetry = telemetry

    def collect(self) -> Iterator[Metric]:
        """The newest reading of each GPU; of one that cannot be read, the target and energy only.

        Never waits for a driver.
        """
        target = GaugeMetricFamily(
            "throttle_target_sm_clock_hertz",
            "SM clock last asked for; 0 means default. DCGM counts in MHz.",
            labels=["gpu"],
        )
        clock = GaugeMetricFamily(
            "throttle_observed_sm_clock_hertz",
            "SM clock read back. DCGM counts in MHz.",
            labels=["gpu"],
        )
        power = GaugeMetricFamily("throttle_power_watts", "Power drawn.", labels=["gpu"])
        temperature = GaugeMetricFamily(
            "throttle_temperature_celsius", "Temperature of the GPU.", labels=["gpu"]
        )
        reason = GaugeMetricFamily(
            "throttle_clock_event_reason",
            "1 for every reason why the clock is not higher. No driver says that a lock holds it.",
            labels=["gpu", "reason"],
        )
        readable = GaugeMetricFamily(
            "throttle_gpu_readable", "Whether there is a fresh reading.", labels=["gpu"]
        )
        for uuid in self._actuator.uuids():
            target.add_metric([uuid], max(0, self._actuator.target_mhz(uuid)) * _HERTZ_PER_MHZ)
            try:
                reading = self._telemetry.read(uuid)
            except ActuationError:
                readable.add_metric([uuid], 0.0)
                continue
            readable.add_metric([uuid], 1.0)
            clock.add_metric([uuid], reading.clock_mhz * _HERTZ_PER_MHZ)
            power.add_metric([uuid], reading.power_watts)
            if reading.temperature_celsius is not None:
                temperature.add_metric([uuid], reading.temperature_celsius)
            for name in reason_names(reading.event_reasons):
                reason.add_metric([uuid, name], 1.0)
        yield from (target, clock, power, temperature, reason, readable)
        yield from self._energies()

    def _energies(self) -> Iterator[Metric]:
        energy = CounterMetricFamily(
            "throttle_energy_joules", "Energy drawn since the first reading.", labels=["gpu"]
        )
        unattributed = CounterMetricFamily(
            "throttle_unattributed_energy_joules",
            "Of that, drawn while no engine was connected.",
            labels=["gpu"],
        )
        engines = CounterMetricFamily(
            "throttle_engine_energy_joules",
            "Energy of the GPUs of an engine while it was connected; shared evenly with others.",
            labels=["engine"],
        )
        for uuid in self._actuator.uuids():
            drawn = self._telemetry.book.gpu(uuid)
            energy.add_metric([uuid], drawn.counted_joules)
            unattributed.add_metric([uuid], drawn.unattributed_joules)
        for engine_id, joules in self._telemetry.book.engines().items():
            engines.add_metric([engine_id], joules)
        yield from (energy, unattributed, engines)
