"""The engines that are connected: opens, finds and ends their sessions."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from throttle.control.state import Mode
from throttle.daemon.brains import GpuModel
from throttle.daemon.breaker import SloBreaker
from throttle.daemon.mailbox import Mailbox
from throttle.daemon.recording import Recording, recording_path, records_metadata
from throttle.daemon.session import Session
from throttle.daemon.tracing import no_tracing
from throttle.daemon.turns import Turns
from throttle.errors import ConflictError, NotFoundError, ThrottleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from throttle.actuation.actuator import Actuator
    from throttle.control.state import EngineProfile
    from throttle.daemon.access import Identity
    from throttle.daemon.brains import BrainFactory
    from throttle.daemon.breaker import BreakerSettings
    from throttle.daemon.metrics import DaemonMetrics
    from throttle.daemon.telemetry import Telemetry
    from throttle.daemon.tracing import DecisionTracer
    from throttle.v1 import throttle_service_pb2


class StoppingError(ThrottleError):
    """The service is shutting down; engines should come back later."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What every session is bound to.

    Attributes:
        engines_count: Most engines at once.
        lease_minimum_seconds: Shortest lease granted.
        lease_maximum_seconds: Longest lease granted.
    """

    engines_count: int
    lease_minimum_seconds: float
    lease_maximum_seconds: float


@dataclass(frozen=True, slots=True)
class RecordingPlan:
    """Where iterations are recorded.

    Attributes:
        directory: Where to; None records nothing.
        simulated: Whether the GPUs are simulated, which records say.
    """

    directory: Path | None
    simulated: bool


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A session and the mailbox that feeds it."""

    session: Session
    mailbox: Mailbox


class Sessions:
    """Every engine's session, by engine id. Thread safe."""

    def __init__(
        self,
        *,
        actuator: Actuator,
        telemetry: Telemetry,
        brain_factory: BrainFactory,
        recording: RecordingPlan,
        limits: SessionLimits,
        metrics: DaemonMetrics,
        breaker: BreakerSettings | None = None,
        clock: Callable[[], float],
        new_registration_id: Callable[[], str],
        log: FilteringBoundLogger,
        trace: DecisionTracer = no_tracing,
    ) -> None:
        """Start without engines.

        Args:
            actuator: Sets clocks.
            telemetry: Reads GPUs.
            brain_factory: Makes each engine's brain.
            recording: What is recorded.
            limits: What sessions are bound to.
            metrics: Counts.
            breaker: When throttling an engine is given up; None never does.
            clock: Monotonic seconds.
            new_registration_id: Gives a name that was never given before.
            log: Logger.
            trace: Told of each decision.
        """
        self._actuator = actuator
        self._telemetry = telemetry
        self._brain_factory = brain_factory
        self._recording = recording
        self._limits = limits
        self._metrics = metrics
        self._breaker = breaker
        self._clock = clock
        self._new_registration_id = new_registration_id
        self._log = log
        self._trace = trace
        self._turns = Turns()
        self._lock = threading.Lock()
        self._open: dict[str, OpenSession | None] = {}  # None while a session is being made
        self._draining = False

    def open(self, profile: EngineProfile) -> OpenSession:
        """Register an engine.

        Raises:
            ConflictError: Its id or a GPU is taken, or there are too many engines.
            NotFoundError: A GPU or the model is not known.
            StoppingError: The service is stopping.
            ThrottleError: It cannot be recorded as it asks.
            PredictorsError: There is no bundle that fits.
        """
        self._reserve(profile.engine_id)
        opened = None
        try:
            opened = self._make(profile)
        finally:
            with self._lock:
                if opened is None:
                    del self._open[profile.engine_id]
                else:
                    self._open[profile.engine_id] = opened
                self._metrics.engines.set(len(self._open))
                draining = self._draining
        if draining:
            opened.mailbox.end(StoppingError("the service is stopping"))
        return opened

    def close(self, opened: OpenSession) -> None:
        """End a session; a second call does nothing."""
        opened.mailbox.end()
        opened.session.close()
        with self._lock:
            if self._open.get(opened.session.profile.engine_id) is opened:
                del self._open[opened.session.profile.engine_id]
            self._metrics.engines.set(len(self._open))

    def release(self, engine_id: str, caller: Identity | None = None) -> tuple[str, ...]:
        """Give the GPUs of one engine, or of all when the id is empty, back to default clocks.

        Args:
            engine_id: The engine, or empty.
            caller: Who asks; engines on GPUs of others do not exist for it. None sees all.

        Raises:
            NotFoundError: There is no such engine.
        """
        seen = self._seen_by(caller)
        chosen = [opened for opened in seen if engine_id in {"", opened.session.profile.engine_id}]
        if engine_id and not chosen:
            names = ", ".join(opened.session.profile.engine_id for opened in seen)
            raise NotFoundError(f"engine {engine_id!r} is not connected; there: {names or 'none'}")
        return tuple(uuid for opened in chosen for uuid in opened.session.release())

    def statuses(self, caller: Identity | None = None) -> list[throttle_service_pb2.EngineStatus]:
        """What an operator sees of each engine; of its own ones where a caller is given."""
        return [opened.session.status() for opened in self._seen_by(caller)]

    def release_stuck(self) -> None:
        """Give back what sessions hold whose control does not answer; called now and then."""
        for opened in self._all():
            opened.session.release_if_stuck(opened.mailbox.oldest_seconds)

    def restart(self, reason: str) -> None:
        """Give all GPUs back and have every engine register again."""
        for opened in self._all():
            opened.mailbox.end(StoppingError(reason))
            opened.session.close()

    def drain(self) -> None:
        """Give all GPUs back, end every stream with `StoppingError` and refuse new ones."""
        with self._lock:
            self._draining = True
        for opened in self._all():
            opened.mailbox.end(StoppingError("the service is stopping"))
            opened.session.close()

    def _seen_by(self, caller: Identity | None) -> list[OpenSession]:
        return [
            opened
            for opened in self._all()
            if caller is None or caller.may_use(opened.session.profile.gpu_uuids)
        ]

    def _all(self) -> list[OpenSession]:
        with self._lock:
            return [opened for opened in self._open.values() if opened is not None]

    def _reserve(self, engine_id: str) -> None:
        with self._lock:
            if self._draining:
                raise StoppingError("the service is stopping")
            if engine_id in self._open:
                raise ConflictError(
                    f"registration.engine_id {engine_id!r} is connected already; "
                    "give each engine its own id"
                )
            if len(self._open) >= self._limits.engines_count:
                raise ConflictError(
                    f"{len(self._open)} engines are connected; allowed: "
                    f"engines_limit, {self._limits.engines_count}"
                )
            self._open[engine_id] = None

    def _make(self, profile: EngineProfile) -> OpenSession:
        limits, actuator = self._limits, self._actuator
        lease = max(
            limits.lease_minimum_seconds, min(limits.lease_maximum_seconds, profile.lease_seconds)
        )
        profile = dataclasses.replace(profile, lease_seconds=lease)
        gpu = GpuModel(
            actuator.name(profile.gpu_uuids[0]), actuator.supported_clocks_mhz(profile.gpu_uuids)
        )
        registration_id = self._new_registration_id()
        log = self._log.bind(engine_id=profile.engine_id, registration_id=registration_id)
        engine_brain = None
        if profile.mode is not Mode.RECORD:
            engine_brain = self._brain_factory.build(profile, gpu)
        meter = self._telemetry.open(profile.engine_id, profile.gpu_uuids)
        recording = None
        try:
            recording = self._open_recording(profile, gpu, registration_id)
            session = Session(
                registration_id=registration_id,
                profile=profile,
                engine_brain=engine_brain,
                actuator=actuator,
                meter=meter,
                recording=recording,
                breaker=None
                if self._breaker is None
                else SloBreaker(self._breaker, profile.default_slos),
                metrics=self._metrics,
                clock=self._clock,
                log=log,
                trace=self._trace,
                turns=self._turns,
            )
        except BaseException:
            meter.close()
            if recording is not None:
                recording.close()
            raise
        log.info(
            "engine_registered",
            mode=profile.mode.name.lower(),
            model=profile.model_name,
            gpu_uuids=profile.gpu_uuids,
            bundle=engine_brain.bundle if engine_brain else "",
            lease_seconds=lease,
        )
        return OpenSession(session, Mailbox(self._clock))

    def _open_recording(
        self, profile: EngineProfile, gpu: GpuModel, registration_id: str
    ) -> Recording | None:
        plan = self._recording
        if plan.directory is None:
            if profile.mode is Mode.RECORD:
                raise ThrottleError(
                    "registration.mode is RECORD, but this service records nothing; start "
                    "`throttle serve` with --recordings DIRECTORY"
                )
            return None
        return Recording(
            recording_path(plan.directory, profile.engine_id, registration_id),
            records_metadata(profile, gpu.name, gpu.clocks_mhz, simulated=plan.simulated),
            registration_id,
        )
