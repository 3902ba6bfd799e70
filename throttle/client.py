"""What a serving engine imports: tell the service about each iteration, and never wait for it.

Needs grpcio and protobuf only. A daemon that is absent, slow or gone costs the engine nothing: no
call blocks and none raises after construction.

Example:
    >>> from throttle.client import ThrottleClient
    >>> from throttle.v1 import engine_pb2
    >>> client = ThrottleClient(
    ...     engine_pb2.EngineRegistration(
    ...         engine_id="vllm-0",
    ...         model=engine_pb2.ModelDescriptor(name="qwen3-30b-a3b"),
    ...         gpu_uuids=["GPU-5f1c"],
    ...         limits=engine_pb2.EngineLimits(
    ...             running_requests_count=256,
    ...             batched_tokens_count=8192,
    ...             kv_blocks_count=20000,
    ...             kv_block_tokens=16,
    ...         ),
    ...         mode=engine_pb2.CONTROL_MODE_ACT,
    ...     )
    ... )  # doctest: +SKIP
    >>> client.submit(  # after each iteration
    ...     engine_pb2.IterationState(
    ...         sequence_number=1,
    ...         phase=engine_pb2.ITERATION_PHASE_COMPLETED,
    ...         engine_time_seconds=12.5,
    ...         iteration_duration_seconds=0.021,
    ...     )
    ... )  # doctest: +SKIP
    >>> client.close()  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import random
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import grpc

from throttle.outbox import CARRIED_EVENTS_LIMIT, COMPLETED_STATES_LIMIT, Outbox
from throttle.v1 import engine_pb2, throttle_service_pb2, throttle_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from throttle.v1 import decision_pb2

#: Where `throttle serve` listens unless told otherwise.
DEFAULT_TARGET = "unix:///run/throttle/throttle.sock"

_log = logging.getLogger("throttle.client")


@dataclass(frozen=True, slots=True)
class ReconnectBackoff:
    """How long to wait before the next try, in seconds.

    Attributes:
        initial_seconds: First wait, > 0.
        maximum_seconds: Longest wait.
        jitter_ratio: Share of the wait that is random, 0 to 1, so that the engines of a restarted
            daemon do not all return at once.
    """

    initial_seconds: float = 0.1
    maximum_seconds: float = 5.0
    jitter_ratio: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.initial_seconds <= self.maximum_seconds:
            raise ValueError(
                f"initial_seconds is {self.initial_seconds}; allowed: above 0, "
                f"up to maximum_seconds ({self.maximum_seconds})"
            )
        if not 0 <= self.jitter_ratio <= 1:
            raise ValueError(f"jitter_ratio is {self.jitter_ratio}; allowed: 0 to 1")

    def delay_seconds(self, failures_count: int, draw: float) -> float:
        """The wait after so many failures in a row (>= 1); `draw` lies in [0, 1)."""
        doublings = min(failures_count - 1, 30)  # keeps the power finite
        delay = min(self.maximum_seconds, self.initial_seconds * 2.0**doublings)
        return delay * (1.0 - self.jitter_ratio * draw)


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """What the client has done since construction.

    Attributes:
        submitted_count: States handed in.
        sent_count: States given to a stream.
        overtaken_count: States dropped because newer ones came before they were sent; their events
            were carried over.
        refused_count: Submissions that were no `IterationState`; dropped.
        decisions_count: Decisions received.
        reconnects_count: Streams accepted after the first one.
    """

    submitted_count: int
    sent_count: int
    overtaken_count: int
    refused_count: int
    decisions_count: int
    reconnects_count: int


class ThrottleClient:
    """One engine's stream to the throttling service.

    A background thread owns the channel and the stream. States pass through a mailbox in which the
    newest wins: it replaces a plan or heartbeat that was not sent yet, whose request events travel
    with it. Completed iterations are not replaced but wait in a short line, because they teach the
    predictors; without a daemon none waits. After a reconnect the client registers again and tells
    the daemon of every unfinished request with its true age.

    Create it in the process that runs the scheduler: a stream does not survive a fork.
    """

    def __init__(
        self,
        registration: engine_pb2.EngineRegistration,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        channel_options: Sequence[tuple[str, object]] = (),
        backoff: ReconnectBackoff | None = None,
        carried_events_limit: int = CARRIED_EVENTS_LIMIT,
        completed_states_limit: int = COMPLETED_STATES_LIMIT,
        on_change: Callable[[], None] | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Start connecting in the background and return at once.

        Args:
            registration: Who the engine is; copied.
            target: gRPC target, such as `unix:///run/throttle/throttle.sock` or `localhost:7077`.
            credentials: TLS for TCP targets; plaintext without.
            token: Sent as `authorization: Bearer ...` with each stream.
            metadata: Further metadata of each stream.
            channel_options: Further gRPC channel options; they win over the client's own.
            backoff: Waits between tries.
            carried_events_limit: See `throttle.outbox.CARRIED_EVENTS_LIMIT`.
            completed_states_limit: See `throttle.outbox.COMPLETED_STATES_LIMIT`; 0 keeps only the
                newest state.
            on_change: Called on the client's threads after each decision, acceptance and end of a
                stream; must return at once.
            draw: Random numbers in [0, 1) for the jitter.

        Raises:
            TypeError: The registration is not an `EngineRegistration`.
            ValueError: It lacks an engine id or GPUs, or another argument is out of range.
        """
        if not isinstance(registration, engine_pb2.EngineRegistration):
            raise TypeError(
                f"registration is a {type(registration).__name__}; allowed: EngineRegistration"
            )
        if not registration.engine_id:
            raise ValueError("registration.engine_id is empty; allowed: 1 to 128 characters")
        if not registration.gpu_uuids:
            raise ValueError("registration.gpu_uuids is empty; allowed: at least one GPU UUID")
        if not target:
            raise ValueError(f"target is empty; allowed: a gRPC target such as {DEFAULT_TARGET}")
        self._registration = engine_pb2.EngineRegistration()
        self._registration.CopyFrom(registration)
        self._target = target
        self._credentials = credentials
        self._metadata = (*metadata, *((("authorization", f"Bearer {token}"),) if token else ()))
        self._options = _channel_options(target, channel_options)
        self._backoff = backoff if backoff is not None else ReconnectBackoff()
        self._on_change = on_change
        self._draw = draw

        # The lock guards what follows, up to the next condition. `submit` takes it by itself: a
        # condition's own methods are Python, and cost several times as much.
        self._lock = threading.RLock()
        self._mailbox = threading.Condition(self._lock)
        self._outbox = Outbox(carried_events_limit, completed_states_limit)
        self._stream_number = 0
        self._accepted: throttle_service_pb2.RegistrationAccepted | None = None
        self._call: grpc.Call | None = None
        self._closed = False
        self._submitted_count = 0
        self._sent_count = 0
        self._refused_count = 0
        self._accepted_count = 0
        self._last_error = ""

        self._answers = threading.Condition()  # guards the decisions
        self._latest_decision: decision_pb2.Decision | None = None
        self._decisions_count = 0

        self._thread = threading.Thread(target=self._run, name="throttle-client", daemon=True)
        self._thread.start()

    def submit(self, state: engine_pb2.IterationState) -> None:
        """Hand in a state; returns at once and never raises.

        The client owns the message from now on: do not change it. Its sequence number must be above
        the last one's and its engine time not below, or the daemon ends the stream.
        """
        try:
            if not isinstance(state, engine_pb2.IterationState):
                self._refused_count += 1
                return
            restart: grpc.Call | None = None
            with self._lock:
                if self._closed:
                    return
                self._submitted_count += 1
                if self._outbox.put(state, connected=self._accepted is not None):
                    restart = self._call
                self._mailbox.notify_all()
            if restart is not None:
                restart.cancel()
        except Exception:  # noqa: BLE001 - the engine's loop must never see an error of ours
            self._refused_count += 1

    @property
    def latest_decision(self) -> decision_pb2.Decision | None:
        """The newest decision of any stream; None before the first."""
        return self._latest_decision

    @property
    def connected(self) -> bool:
        """Whether a daemon has accepted the registration and the stream lives."""
        return self._accepted is not None

    @property
    def accepted(self) -> throttle_service_pb2.RegistrationAccepted | None:
        """The daemon's answer to the registration; None while not connected."""
        return self._accepted

    @property
    def last_error(self) -> str:
        """Why the last stream ended or could not start; empty when none has failed."""
        return self._last_error

    @property
    def statistics(self) -> ClientStatistics:
        """Counts since construction."""
        with self._mailbox:
            return ClientStatistics(
                submitted_count=self._submitted_count,
                sent_count=self._sent_count,
                overtaken_count=self._outbox.overtaken_count,
                refused_count=self._refused_count,
                decisions_count=self._decisions_count,
                reconnects_count=max(0, self._accepted_count - 1),
            )

    def wait_until_connected(self, timeout_seconds: float) -> bool:
        """Wait for a daemon to accept the registration; for tools, not for engines."""
        with self._mailbox:
            self._mailbox.wait_for(
                lambda: self._accepted is not None or self._closed, timeout_seconds
            )
            return self._accepted is not None

    def wait_until_sent(self, timeout_seconds: float) -> bool:
        """Wait until no state waits for the stream; for tools, not for engines."""
        with self._mailbox:
            self._mailbox.wait_for(lambda: self._outbox.empty or self._closed, timeout_seconds)
            return self._outbox.empty

    def wait_for_decision(
        self, sequence_number: int, timeout_seconds: float
    ) -> decision_pb2.Decision | None:
        """Wait for the answer to a state; for lock-step users such as a simulation.

        Returns:
            The first decision for this or a newer state; None after the timeout or `close`.
        """

        def answered() -> bool:
            latest = self._latest_decision
            return self._closed or (
                latest is not None and latest.sequence_number >= sequence_number
            )

        with self._answers:
            self._answers.wait_for(answered, timeout_seconds)
            latest = self._latest_decision
        if latest is None or latest.sequence_number < sequence_number:
            return None
        return latest

    def close(self, timeout_seconds: float = 2.0) -> None:
        """End the stream, which returns the GPUs to default clocks; further calls do nothing."""
        with self._mailbox:
            self._closed = True
            self._mailbox.notify_all()
        with self._answers:
            self._answers.notify_all()
        self._thread.join(timeout_seconds)  # the daemon answers the end of the stream by its own
        call = self._call
        if self._thread.is_alive() and call is not None:
            call.cancel()
            self._thread.join(timeout_seconds)

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    # Background thread.

    def _run(self) -> None:
        failures_count = 0
        while True:
            try:
                accepted = self._stream_once()
            except Exception as error:  # noqa: BLE001 - the thread must outlive any one stream
                accepted = False
                self._note_error(f"{type(error).__name__}: {error}")
            failures_count = 1 if accepted else failures_count + 1
            delay = self._backoff.delay_seconds(failures_count, self._draw())
            with self._mailbox:
                if self._mailbox.wait_for(lambda: self._closed, delay):
                    return

    def _stream_once(self) -> bool:
        with self._mailbox:
            if self._closed:
                return False
            self._stream_number += 1
            number = self._stream_number
        accepted = False
        channel = self._open_channel()
        try:
            call = throttle_service_pb2_grpc.ThrottleServiceStub(channel).StreamIterations(
                self._requests(number), metadata=self._metadata
            )
            self._call = call
            for response in call:
                if response.HasField("decision"):
                    self._receive(response.decision)
                elif response.HasField("accepted"):
                    accepted = True
                    self._accept(response.accepted)
            self._note_error("the daemon ended the stream")
        except grpc.RpcError:
            self._note_error(f"{call.code().name}: {call.details()}")
        finally:
            self._call = None
            self._disconnect()
            channel.close()
        return accepted

    def _open_channel(self) -> grpc.Channel:
        # a new channel for each try: an old one would wait out gRPC's own, longer backoff
        if self._credentials is None:
            return grpc.insecure_channel(self._target, options=self._options)
        return grpc.secure_channel(self._target, self._credentials, options=self._options)

    def _requests(
        self, stream_number: int
    ) -> Iterator[throttle_service_pb2.StreamIterationsRequest]:
        """Feed one stream; runs on a thread of gRPC's."""
        yield throttle_service_pb2.StreamIterationsRequest(registration=self._registration)
        first = True

        def due() -> bool:
            return (
                self._closed
                or self._stream_number != stream_number
                or (self._accepted is not None and not self._outbox.empty)
            )

        while True:
            with self._mailbox:
                self._mailbox.wait_for(due)
                if self._closed or self._stream_number != stream_number:
                    return
                self._sent_count += 1
                state = self._outbox.take(replay=first)
                if self._outbox.empty:
                    self._mailbox.notify_all()
            first = False
            yield throttle_service_pb2.StreamIterationsRequest(state=state)

    def _accept(self, accepted: throttle_service_pb2.RegistrationAccepted) -> None:
        with self._mailbox:
            self._accepted = accepted
            self._accepted_count += 1
            self._last_error = ""
            self._mailbox.notify_all()
        self._changed()
        _log.info("connected to %s as %s", self._target, accepted.registration_id)

    def _receive(self, decision: decision_pb2.Decision) -> None:
        with self._answers:
            self._latest_decision = decision
            self._decisions_count += 1
            self._answers.notify_all()
        self._changed()

    def _disconnect(self) -> None:
        with self._mailbox:
            self._accepted = None
            self._stream_number += 1  # ends the request iterator of the old stream
            self._outbox.disconnect()
            self._mailbox.notify_all()
        self._changed()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()

    def _note_error(self, text: str) -> None:
        if text != self._last_error and not self._closed:  # once, not at each try
            _log.warning("no throttling by %s: %s", self._target, text)
        self._last_error = text


def _channel_options(target: str, extra: Sequence[tuple[str, object]]) -> list[tuple[str, object]]:
    options: dict[str, object] = {
        "grpc.use_local_subchannel_pool": 1,  # no backoff shared with an earlier channel
        "grpc.max_receive_message_length": 16 * 1024 * 1024,
    }
    if target.startswith("unix"):
        options["grpc.enable_http_proxy"] = 0
    else:
        # a dead peer behind TCP shows in 15 seconds; the daemon permits this pace
        options["grpc.keepalive_time_ms"] = 10_000
        options["grpc.keepalive_timeout_ms"] = 5_000
        options["grpc.http2.max_pings_without_data"] = 0
    options.update(extra)
    return list(options.items())
