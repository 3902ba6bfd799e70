"""The client for engines that live on an asyncio loop: the same client, with waits that yield.

`submit` never blocks in either face, so an engine that only submits and reads `latest_decision`
needs this one only for waiting and closing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from throttle.client import DEFAULT_TARGET, ClientStatistics, ReconnectBackoff, ThrottleClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    import grpc

    from throttle.v1 import decision_pb2, engine_pb2, throttle_service_pb2


class AsyncThrottleClient:
    """`ThrottleClient` for one asyncio loop; create it while that loop runs.

    Example:
        >>> async def serve(registration, states):
        ...     async with AsyncThrottleClient(registration) as client:
        ...         async for state in states:
        ...             client.submit(state)
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
    ) -> None:
        """Start connecting in the background; arguments and errors as of `ThrottleClient`.

        Raises:
            RuntimeError: No asyncio loop runs.
        """
        self._loop = asyncio.get_running_loop()
        self._change: asyncio.Future[None] = self._loop.create_future()
        self._client = ThrottleClient(
            registration,
            target,
            credentials=credentials,
            token=token,
            metadata=metadata,
            channel_options=channel_options,
            backoff=backoff,
            on_change=self._wake_threadsafe,
        )
        self._closed = False

    def submit(self, state: engine_pb2.IterationState) -> None:
        """Hand in a state; returns at once and never raises."""
        self._client.submit(state)

    @property
    def latest_decision(self) -> decision_pb2.Decision | None:
        """The newest decision of any stream; None before the first."""
        return self._client.latest_decision

    @property
    def connected(self) -> bool:
        """Whether a daemon has accepted the registration and the stream lives."""
        return self._client.connected

    @property
    def accepted(self) -> throttle_service_pb2.RegistrationAccepted | None:
        """The daemon's answer to the registration; None while not connected."""
        return self._client.accepted

    @property
    def last_error(self) -> str:
        """Why the last stream ended or could not start; empty when none has failed."""
        return self._client.last_error

    @property
    def statistics(self) -> ClientStatistics:
        """Counts since construction."""
        return self._client.statistics

    async def wait_until_connected(self, timeout_seconds: float) -> bool:
        """Wait for a daemon to accept the registration."""
        await self._wait(lambda: self.connected, timeout_seconds)
        return self.connected

    async def wait_for_decision(
        self, sequence_number: int, timeout_seconds: float
    ) -> decision_pb2.Decision | None:
        """The first decision for this or a newer state; None after the timeout or `close`."""

        def answer() -> decision_pb2.Decision | None:
            latest = self.latest_decision
            if latest is None or latest.sequence_number < sequence_number:
                return None
            return latest

        await self._wait(lambda: answer() is not None, timeout_seconds)
        return answer()

    async def decisions(self) -> AsyncIterator[decision_pb2.Decision]:
        """Decisions as they come, until `close`; a slow reader sees the newest only."""
        seen: decision_pb2.Decision | None = None
        while True:
            latest = self.latest_decision
            if latest is not None and latest is not seen:
                seen = latest
                yield latest
            elif self._closed:
                return
            else:
                await asyncio.shield(self._change)

    async def close(self, timeout_seconds: float = 2.0) -> None:
        """End the stream, which returns the GPUs to default clocks; further calls do nothing."""
        self._closed = True
        self._wake()
        await asyncio.to_thread(self._client.close, timeout_seconds)

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

    async def _wait(self, satisfied: Callable[[], bool], timeout_seconds: float) -> None:
        try:
            async with asyncio.timeout(timeout_seconds):
                while not satisfied() and not self._closed:
                    # shielded: a waiter that times out must not cancel the others' future
                    await asyncio.shield(self._change)
        except TimeoutError:
            return

    def _wake_threadsafe(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        change, self._change = self._change, self._loop.create_future()
        change.set_result(None)
