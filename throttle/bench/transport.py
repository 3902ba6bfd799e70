"""A state's way to a server and an answer's way back, with nothing decided in between.

Two servers echo: gRPC's threaded one, which the daemon uses, and its asyncio one with explicit
reads and writes, each in a process of its own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from throttle.bench.streams import Load, drive
from throttle.bench.timing import Result
from throttle.simulation.messages import registration_message, state_message
from throttle.v1 import decision_pb2, throttle_service_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from throttle.bench.states import Recorded

#: Threads or calls that a server has room for.
_CALLS_LIMIT = 256
_SERVERS = ("threaded", "asyncio")


def bench_transport(
    recorded: Recorded,
    requests_count: int,
    engines_counts: Sequence[int],
    pacing_seconds: float,
) -> Iterator[Result]:
    """Time echoes.

    Args:
        recorded: What each engine says.
        requests_count: Running requests in it, about.
        engines_counts: Engines at once, one case each.
        pacing_seconds: Pace of one engine in paced cases; with many engines, 50 states a second
            each at most.
    """
    context = multiprocessing.get_context("spawn")
    for kind in _SERVERS:
        with tempfile.TemporaryDirectory(prefix="throttle-bench-") as folder:
            target = f"unix:{Path(folder) / 'echo.sock'}"
            ready, stop = context.Event(), context.Event()
            server = context.Process(target=_serve, args=(kind, target, ready, stop), daemon=True)
            server.start()
            try:
                ready.wait(60.0)
                for count in engines_counts:
                    pace = pacing_seconds if count == 1 else max(pacing_seconds, 0.02)
                    for pacing in (0.0, pace):
                        load = load_of(recorded, target, count, pacing)
                        answers = drive(
                            replace(load, settling_count=min(20, len(load.states) // 4))
                        )
                        yield Result.of(
                            f"echo, {kind} server",
                            answers.seconds,
                            requests_count=requests_count,
                            pacing_seconds=pacing,
                            more={"engines_count": count},
                        )
            finally:
                stop.set()
                server.join(10.0)


def load_of(recorded: Recorded, target: str, engines_count: int, pacing_seconds: float) -> Load:
    """The recording as messages of so many engines, each with a GPU of its own."""
    registrations = []
    for index in range(engines_count):
        profile = replace(
            recorded.profile, engine_id=f"bench-{index}", gpu_uuids=(f"GPU-simulated-{index}",)
        )
        message = throttle_service_pb2.StreamIterationsRequest(
            registration=registration_message(profile)
        )
        registrations.append(message.SerializeToString())
    states = tuple(
        throttle_service_pb2.StreamIterationsRequest(state=state_message(state)).SerializeToString()
        for state in recorded.states
    )
    settling = recorded.settling_count
    return Load(target, tuple(registrations), states, settling, pacing_seconds)


def _serve(kind: str, target: str, ready: Any, stop: Any) -> None:  # noqa: ANN401 - of a context
    if kind == "asyncio":
        asyncio.run(_serve_asyncio(target, ready, stop))
        return
    server = grpc.server(ThreadPoolExecutor(_CALLS_LIMIT))
    server.add_generic_rpc_handlers((_handler(_echo),))
    server.add_insecure_port(target)
    server.start()
    ready.set()
    stop.wait()
    server.stop(0.0).wait()


async def _serve_asyncio(target: str, ready: Any, stop: Any) -> None:  # noqa: ANN401 - likewise
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_handler(_echo_asyncio),))
    server.add_insecure_port(target)
    await server.start()
    ready.set()
    await asyncio.get_running_loop().run_in_executor(None, stop.wait)
    await server.stop(0.0)


def _answer(
    request: throttle_service_pb2.StreamIterationsRequest,
) -> throttle_service_pb2.StreamIterationsResponse:
    """As large as a decision's; it also answers the registration."""
    return throttle_service_pb2.StreamIterationsResponse(
        decision=decision_pb2.Decision(
            sequence_number=request.state.sequence_number,
            target_clock_mhz=1980,
            predicted_iteration_seconds=0.012,
            predicted_power_watts=500.0,
        )
    )


def _handler(echo: Callable[..., Any]) -> grpc.GenericRpcHandler:
    """The stream's method alone, with the messages of the protocol."""
    method = grpc.stream_stream_rpc_method_handler(
        echo,
        request_deserializer=throttle_service_pb2.StreamIterationsRequest.FromString,
        response_serializer=throttle_service_pb2.StreamIterationsResponse.SerializeToString,
    )
    handlers = {"StreamIterations": method}
    return grpc.method_handlers_generic_handler("throttle.v1.ThrottleService", handlers)


def _echo(
    requests: Iterable[throttle_service_pb2.StreamIterationsRequest],
    _: grpc.ServicerContext,
) -> Iterator[throttle_service_pb2.StreamIterationsResponse]:
    for request in requests:
        yield _answer(request)


async def _echo_asyncio(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    # read by hand, which is faster than to iterate
    while (request := await context.read()) is not grpc.aio.EOF:
        await context.write(_answer(request))
