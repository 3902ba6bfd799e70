"""Engines' streams as a load: each sends its states, at a pace or as soon as it is answered."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import queue
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from throttle.errors import ThrottleError
from throttle.v1 import throttle_service_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    _Call = grpc.aio.StreamStreamCall[bytes, throttle_service_pb2.StreamIterationsResponse]

_METHOD = "/throttle.v1.ThrottleService/StreamIterations"
_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
#: Longest wait for an answer before a stream counts as stuck.
_STUCK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """What engines send.

    Attributes:
        target: gRPC target of the server.
        registrations: First message of each engine, as bytes.
        states: What every engine sends after it, as bytes, numbered from 1 on.
        settling_count: How many of the first are sent as fast as they are answered, not timed.
        pacing_seconds: Time between two states of one engine; 0 sends when answered.
    """

    target: str
    registrations: tuple[bytes, ...]
    states: tuple[bytes, ...]
    settling_count: int
    pacing_seconds: float


@dataclass(frozen=True, slots=True)
class Answers:
    """How it went.

    Attributes:
        seconds: From handing a state to gRPC until the answer that covers it was there.
        overtaken_count: States answered only together with a newer one.
        unanswered_count: Engines whose newest state was not answered.
    """

    seconds: tuple[float, ...]
    overtaken_count: int = 0
    unanswered_count: int = 0


def drive_one(load: Load) -> Answers:
    """One engine, in this process, by the blocking client that engines use.

    Raises:
        ThrottleError: The server refuses it.
    """
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    clock = time.perf_counter
    seconds = []
    with grpc.insecure_channel(load.target, options=_OPTIONS) as channel:
        call = channel.stream_stream(
            _METHOD,
            request_serializer=_as_it_is,
            response_deserializer=throttle_service_pb2.StreamIterationsResponse.FromString,
        )(iter(outgoing.get, None), timeout=_STUCK_SECONDS + len(load.states))
        try:
            outgoing.put(load.registrations[0])
            next(call)
            due = clock()
            for index, state in enumerate(load.states):
                timed = index >= load.settling_count
                if timed and load.pacing_seconds:
                    due = max(due + load.pacing_seconds, clock())
                    time.sleep(due - clock() if due > clock() else 0.0)
                started = clock()
                outgoing.put(state)
                next(call)
                if timed:
                    seconds.append(clock() - started)
            outgoing.put(None)
        except grpc.RpcError as error:
            raise ThrottleError(f"the server at {load.target} ended the stream: {error}") from None
    return Answers(tuple(seconds))


def _as_it_is(message: bytes) -> bytes:
    return message


def drive(load: Load) -> Answers:
    """All engines at once, from a process of their own.

    Raises:
        ThrottleError: The server refuses one.
    """
    if len(load.registrations) == 1:
        return drive_one(load)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_drive, (load,))


def _drive(load: Load) -> Answers:
    return asyncio.run(_drive_all(load))


async def _drive_all(load: Load) -> Answers:
    ready = asyncio.Barrier(len(load.registrations))
    spread = load.pacing_seconds / len(load.registrations)
    try:
        answers = await asyncio.gather(
            *(
                _Engine(load, registration, index * spread).run(ready)
                for index, registration in enumerate(load.registrations)
            )
        )
    except grpc.RpcError as error:
        raise ThrottleError(f"the server at {load.target} ended a stream: {error}") from None
    return Answers(
        tuple(second for each in answers for second in each.seconds),
        sum(each.overtaken_count for each in answers),
        sum(each.unanswered_count for each in answers),
    )


class _Engine:
    """One stream of many, with a channel of its own.

    Args:
        load: What is sent.
        registration: First message.
        offset_seconds: Engines do not send at the same moment.
    """

    def __init__(self, load: Load, registration: bytes, offset_seconds: float) -> None:
        self._load = load
        self._registration = registration
        self._offset_seconds = offset_seconds
        self._sent: dict[int, float] = {}
        self._seconds: list[float] = []
        self._overtaken_count = 0

    async def run(self, ready: asyncio.Barrier) -> Answers:
        """Register, settle with all others, then send."""
        load = self._load
        async with grpc.aio.insecure_channel(load.target, options=_OPTIONS) as channel:
            call: _Call = channel.stream_stream(
                _METHOD,
                request_serializer=_as_it_is,
                response_deserializer=throttle_service_pb2.StreamIterationsResponse.FromString,
            )()
            await call.write(self._registration)
            await call.read()
            for state in load.states[: load.settling_count]:
                await call.write(state)
                await call.read()
            await ready.wait()
            numbered = list(enumerate(load.states, start=1))[load.settling_count :]
            if load.pacing_seconds:
                reading = asyncio.create_task(self._read(call, numbered[-1][0]))
                await self._send_paced(call, numbered)
                with contextlib.suppress(TimeoutError):  # then its newest state is not answered
                    await asyncio.wait_for(reading, _STUCK_SECONDS)
            else:
                for number, state in numbered:
                    self._sent[number] = time.perf_counter()
                    await call.write(state)
                    self._note(await call.read())
            await call.done_writing()
        return Answers(tuple(self._seconds), self._overtaken_count, int(bool(self._sent)))

    async def _send_paced(
        self,
        call: _Call,
        numbered: Sequence[tuple[int, bytes]],
    ) -> None:
        due = time.perf_counter() + self._offset_seconds
        for number, state in numbered:
            due += self._load.pacing_seconds
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            self._sent[number] = time.perf_counter()
            await call.write(state)

    async def _read(
        self,
        call: _Call,
        last: int,
    ) -> None:
        number = 0
        while number < last:
            answer = await call.read()
            if answer is grpc.aio.EOF:
                return
            number = self._note(answer)

    def _note(self, answer: object) -> int:
        """An answer covers its state and all that came before it; returns its number."""
        now = time.perf_counter()
        if not isinstance(answer, throttle_service_pb2.StreamIterationsResponse):
            raise ThrottleError(f"the server at {self._load.target} ended a stream")
        number = answer.decision.sequence_number
        for each in self._covered(number):
            self._overtaken_count += each < number
            self._seconds.append(now - self._sent.pop(each))
        return number

    def _covered(self, number: int) -> Iterator[int]:
        yield from [each for each in self._sent if each <= number]
