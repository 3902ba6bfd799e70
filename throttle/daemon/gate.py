"""Stands before every gRPC call: who calls, and how often that caller may."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import grpc

from throttle.daemon.access import AuthenticationError
from throttle.errors import ThrottleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from structlog.typing import FilteringBoundLogger

    from throttle.daemon.access import CallerLookup
    from throttle.daemon.metrics import DaemonMetrics

#: A burst may be this many seconds' worth of a rate.
_BURST_SECONDS: Final = 2.0
#: Most refusals logged per second; all are counted.
_LOGGED_PER_SECOND: Final = 1.0
#: Health says no more than whether the service serves, and probes have no credentials.
_OPEN_PREFIX: Final = "/grpc.health.v1.Health/"

_MESSAGE_BYTES_MAXIMUM = 64 * 1024 * 1024


class RateError(ThrottleError):
    """A caller asks more often than it may."""


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """What one caller may ask for.

    Attributes:
        message_bytes: Largest message received, up to 64 MiB.
        calls_per_second: Calls and new streams of one caller; a burst may be twice that.
        states_per_second: States of one engine; a burst may be twice that. An engine that sends
            more is disconnected, and its GPUs return to default clocks.
        registration_seconds: Longest time from the start of a stream to its registration.
    """

    message_bytes: int = 8 * 1024 * 1024
    calls_per_second: float = 50.0
    states_per_second: float = 2000.0
    registration_seconds: float = 5.0

    def problems(self) -> list[str]:
        """Values out of range; one line each."""
        found = []
        if not 1024 <= self.message_bytes <= _MESSAGE_BYTES_MAXIMUM:
            found.append(
                f"message_bytes is {self.message_bytes}; allowed: 1024 to {_MESSAGE_BYTES_MAXIMUM}"
            )
        found += [
            f"{name} is {getattr(self, name)}; allowed: above 0"
            for name in ("calls_per_second", "states_per_second", "registration_seconds")
            if getattr(self, name) <= 0
        ]
        return found


class TokenBucket:
    """So many per second on average, and a burst. Thread safe."""

    def __init__(self, per_second: float, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._most = max(1.0, per_second * _BURST_SECONDS)
        self._clock = clock
        self._lock = threading.Lock()
        self._left = self._most
        self._seconds = clock()

    def take(self) -> bool:
        """Whether one more is within the rate; takes it if so."""
        with self._lock:
            now = self._clock()
            self._left = min(self._most, self._left + (now - self._seconds) * self._per_second)
            self._seconds = now
            if self._left < 1.0:
                return False
            self._left -= 1.0
            return True


class CallGate(grpc.ServerInterceptor):
    """Refuses calls of unknown callers and of those that call too often."""

    def __init__(
        self,
        identify: CallerLookup,
        limits: LimitSettings,
        metrics: DaemonMetrics,
        clock: Callable[[], float],
        log: FilteringBoundLogger,
    ) -> None:
        """Let nobody through yet.

        Args:
            identify: Tells who calls.
            limits: How often one may.
            metrics: Counts refusals.
            clock: Monotonic seconds.
            log: Logger.
        """
        self._identify = identify
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._log = log
        self._lock = threading.Lock()
        self._buckets: dict[str, TokenBucket] = {}  # by identity: as many as the access list names
        self._logged = TokenBucket(_LOGGED_PER_SECOND, clock)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Put the check before the method's own handler."""
        handler: Any = continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_PREFIX):
            return cast("grpc.RpcMethodHandler[Any, Any] | None", handler)
        if handler.response_streaming:

            def stream(request: object, context: grpc.ServicerContext) -> Iterator[object]:
                self._admit(context)
                yield from behavior(request, context)

            behavior = handler.stream_stream or handler.unary_stream
            wrap = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return wrap(stream, handler.request_deserializer, handler.response_serializer)

        def unary(request: object, context: grpc.ServicerContext) -> object:
            self._admit(context)
            return handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(
            unary, handler.request_deserializer, handler.response_serializer
        )

    def _admit(self, context: grpc.ServicerContext) -> None:
        try:
            name = self._identify(context).name
        except AuthenticationError as error:
            self._refuse(context, grpc.StatusCode.UNAUTHENTICATED, "unauthenticated", str(error))
        if not self._bucket(name).take():
            self._refuse(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "rate",
                f"{name} calls too often; allowed: limits.calls_per_second, "
                f"{self._limits.calls_per_second:g}",
            )

    def _bucket(self, name: str) -> TokenBucket:
        with self._lock:
            if name not in self._buckets:
                self._buckets[name] = TokenBucket(self._limits.calls_per_second, self._clock)
            return self._buckets[name]

    def _refuse(
        self, context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, text: str
    ) -> None:
        self._metrics.calls_refused.labels(reason).inc()
        if self._logged.take():
            self._log.warning("call_refused", code=code.name, error=text, peer=context.peer())
        context.abort(code, text)
