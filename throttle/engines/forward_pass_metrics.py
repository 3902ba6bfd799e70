"""ForwardPassMetrics as states: what SGLang, Dynamo and vLLM under Dynamo publish for each pass.

The schema is that of Dynamo's `dynamo.common.forward_pass_metrics` and SGLang's
`sglang.srt.observability.forward_pass_metrics`, version 1, in MessagePack with field names. It is
sent after the pass.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import msgspec

from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Version of the schema that is understood.
VERSION: Final = 1

_SCHEDULED: Final = tuple(
    field.name
    for field in engine_pb2.ScheduledRequests.DESCRIPTOR.fields
    if field.name != "num_decode_tokens"
)
_QUEUED: Final = tuple(field.name for field in engine_pb2.QueuedRequests.DESCRIPTOR.fields)

_log = logging.getLogger("throttle.engines")


class ForwardPassReader:
    """Turns messages of one worker and rank into states.

    Args:
        timing_source: How the publisher measures `wall_time`.
        worker_id: Whose messages count; empty takes the first worker that is heard.
        dp_rank: Which data-parallel rank counts.
    """

    def __init__(
        self,
        timing_source: engine_pb2.TimingSource.ValueType,
        worker_id: str = "",
        dp_rank: int = 0,
    ) -> None:
        self._timing_source = timing_source
        self._worker_id = worker_id
        self._dp_rank = dp_rank
        self._last_counter = 0
        self._refusals: set[str] = set()
        self.messages_count = 0
        self.missed_count = 0
        self.refused_count = 0

    def read(self, payload: bytes) -> engine_pb2.IterationState | None:
        """One message.

        Returns:
            The completed pass; None for an idle heartbeat, for another worker's message, and for
            what cannot be read, which is counted and logged once.
        """
        try:
            message = msgspec.msgpack.decode(payload)
            version = message.get("version", VERSION)
            if version != VERSION:
                self._refuse(f"version {version}; understood: {VERSION}")
                return None
            worker, rank = str(message.get("worker_id", "")), int(message.get("dp_rank", 0))
            self._worker_id = self._worker_id or worker
            if worker != self._worker_id:
                self._refuse(f"worker {worker!r}; heard is {self._worker_id!r}")
                return None
            if rank != self._dp_rank:
                return None
            self._count(int(message.get("counter_id", 0)))
            return self._state(message)
        except (msgspec.DecodeError, AttributeError, TypeError, ValueError) as error:
            self._refuse(f"{type(error).__name__}: {error}")
            return None

    def _state(self, message: dict[str, Any]) -> engine_pb2.IterationState | None:
        seconds = float(message.get("wall_time", 0.0))
        scheduled = message.get("scheduled_requests") or {}
        if not seconds > 0.0:
            return None
        state = engine_pb2.IterationState(
            phase=engine_pb2.ITERATION_PHASE_COMPLETED,
            iteration_duration_seconds=seconds,
            timing_source=self._timing_source,
        )
        _fill(state.scheduled, scheduled, _SCHEDULED)
        _fill(state.queued, message.get("queued_requests") or {}, _QUEUED)
        return state

    def _count(self, counter: int) -> None:
        self.messages_count += 1
        if counter > self._last_counter + 1 and self._last_counter:
            self.missed_count += counter - self._last_counter - 1
        self._last_counter = counter

    def _refuse(self, why: str) -> None:
        self.refused_count += 1
        if why not in self._refusals and len(self._refusals) < 16:
            self._refusals.add(why)
            _log.warning("a ForwardPassMetrics message is left out: %s", why)


def _fill(
    target: engine_pb2.ScheduledRequests | engine_pb2.QueuedRequests,
    source: dict[str, Any],
    names: tuple[str, ...],
) -> None:
    for name in names:
        value = source.get(name, 0)
        if name.startswith("var_"):
            setattr(target, name, max(float(value), 0.0))
        else:
            setattr(target, name, max(int(value), 0))


def zmq_payloads(endpoint: str, poll_seconds: float = 0.5) -> Iterator[bytes | None]:
    """Messages published on a ZMQ socket: topic, sequence, payload; None after a silent poll.

    Args:
        endpoint: Such as `tcp://127.0.0.1:20380` or `ipc:///tmp/fpm.0`.
        poll_seconds: Longest wait for one message.
    """
    import zmq  # noqa: PLC0415 - a source of its own; Dynamo's needs none

    context = zmq.Context()
    try:
        with context.socket(zmq.SUB) as socket:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.setsockopt(zmq.RCVHWM, 10_000)
            socket.connect(endpoint)
            while True:
                if not socket.poll(int(poll_seconds * 1000)):
                    yield None
                    continue
                frames = socket.recv_multipart()
                if frames:
                    yield frames[-1]
    finally:
        context.destroy(linger=0)


def dynamo_payloads(endpoint: str, discovery: str, request_plane: str) -> Iterator[bytes | None]:
    """Messages of every worker behind a Dynamo endpoint, from its event plane.

    Needs Dynamo in this environment; its client is not a network protocol of its own.

    Args:
        endpoint: `namespace.component.endpoint`, such as `dynamo.backend.generate`.
        discovery: Dynamo's discovery backend: etcd, file or kubernetes.
        request_plane: Dynamo's request plane: nats, tcp or http.
    """
    import asyncio  # noqa: PLC0415

    from dynamo.llm import FpmEventSubscriber  # noqa: PLC0415
    from dynamo.runtime import DistributedRuntime  # noqa: PLC0415

    loop = asyncio.new_event_loop()
    runtime = DistributedRuntime(loop, discovery, request_plane)
    subscriber = FpmEventSubscriber(runtime.endpoint(endpoint))
    try:
        while (payload := subscriber.recv()) is not None:
            yield payload
    finally:
        subscriber.shutdown()
        runtime.shutdown()
        loop.close()
