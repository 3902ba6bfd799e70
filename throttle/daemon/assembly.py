"""Puts the daemon together: which part is given to which."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog
from prometheus_client import CollectorRegistry

from throttle.actuation.backends import make_backend
from throttle.actuation.local import LocalActuator
from throttle.actuation.remote import RemoteActuator
from throttle.daemon.access import CallerLookup, read_access_list
from throttle.daemon.brains import BrainFactory, ControllerFactory
from throttle.daemon.collectors import EngineCollector, GpuStateCollector
from throttle.daemon.gate import CallGate
from throttle.daemon.metrics import DaemonMetrics, GpuCollector
from throttle.daemon.reload import Reloader, ReplaceableFactory
from throttle.daemon.server import Daemon
from throttle.daemon.service import ThrottleServicer
from throttle.daemon.sessions import RecordingPlan, SessionLimits, Sessions
from throttle.daemon.status_page import StatusPage
from throttle.daemon.telemetry import Telemetry
from throttle.daemon.tracing import make_tracer, no_tracing

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from throttle.actuation.actuator import Actuator
    from throttle.actuation.hand import ClockChange
    from throttle.daemon.config import DaemonConfig


def build_server(
    config: DaemonConfig,
    brain_factory: BrainFactory | None = None,
    clock: Callable[[], float] = time.monotonic,
    *,
    read_config: Callable[[], DaemonConfig] | None = None,
    config_file: Path | None = None,
    channel: socket.socket | None = None,
) -> Daemon:
    """Put a daemon together.

    Args:
        config: A configuration without problems.
        brain_factory: Makes each engine's brain; None controls by the configured bundles.
        clock: Monotonic seconds.
        read_config: Reads the configuration again; None never reloads.
        config_file: The configuration's file, which is watched.
        channel: To the privileged process; None sets clocks in this one, which is for tools on
            simulated GPUs: nobody resets them if it is killed.

    Raises:
        NotFoundError: The backend or a configured GPU is not there.
        DriverError: The driver cannot be used.
        ActuatorEndedError: The privileged process did not start; it has said why.
    """
    log = structlog.get_logger()
    access_list = None if config.access is None else read_access_list(config.access)
    identify = CallerLookup(access_list)
    kind = "observe" if channel is not None and config.backend == "nvml" else config.backend
    backend = make_backend(kind, config.simulated_gpus, clock)
    try:
        registry = CollectorRegistry()
        metrics = DaemonMetrics(registry)
        allowed = config.gpus or backend.uuids()
        telemetry = Telemetry(
            backend.read,
            allowed,
            clock,
            config.telemetry,
            when_asked=config.backend == "simulated",
            on_request=lambda request: metrics.request_energy.observe(request.energy_joules),
        )

        def note_change(change: ClockChange) -> None:
            metrics.count_change(change)
            telemetry.hurry(change.gpu_uuid)

        actuator: Actuator = (
            LocalActuator(backend, allowed, clock, note_change)
            if channel is None
            else RemoteActuator(channel, backend, allowed, config.actuation, note_change)
        )
        registry.register(GpuCollector(actuator, telemetry))
        registry.register(GpuStateCollector(actuator))
    except BaseException:
        backend.close()
        raise
    tracer = make_tracer(config.tracing)
    policy = ReplaceableFactory(ControllerFactory(config.bundles, config.control))
    brains = brain_factory if brain_factory is not None else policy
    sessions = Sessions(
        actuator=actuator,
        telemetry=telemetry,
        brain_factory=brains,
        recording=RecordingPlan(config.recordings, simulated=config.backend == "simulated"),
        # a tool that explores clocks misses limits on purpose
        breaker=config.breaker if brain_factory is None else None,
        limits=SessionLimits(
            config.engines_limit, config.lease.minimum_seconds, config.lease.maximum_seconds
        ),
        metrics=metrics,
        clock=clock,
        new_registration_id=_new_registration_id,
        log=log,
        trace=tracer or no_tracing,
    )
    registry.register(EngineCollector(sessions.statuses))
    servicer = ThrottleServicer(
        sessions=sessions,
        actuator=actuator,
        telemetry=telemetry,
        brain_factory=brains,
        identify=identify,
        limits=config.limits,
        metrics=metrics,
        clock=clock,
        log=log,
    )
    daemon = Daemon(
        config=config,
        actuator=actuator,
        telemetry=telemetry,
        sessions=sessions,
        brain_factory=brains,
        servicer=servicer,
        gate=CallGate(identify, config.limits, metrics, clock, log),
        status_page=StatusPage(
            actuator=actuator,
            read=telemetry.read,
            statuses=sessions.statuses,
            metrics=metrics,
            clock=clock,
            simulated=config.backend == "simulated",
        ),
        registry=registry,
        close_backend=backend.close,
    )
    if tracer is not None:
        daemon.on_stop(tracer.close)
    if read_config is not None and brain_factory is None:
        daemon.reloader = Reloader(
            config=config,
            read_config=read_config,
            config_file=config_file,
            factory=policy,
            identify=identify,
            sessions=sessions,
            metrics=metrics,
            log=log,
        )
    return daemon


def _new_registration_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
