"""What Prometheus reads of engines and GPUs at the moment it asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

from throttle.actuation.leases import DEFAULT_CLOCKS, UNKNOWN_CLOCKS
from throttle.v1 import decision_pb2, engine_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client import Metric

    from throttle.actuation.actuator import Actuator
    from throttle.v1 import throttle_service_pb2

#: Every state of a GPU; each GPU is in one.
GPU_STATES: Final = ("default", "throttled", "left_throttled", "unknown")


def gpu_state(target_mhz: int, owner: str) -> str:
    """What a GPU's target and owner come to.

    Args:
        target_mhz: What it was told last.
        owner: Engine that holds it; empty when it is free.

    Returns:
        `default`; `throttled` for an engine; `left_throttled` when no engine holds it any more,
        which must not last; `unknown` when a write has failed.
    """
    if target_mhz == UNKNOWN_CLOCKS:
        return "unknown"
    if target_mhz == DEFAULT_CLOCKS:
        return "default"
    return "throttled" if owner else "left_throttled"


class GpuStateCollector:
    """Whether each configured GPU is where it should be."""

    def __init__(self, actuator: Actuator) -> None:
        self._actuator = actuator

    def collect(self) -> Iterator[Metric]:
        """One row per GPU and state, 1 for the state it is in."""
        states = GaugeMetricFamily(
            "throttle_gpu_state",
            "1 for the state that a GPU is in: default (clocks), throttled, left_throttled (no "
            "engine holds it, which must not last) or unknown (a write has failed).",
            labels=["gpu", "state"],
        )
        for uuid in self._actuator.uuids():
            now = gpu_state(self._actuator.target_mhz(uuid), self._actuator.owner(uuid))
            for state in GPU_STATES:
                states.add_metric([uuid, state], float(state == now))
        yield states


class EngineCollector:
    """The engines that are connected; one that leaves takes its rows with it."""

    def __init__(self, statuses: Callable[[], Iterable[throttle_service_pb2.EngineStatus]]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterator[Metric]:
        """One row per engine; a figure that is not known yet is left out."""
        engine = InfoMetricFamily(
            "throttle_engine",
            "Engines connected, with their mode and the bundle that predicts for them.",
            labels=["engine", "mode", "bundle"],
        )
        age = GaugeMetricFamily(
            "throttle_state_age_seconds", "Time since an engine's last state.", labels=["engine"]
        )
        coverage = GaugeMetricFamily(
            "throttle_slo_coverage_ratio",
            "Share of recent iterations that stayed within the upper bound that limits are kept "
            "by.",
            labels=["engine"],
        )
        error = GaugeMetricFamily(
            "throttle_prediction_error_ratio",
            "Observed over predicted, less one: above 0 when iterations take longer than "
            "predicted. Predictions are corrected by it.",
            labels=["engine", "target"],
        )
        predicted = GaugeMetricFamily(
            "throttle_predicted_iteration_duration_seconds",
            "Duration expected of the next iteration at the chosen clock.",
            labels=["engine"],
        )
        slack = GaugeMetricFamily(
            "throttle_slo_slack_seconds",
            "Time left to the limit that binds, by the upper bound; below 0 when it will be "
            "missed. None when no limit binds.",
            labels=["engine", "slo"],
        )
        lost = GaugeMetricFamily(
            "throttle_lost_requests_count", "Requests that no clock can save.", labels=["engine"]
        )
        for status in self._statuses():
            name = status.engine_id
            mode = engine_pb2.ControlMode.Name(status.mode).removeprefix("CONTROL_MODE_").lower()
            engine.add_metric([name, mode, status.bundle], {})
            if status.state_age_seconds >= 0:
                age.add_metric([name], status.state_age_seconds)
            if status.coverage_ratio >= 0:
                coverage.add_metric([name], status.coverage_ratio)
            error.add_metric([name, "latency"], status.latency_bias_ratio - 1.0)
            if not status.HasField("last_decision"):
                continue
            decision = status.last_decision
            predicted.add_metric([name], decision.predicted_iteration_seconds)
            lost.add_metric([name], decision.lost_requests_count)
            if decision.HasField("binding_limit"):
                limit = decision.binding_limit
                slo = decision_pb2.SloKind.Name(limit.slo).removeprefix("SLO_KIND_").lower()
                slack.add_metric([name, slo], limit.slack_seconds)
        yield from (engine, age, coverage, error, predicted, slack, lost)
