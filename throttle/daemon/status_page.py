"""What the HTTP port shows: the status page, its data, metrics and probes."""

from __future__ import annotations

import json
from functools import partial
from http import HTTPStatus
from importlib import resources
from typing import TYPE_CHECKING, Any

from prometheus_client.exposition import choose_encoder

from throttle import __version__
from throttle.daemon.collectors import gpu_state
from throttle.daemon.web import Page
from throttle.errors import ActuationError
from throttle.v1 import decision_pb2, engine_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from throttle.actuation.actuator import Actuator
    from throttle.actuation.backend import GpuReading
    from throttle.daemon.metrics import DaemonMetrics
    from throttle.v1 import throttle_service_pb2

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/status.css": ("status.css", "text/css; charset=utf-8"),
    "/status.js": ("status.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


class StatusPage:
    """Everything under the metrics address."""

    def __init__(
        self,
        *,
        actuator: Actuator,
        read: Callable[[str], GpuReading],
        statuses: Callable[[], Iterable[throttle_service_pb2.EngineStatus]],
        metrics: DaemonMetrics,
        clock: Callable[[], float],
        simulated: bool,
    ) -> None:
        """Show this daemon.

        Args:
            actuator: Knows the GPUs.
            read: Reads one.
            statuses: The engines.
            metrics: Counts, and the last changes.
            clock: Monotonic seconds.
            simulated: Whether the GPUs are simulated, which the page says.
        """
        self._actuator = actuator
        self._read = read
        self._statuses = statuses
        self._metrics = metrics
        self._clock = clock
        self._simulated = simulated
        self._started_seconds = clock()
        self.ready = False

    def pages(self) -> Mapping[str, Callable[[str], Page]]:
        """By path."""
        folder = resources.files("throttle.daemon") / "page"
        files = {
            path: partial(_file, (folder / name).read_bytes(), content_type)
            for path, (name, content_type) in _FILES.items()
        }
        return files | {
            "/metrics": self._metrics_page,
            "/status.json": self._status_page,
            # alive as long as it answers; ready while it serves. Neither asks a driver.
            "/livez": lambda _: Page("text/plain", b"ok\n"),
            "/readyz": self._ready_page,
        }

    def document(self) -> dict[str, Any]:
        """The page's data."""
        read = self._metrics.registry.get_sample_value
        name = "throttle_predicted_energy_joules_total"
        decided, default = (read(name, {"clocks": kind}) for kind in ("decided", "default"))
        return {
            "version": __version__,
            "simulated": self._simulated,
            "uptime_seconds": self._clock() - self._started_seconds,
            "gpus": [self._gpu(uuid) for uuid in self._actuator.uuids()],
            "engines": [
                _engine(status)
                for status in sorted(self._statuses(), key=lambda each: each.engine_id)
            ],
            "predicted_energy_joules": decided or 0.0,
            "predicted_default_energy_joules": default or 0.0,
            "changes": [
                {
                    "unix_seconds": change.unix_seconds,
                    "engine": change.engine_id,
                    "from_mhz": change.from_mhz,
                    "to_mhz": change.to_mhz,
                    "reason": change.reason,
                }
                for change in self._metrics.recent_changes()
            ],
            "reload_problem": self._metrics.reload_problem,
        }

    def _gpu(self, uuid: str) -> dict[str, Any]:
        target, owner = self._actuator.target_mhz(uuid), self._actuator.owner(uuid)
        try:
            reading = self._read(uuid)
        except ActuationError:
            observed = power = None
        else:
            observed, power = reading.clock_mhz, reading.power_watts
        return {
            "uuid": uuid,
            "name": self._actuator.name(uuid),
            "state": gpu_state(target, owner),
            "clock_state": self._actuator.clock_state(uuid).name.lower(),
            "target_mhz": max(0, target),
            "observed_mhz": observed,
            "power_watts": power,
            "engine": owner,
        }

    def _metrics_page(self, accept: str) -> Page:
        encoder, content_type = choose_encoder(accept)
        return Page(content_type, encoder(self._metrics.registry))

    def _status_page(self, _accept: str) -> Page:
        return Page("application/json", json.dumps(self.document()).encode())

    def _ready_page(self, _accept: str) -> Page:
        if self.ready:
            return Page("text/plain", b"serving\n")
        return Page("text/plain", b"not serving\n", HTTPStatus.SERVICE_UNAVAILABLE)


def _file(content: bytes, content_type: str, _accept: str) -> Page:
    return Page(content_type, content)


def _engine(status: throttle_service_pb2.EngineStatus) -> dict[str, Any]:
    known = status.HasField("last_decision")
    decision = status.last_decision
    limit = decision.binding_limit if decision.HasField("binding_limit") else None
    default = decision.default_long_run_power_watts
    saving = 1.0 - decision.long_run_power_watts / default if default > 0 else None
    return {
        "id": status.engine_id,
        "mode": _word(engine_pb2.ControlMode, status.mode, "CONTROL_MODE_"),
        "bundle": status.bundle,
        "gpus": list(status.gpu_uuids),
        "applied_mhz": decision.applied_clock_mhz if known else None,
        "target_mhz": decision.target_clock_mhz if known else None,
        "reason": _word(decision_pb2.DecisionReason, decision.reason, "DECISION_REASON_")
        if known
        else "",
        "slo": _word(decision_pb2.SloKind, limit.slo, "SLO_KIND_") if limit is not None else "",
        "slack_seconds": limit.slack_seconds if limit is not None else None,
        "predicted_saving_ratio": saving,
        "coverage_ratio": status.coverage_ratio if status.coverage_ratio >= 0 else None,
        "prediction_error_ratio": status.latency_bias_ratio - 1.0,
        "lost_requests_count": decision.lost_requests_count,
        "state_age_seconds": status.state_age_seconds if status.state_age_seconds >= 0 else None,
        "states_count": status.states_count,
        "clock_changes_count": status.clock_changes_count,
    }


def _word(enum: Any, value: int, prefix: str) -> str:  # noqa: ANN401 - protobuf's enum wrapper
    return str(enum.Name(value)).removeprefix(prefix).lower()
