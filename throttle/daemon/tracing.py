"""Decisions as OpenTelemetry spans: some of them, and only where it is asked for."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from throttle import __version__
from throttle.errors import ThrottleError

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.sdk.trace.export import SpanExporter

    from throttle.control.state import EngineProfile
    from throttle.v1 import decision_pb2

_NANOSECONDS = 1e9


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """Which decisions are traced, and where to.

    Attributes:
        endpoint: OTLP collector over gRPC, such as http://collector:4317; empty traces nothing.
            Needs moe-throttle[tracing].
        sample_ratio: Share of decisions that become spans, 0 to 1.
    """

    endpoint: str = ""
    sample_ratio: float = 0.01

    def problems(self) -> list[str]:
        """Values out of range; one line each."""
        if not 0.0 <= self.sample_ratio <= 1.0:
            return [f"sample_ratio is {self.sample_ratio}; allowed: 0 to 1"]
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            return [f"endpoint is {self.endpoint!r}; allowed: http://HOST:PORT or https://..."]
        return []


class DecisionTracer(Protocol):
    """Is told of each decision."""

    def __call__(
        self, profile: EngineProfile, decision: decision_pb2.Decision, outcome: str, reason: str
    ) -> None:
        """Take note of one decision; never waits and never raises."""
        ...


def no_tracing(
    profile: EngineProfile, decision: decision_pb2.Decision, outcome: str, reason: str
) -> None:
    """The tracer of a daemon that traces nothing."""


class SpanTracer:
    """Turns a sample of the decisions into spans."""

    def __init__(
        self,
        exporter: SpanExporter,
        sample_ratio: float,
        draw: Callable[[], float] = random.random,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Export through a queue of its own thread, which drops what it cannot hold.

        Args:
            exporter: Where spans go.
            sample_ratio: Share of decisions, 0 to 1.
            draw: Random numbers in [0, 1).
            wall_clock: Seconds since the epoch.
        """
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - optional
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        resource = Resource.create({"service.name": "throttle", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("throttle", __version__)
        self._sample_ratio = sample_ratio
        self._draw = draw
        self._wall_clock = wall_clock

    def __call__(
        self, profile: EngineProfile, decision: decision_pb2.Decision, outcome: str, reason: str
    ) -> None:
        """Take note of one decision."""
        if self._draw() >= self._sample_ratio:
            return
        end = self._wall_clock()
        span = self._tracer.start_span(
            "decision",
            start_time=int((end - decision.decision_duration_seconds) * _NANOSECONDS),
            attributes=_attributes(profile, decision, outcome, reason),
        )
        span.end(int(end * _NANOSECONDS))

    def close(self) -> None:
        """Export what waits."""
        self._provider.shutdown()


def make_tracer(settings: TracingSettings) -> SpanTracer | None:
    """The tracer that the settings ask for; None when they ask for none.

    Raises:
        ThrottleError: OpenTelemetry is not installed.
    """
    if not settings.endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
    except ModuleNotFoundError:
        raise ThrottleError(
            "tracing.endpoint is set, but OpenTelemetry is not installed; install "
            "moe-throttle[tracing] or leave it empty"
        ) from None
    insecure = settings.endpoint.startswith("http://")
    return SpanTracer(
        OTLPSpanExporter(endpoint=settings.endpoint, insecure=insecure), settings.sample_ratio
    )


def _attributes(
    profile: EngineProfile, decision: decision_pb2.Decision, outcome: str, reason: str
) -> dict[str, Any]:
    # gen_ai.* where the semantic conventions have a name; the rest is ours, with units
    attributes: dict[str, Any] = {
        "gen_ai.request.model": profile.model_name,
        "gen_ai.provider.name": profile.engine_name,
        "throttle.engine_id": profile.engine_id,
        "throttle.gpu_uuids": list(profile.gpu_uuids),
        "throttle.outcome": outcome,
        "throttle.reason": reason,
        "throttle.sequence_number": decision.sequence_number,
        "throttle.target_clock_mhz": decision.target_clock_mhz,
        "throttle.applied_clock_mhz": decision.applied_clock_mhz,
        "throttle.predicted_iteration_seconds": decision.predicted_iteration_seconds,
        "throttle.predicted_power_watts": decision.predicted_power_watts,
    }
    if decision.HasField("binding_limit"):
        attributes["throttle.slack_seconds"] = decision.binding_limit.slack_seconds
    return attributes
