"""What one decision costs in process: state in, decision out, and where the time goes."""

from __future__ import annotations

import time
import tracemalloc
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import numpy as np

from throttle.bench.states import record
from throttle.bench.timing import Result, settled_collector, time_calls
from throttle.control import forecast, scoreboard
from throttle.control.controller import Controller
from throttle.control.settings import ControlSettings
from throttle.daemon.messages import StateReader
from throttle.simulation.messages import state_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from predictors.predictor import BundlePredictor
    from throttle.bench.states import Recorded
    from throttle.control.selection import Decision
    from throttle.v1 import engine_pb2

#: Decisions that are timed step by step, and whose allocations are traced.
_INSTRUMENTED_COUNT = 300


def bench_decision(
    predictor: BundlePredictor, requests_count: int, samples_count: int, pacing_seconds: float
) -> Iterator[Result]:
    """Time decisions on states that an engine with about so many requests says.

    Args:
        predictor: Of the shipped bundle.
        requests_count: Running requests, about.
        samples_count: Decisions timed in each case.
        pacing_seconds: Pace of the paced cases.
    """
    recorded = record(requests_count, samples_count, predictor)
    for pacing in (0.0, pacing_seconds):
        yield _timed("decision", recorded, predictor, requests_count, pacing)
        yield _timed("decision with parsing", recorded, predictor, requests_count, pacing)


def _timed(
    case: str,
    recorded: Recorded,
    predictor: BundlePredictor,
    requests_count: int,
    pacing_seconds: float,
) -> Result:
    engine = DecidingEngine(recorded, predictor, parsed=case == "decision with parsing")
    engine.settle()
    with settled_collector():
        times = time_calls(engine.calls(), pacing_seconds)
    p50, p99 = (float(each) for each in np.quantile(times.processor_seconds, (0.5, 0.99)))
    more: dict[str, Any] = {"processor_p50_seconds": p50, "processor_p99_seconds": p99}
    if not pacing_seconds:
        more |= _instrumented(recorded, predictor, parsed=case == "decision with parsing")
    return Result.of(
        case,
        times.seconds,
        requests_count=requests_count,
        clocks_count=len(predictor.clocks_mhz),
        pacing_seconds=pacing_seconds,
        more=more,
    )


class DecidingEngine:
    """A controller of its own and the states that it is to decide on, each once.

    Args:
        recorded: What the engine says.
        predictor: Predicts it.
        parsed: Start from messages as they come off the wire.
        at_once: In one compiled call, as a daemon decides; else step by step.
    """

    def __init__(
        self,
        recorded: Recorded,
        predictor: BundlePredictor,
        *,
        parsed: bool = False,
        at_once: bool = True,
    ) -> None:
        self._recorded = recorded
        self._controller = Controller(
            recorded.profile, predictor, ControlSettings(), at_once=at_once
        )
        self._reader = StateReader(recorded.profile)
        self._wire = [state_message(each).SerializeToString() for each in recorded.states]
        self._parsed = parsed

    def settle(self) -> None:
        """Decide on the states before those that count."""
        for index in range(self._recorded.settling_count):
            self._decide(index)

    def calls(self) -> Iterator[Callable[[], object]]:
        """One call per decision, in order."""
        recorded = self._recorded
        for index in range(recorded.settling_count, len(recorded.states)):
            yield partial(self._decide, index)

    def _decide(self, index: int) -> Decision:
        recorded = self._recorded
        state = recorded.states[index]
        if self._parsed:
            state = self._reader.read(_parse(self._wire[index]))
        controller = self._controller
        controller.observe(state, recorded.clocks_mhz[index], recorded.power_watts[index])
        return controller.decide(state)


def _parse(wire: bytes) -> engine_pb2.IterationState:
    from throttle.v1 import engine_pb2  # noqa: PLC0415 - after the stubs' runtime is chosen

    return engine_pb2.IterationState.FromString(wire)


def _instrumented(
    recorded: Recorded, predictor: BundlePredictor, *, parsed: bool
) -> dict[str, Any]:
    """Seconds of each step and memory allocated, medians over passes of their own.

    In one compiled call the steps between cannot be timed: theirs are of a pass step by step.
    """
    at_once = {
        "observe": (Controller, "observe"),
        "scoreboard": (scoreboard.Scoreboard, "apply"),
        "gathering": (forecast.Forecaster, "materials"),
        "decide": (Controller, "decide"),
        **({"parsing": (StateReader, "read")} if parsed else {}),
    }
    stepping = {
        "projection": (forecast.Forecaster, "project"),
        "prediction": (type(predictor), "predict"),
        "correction": (forecast.Forecaster, "_correct"),
        "slack": (forecast.Forecaster, "_slack"),
        "lateness": (forecast.Forecaster, "_lateness"),
        "decide, step by step": (Controller, "decide"),
    }
    medians: dict[str, float] = {}
    for steps in (at_once, stepping):
        engine = DecidingEngine(recorded, predictor, parsed=parsed, at_once=steps is at_once)
        medians |= _step_medians(engine, steps)
    engine = DecidingEngine(recorded, predictor, parsed=parsed)
    engine.settle()
    return {"step_p50_seconds": medians, "allocated_bytes": _allocated_bytes(engine)}


def _step_medians(engine: DecidingEngine, steps: dict[str, tuple[Any, str]]) -> dict[str, float]:
    engine.settle()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with _stopwatches(steps, seconds):
        for call, _ in zip(engine.calls(), range(_INSTRUMENTED_COUNT), strict=False):
            call()
    return {name: float(np.median(each)) for name, each in seconds.items() if each}


@contextmanager
def _stopwatches(
    steps: dict[str, tuple[Any, str]], seconds: dict[str, list[float]]
) -> Iterator[None]:
    """Have functions timed for a while, by what they are called."""
    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in steps.items()}
    for name, (owner, attribute) in steps.items():
        setattr(owner, attribute, _watched(originals[name], seconds[name]))
    try:
        yield
    finally:
        for name, (owner, attribute) in steps.items():
            setattr(owner, attribute, originals[name])


def _watched(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    @wraps(function)
    def watched(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - of any function
        started = time.perf_counter()
        result = function(*arguments, **named)
        seconds.append(time.perf_counter() - started)
        return result

    return watched


def _allocated_bytes(engine: DecidingEngine) -> float:
    """Most memory that one decision holds beyond what was there before, median."""
    peaks = []
    tracemalloc.start()
    try:
        for call, _ in zip(engine.calls(), range(_INSTRUMENTED_COUNT), strict=False):
            before, _peak = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            call()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return float(np.median(peaks))
