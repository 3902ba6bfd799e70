"""gRPC on one side, sessions on the other; the only place where errors become status codes."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

import grpc

from predictors.errors import BundleError, PredictorsError
from throttle import __version__
from throttle.daemon.access import AuthenticationError, ForbiddenError
from throttle.daemon.answers import evaluation_message, gpu_message
from throttle.daemon.brains import GpuModel
from throttle.daemon.gate import RateError, TokenBucket
from throttle.daemon.mailbox import Arrival
from throttle.daemon.messages import StateReader, read_registration
from throttle.daemon.sessions import StoppingError
from throttle.errors import (
    ActuationError,
    ConflictError,
    InvalidInputError,
    NotFoundError,
    ThrottleError,
)
from throttle.v1 import engine_pb2, throttle_service_pb2, throttle_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from structlog.typing import FilteringBoundLogger

    from throttle.actuation.actuator import Actuator
    from throttle.actuation.backend import GpuReading
    from throttle.control.state import EngineProfile
    from throttle.daemon.access import CallerLookup, Identity
    from throttle.daemon.brains import BrainFactory
    from throttle.daemon.gate import LimitSettings
    from throttle.daemon.metrics import DaemonMetrics
    from throttle.daemon.sessions import OpenSession, Sessions
    from throttle.daemon.telemetry import Telemetry

_Error = TypeVar("_Error", bound=Exception)

#: The first class that fits counts. What is not listed is a bug: INTERNAL.
_CODES: Final = (
    (AuthenticationError, grpc.StatusCode.UNAUTHENTICATED),
    (ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
    (RateError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (ConflictError, grpc.StatusCode.FAILED_PRECONDITION),
    (ActuationError, grpc.StatusCode.UNAVAILABLE),
    (StoppingError, grpc.StatusCode.UNAVAILABLE),
    (BundleError, grpc.StatusCode.FAILED_PRECONDITION),
    (PredictorsError, grpc.StatusCode.FAILED_PRECONDITION),
    (ThrottleError, grpc.StatusCode.FAILED_PRECONDITION),
)


class ThrottleServicer(throttle_service_pb2_grpc.ThrottleServiceServicer):
    """The throttling service."""

    def __init__(
        self,
        *,
        sessions: Sessions,
        actuator: Actuator,
        telemetry: Telemetry,
        brain_factory: BrainFactory,
        identify: CallerLookup,
        limits: LimitSettings,
        metrics: DaemonMetrics,
        clock: Callable[[], float],
        log: FilteringBoundLogger,
    ) -> None:
        """Answer for these sessions.

        Args:
            sessions: Opens and finds sessions.
            actuator: Knows the GPUs.
            telemetry: Reads them.
            brain_factory: Makes brains for what-if questions.
            identify: Tells who calls.
            limits: What one caller may ask for.
            metrics: Counts.
            clock: Monotonic seconds.
            log: Logger.
        """
        self._sessions = sessions
        self._actuator = actuator
        self._telemetry = telemetry
        self._brain_factory = brain_factory
        self._identify = identify
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._log = log
        self._started_seconds = clock()

    def StreamIterations(  # noqa: N802 - the protocol's name
        self,
        request_iterator: Iterator[throttle_service_pb2.StreamIterationsRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[throttle_service_pb2.StreamIterationsResponse]:
        """Serve one engine until its stream ends."""
        try:
            caller = self._identify(context)
            with _deadline(self._limits.registration_seconds, context.cancel):
                first = _first_message(request_iterator)
            profile = read_registration(first)
            caller.require(profile.gpu_uuids)
            opened = self._sessions.open(profile)
        except Exception as error:  # noqa: BLE001 - becomes a status code
            self._metrics.registrations.labels("refused").inc()
            self._abort(context, error)
        self._metrics.registrations.labels("accepted").inc()
        # However the call ends, even while an answer waits to be read, the GPUs are given back.
        if not context.add_callback(lambda: self._close_aside(opened)):
            self._sessions.close(opened)
            return
        try:
            threading.Thread(
                target=_read_states,
                args=(
                    request_iterator,
                    StateReader(opened.session.profile),
                    opened,
                    TokenBucket(self._limits.states_per_second, self._clock),
                ),
                name="states",
                daemon=True,
            ).start()
            yield throttle_service_pb2.StreamIterationsResponse(accepted=_accepted(opened))
            yield from self._decide(opened)
        finally:
            self._sessions.close(opened)
        if opened.mailbox.error is not None:
            self._abort(context, opened.mailbox.error)

    def Evaluate(  # noqa: N802 - the protocol's name
        self,
        request: throttle_service_pb2.EvaluateRequest,
        context: grpc.ServicerContext,
    ) -> throttle_service_pb2.EvaluateResponse:
        """Judge every clock for one state."""
        try:
            return self._evaluate(request, self._identify(context))
        except Exception as error:  # noqa: BLE001 - becomes a status code
            self._abort(context, error)

    def GetStatus(  # noqa: N802 - the protocol's name
        self,
        request: throttle_service_pb2.GetStatusRequest,  # noqa: ARG002 - it has no fields
        context: grpc.ServicerContext,
    ) -> throttle_service_pb2.GetStatusResponse:
        """Say what the service is doing."""
        try:
            caller = self._identify(context)
            return throttle_service_pb2.GetStatusResponse(
                version=__version__,
                uptime_seconds=self._clock() - self._started_seconds,
                engines=self._sessions.statuses(caller),
                gpus=[
                    self._gpu_status(uuid)
                    for uuid in self._actuator.uuids()
                    if caller.may_use((uuid,))
                ],
            )
        except Exception as error:  # noqa: BLE001 - becomes a status code
            self._abort(context, error)

    def ReleaseControl(  # noqa: N802 - the protocol's name
        self,
        request: throttle_service_pb2.ReleaseControlRequest,
        context: grpc.ServicerContext,
    ) -> throttle_service_pb2.ReleaseControlResponse:
        """Return GPUs to default clocks until their engine registers again."""
        try:
            released = self._sessions.release(request.engine_id, self._identify(context))
            return throttle_service_pb2.ReleaseControlResponse(released_gpu_uuids=released)
        except Exception as error:  # noqa: BLE001 - becomes a status code
            self._abort(context, error)

    def _evaluate(
        self, request: throttle_service_pb2.EvaluateRequest, caller: Identity
    ) -> throttle_service_pb2.EvaluateResponse:
        started = self._clock()
        profile = read_registration(request.registration)
        if not request.HasField("state"):
            raise InvalidInputError("state", None, "an IterationState")
        state = StateReader(profile).read(request.state)
        model = self._gpu_model(profile)
        if model is not None:
            caller.require(profile.gpu_uuids)
        made = self._brain_factory.build(profile, model)
        made.brain.observe(state, 0)
        evaluation = made.brain.evaluate(state)
        return evaluation_message(
            evaluation, state.sequence_number, made.bundle, self._clock() - started
        )

    def _decide(
        self, opened: OpenSession
    ) -> Iterator[throttle_service_pb2.StreamIterationsResponse]:
        session, mailbox = opened.session, opened.mailbox
        while True:
            deadline = session.lease_deadline_seconds
            timeout = None if deadline is None else max(0.0, deadline - self._clock())
            arrivals = mailbox.take(timeout)
            if arrivals is None:
                return
            if arrivals:
                decision = session.handle(arrivals, mailbox.waiting)
            elif deadline is not None and self._clock() >= deadline:
                decision = session.expire()
            else:
                continue
            yield throttle_service_pb2.StreamIterationsResponse(decision=decision)

    def _close_aside(self, opened: OpenSession) -> None:
        # gRPC calls back on the thread that serves every call: no driver or disk may hold it
        threading.Thread(
            target=self._sessions.close, args=(opened,), name="close", daemon=True
        ).start()

    def _gpu_model(self, profile: EngineProfile) -> GpuModel | None:
        if not set(profile.gpu_uuids) <= set(self._actuator.uuids()):
            return None  # asked about GPUs that are not here
        return GpuModel(
            self._actuator.name(profile.gpu_uuids[0]),
            self._actuator.supported_clocks_mhz(profile.gpu_uuids),
        )

    def _gpu_status(self, uuid: str) -> throttle_service_pb2.GpuStatus:
        reading: GpuReading | ActuationError
        try:
            reading = self._telemetry.read(uuid)
        except ActuationError as error:
            reading = error
        return gpu_message(uuid, self._actuator, reading, self._telemetry.book.gpu(uuid))

    def _abort(self, context: grpc.ServicerContext, error: BaseException) -> NoReturn:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
        if code is None:
            self._log.error("internal_error", exc_info=error)
            context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
        self._log.warning("call_refused", code=code.name, error=str(error))
        context.abort(code, str(error))


@contextlib.contextmanager
def _deadline(seconds: float, cancel: Callable[[], object]) -> Iterator[None]:
    """Cancel a call that takes longer: an open stream holds a thread."""
    timer = threading.Timer(seconds, cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _first_message(
    requests: Iterator[throttle_service_pb2.StreamIterationsRequest],
) -> engine_pb2.EngineRegistration:
    try:
        first = next(requests, None)
    except grpc.RpcError as error:  # the engine went away
        _forget_frames(error)
        first = None
    kind = first.WhichOneof("message") if first is not None else None
    if first is None or kind != "registration":
        raise InvalidInputError("message", kind, "a registration first")
    return first.registration


def _read_states(
    requests: Iterator[throttle_service_pb2.StreamIterationsRequest],
    reader: StateReader,
    opened: OpenSession,
    rate: TokenBucket,
) -> None:
    """Validate states as they come; runs on a thread of its own until the stream ends."""
    mailbox = opened.mailbox
    try:
        for request in requests:
            if not rate.take():
                raise RateError(  # noqa: TRY301 - handled as what reading raises
                    f"engine {opened.session.profile.engine_id!r} sends more states per second "
                    "than limits.states_per_second allows"
                )
            message = _state_message(request)
            mailbox.put(Arrival(reader.read(message), message))
    except grpc.RpcError as error:
        _forget_frames(error)
        mailbox.end()  # the engine went away, which is no error of the stream's
    except ThrottleError as error:
        mailbox.end(_forget_frames(error))
    except Exception as error:  # noqa: BLE001 - a bug: reported by the thread that answers
        mailbox.end(error)
    else:
        mailbox.end()


def _forget_frames(error: _Error) -> _Error:
    """Drop the traceback of an error that will be kept by what its frames refer to.

    gRPC keeps errors with the call, a mailbox its own. Such a ring holds the engine's session with
    all that it learned until the collector's last generation comes by, which takes minutes.
    """
    return error.with_traceback(None)


def _state_message(
    request: throttle_service_pb2.StreamIterationsRequest,
) -> engine_pb2.IterationState:
    kind = request.WhichOneof("message")
    if kind != "state":
        raise InvalidInputError("message", kind, "states after the registration")
    return request.state


def _accepted(opened: OpenSession) -> throttle_service_pb2.RegistrationAccepted:
    session = opened.session
    engine_brain = session.engine_brain
    return throttle_service_pb2.RegistrationAccepted(
        registration_id=session.registration_id,
        mode=engine_pb2.ControlMode.ValueType(session.profile.mode),
        bundle=engine_brain.bundle if engine_brain else "",
        candidate_clocks_mhz=engine_brain.candidate_clocks_mhz if engine_brain else (),
        lease_timeout_seconds=session.profile.lease_seconds,
    )
