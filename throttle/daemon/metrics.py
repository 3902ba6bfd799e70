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
from throttle.errors import ActuationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client import CollectorRegistry, Metric

    from throttle.actuation.actuator import Actuator, ClockChange
    from throttle.v1 import decision_pb2

_HERTZ_PER_MHZ = 1e6

#: From one tenth of a millisecond to half a second, for decisions and writes.
_DURATION_BUCKETS: Final = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5)


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
        self.predicted_energy = Counter(
            "throttle_predicted_energy_joules_total",
            "Energy that iterations were predicted to take, at the clocks decided on and at "
            "default clocks; what GPUs draw between iterations is left out.",
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
        if decision.predicted_default_iteration_seconds > 0:
            self.predicted_energy.labels("decided").inc(
                decision.predicted_power_watts * decision.predicted_iteration_seconds
            )
            self.predicted_energy.labels("default").inc(
                decision.predicted_default_power_watts
                * decision.predicted_default_iteration_seconds
            )

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
    """Reads every configured GPU when Prometheus asks."""

    def __init__(self, actuator: Actuator) -> None:
        self._actuator = actuator

    def collect(self) -> Iterator[Metric]:
        """One reading of each GPU; a GPU that cannot be read is left out."""
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
        energy = CounterMetricFamily(
            "throttle_energy_joules", "Energy counter of the GPU.", labels=["gpu"]
        )
        for uuid in self._actuator.uuids():
            target.add_metric([uuid], max(0, self._actuator.target_mhz(uuid)) * _HERTZ_PER_MHZ)
            try:
                reading = self._actuator.read(uuid)
            except ActuationError:
                continue
            clock.add_metric([uuid], reading.clock_mhz * _HERTZ_PER_MHZ)
            power.add_metric([uuid], reading.power_watts)
            energy.add_metric([uuid], reading.energy_joules)
        yield from (target, clock, power, energy)
