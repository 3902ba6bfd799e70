"""How many segments a horizon needs: clocks and broken limits against an exact projection.

The states are those of a simulated engine that serves a real trace, taken where a limit binds. Each
is judged with horizons of one length cut into few or many segments, by the controller's own steps,
without hysteresis. Exact is one segment per iteration, in which no request ends.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.bench.states import PLANT
from throttle.control import projection
from throttle.control.controller import Controller
from throttle.control.selection import Reason
from throttle.control.settings import ControlSettings
from throttle.control.state import Slos
from throttle.simulation.engine import SimulatedEngine
from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.plant import Plant
from throttle.simulation.workload import OpenLoop, load_trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from predictors.predictor import BundlePredictor
    from throttle.control.state import IterationState

#: Iterations that every horizon spans, as that of the controller does.
HORIZON_ITERATIONS = sum(projection.DECODE_SEGMENT_ITERATIONS)
_TRACE = "azure2023_conv_10min"
#: Chosen so that the mean gap's limit binds through much of the trace.
_SLOS = Slos(ttft_seconds=1.0, tpot_seconds=0.022)
_COMPRESSION_RATIO = 3.0
#: Of the states where a limit binds, each so many-th is judged.
_STRIDE = 5


@dataclass(frozen=True, slots=True)
class SegmentCount:
    """What so many decode segments come to, against one per iteration.

    Attributes:
        segments_count: Decode segments of a full horizon.
        states_count: States judged.
        same_clock_ratio: Share in which the clock is that of the exact projection.
        mean_gap_mhz: Mean distance from the exact clock.
        violation_ratio: Share in which the clock breaks a limit by the exact projection, though
            some clock keeps them all.
    """

    segments_count: int
    states_count: int
    same_clock_ratio: float
    mean_gap_mhz: float
    violation_ratio: float


def segment_lengths(segments_count: int) -> tuple[int, ...]:
    """Lengths that grow by a constant factor, at least 1, and fill the horizon."""
    usual = projection.DECODE_SEGMENT_ITERATIONS
    if segments_count == len(usual):
        return usual  # those that serve
    if segments_count >= HORIZON_ITERATIONS:
        return (1,) * HORIZON_ITERATIONS
    low, high = 1.0, 4.0
    for _ in range(60):  # the factor at which they fill it
        factor = 0.5 * (low + high)
        reached = sum(_grown(segments_count, factor))
        low, high = (factor, high) if reached < HORIZON_ITERATIONS else (low, factor)
    lengths = list(_grown(segments_count, low))
    lengths[-1] += HORIZON_ITERATIONS - sum(lengths)
    return tuple(lengths)


def judge_segment_counts(
    predictor: BundlePredictor, counts: Sequence[int], states_count: int, seed: int = 1
) -> list[SegmentCount]:
    """Compare segment counts.

    Args:
        predictor: Of the shipped bundle.
        counts: Decode segments of a full horizon.
        states_count: States to judge, at most.
        seed: Of chip and noise.
    """
    chosen: dict[int, list[int]] = {count: [] for count in counts}
    broken: dict[int, int] = dict.fromkeys(counts, 0)
    exact: list[int] = []
    clocks = predictor.clocks_mhz
    for controller, state in _binding_states(predictor, states_count, seed):
        kept, cost = _judged(controller, state, HORIZON_ITERATIONS)
        best = _best(kept, cost)
        exact.append(best)
        for count in counts:
            own, own_cost = _judged(controller, state, count)
            index = _best(own, own_cost)
            chosen[count].append(index)
            broken[count] += bool(kept.any() and not kept[index])
    reference = clocks[np.array(exact)]
    return [
        SegmentCount(
            count,
            len(exact),
            float(np.mean(clocks[np.array(chosen[count])] == reference)),
            float(np.mean(np.abs(clocks[np.array(chosen[count])] - reference))),
            broken[count] / len(exact),
        )
        for count in counts
    ]


def _grown(segments_count: int, factor: float) -> tuple[int, ...]:
    return tuple(max(1, round(factor**index)) for index in range(segments_count))


def _binding_states(
    predictor: BundlePredictor, states_count: int, seed: int
) -> Iterator[tuple[Controller, IterationState]]:
    """States that a limit decides, with the controller that has seen all before them."""
    lock = InProcessLock()
    generator = random.Random(seed)  # noqa: S311 - simulated
    gpu = SimulatedGpu(Plant.load(PLANT), lock, DiscardedTelemetry(), generator)
    trace = load_trace(_TRACE).compressed(_COMPRESSION_RATIO)
    engine = SimulatedEngine(gpu, OpenLoop(trace.requests))
    profile = engine.profile("bench", ("GPU-simulated-0",), _SLOS)
    controller = Controller(profile, predictor, ControlSettings(), compiled=False)
    found = 0
    for number, state in enumerate(engine.run()):
        controller.observe(state, gpu.clock_mhz)
        decision = controller.decide(state)
        lock.set_mhz(decision.target_clock_mhz)
        busy = decision.predicted_iteration_seconds > 0.0 and decision.cruise_clock_mhz > 0
        binds = busy and decision.reason in {Reason.SLACK, Reason.HELD, Reason.INFEASIBLE}
        if binds and number % _STRIDE == 0:
            yield controller, state
            found += 1
            if found == states_count:
                return


def _judged(
    controller: Controller, state: IterationState, segments_count: int
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which clocks keep every limit, and what each costs."""
    with _decode_segments(segment_lengths(segments_count)):
        return controller.judge(state)


def _best(kept: NDArray[np.bool_], cost: NDArray[np.float64]) -> int:
    return int(np.argmin(np.where(kept, cost, np.inf))) if kept.any() else len(kept) - 1


@contextmanager
def _decode_segments(lengths: tuple[int, ...]) -> Iterator[None]:
    """Have the definition of the projection cut its horizon so."""
    usual = projection.DECODE_SEGMENT_ITERATIONS
    projection.DECODE_SEGMENT_ITERATIONS = lengths  # type: ignore[assignment]
    try:
        yield
    finally:
        projection.DECODE_SEGMENT_ITERATIONS = usual
