"""A guard against slower decisions that does not depend on how fast the machine is.

Decisions and a fixed computation of the same kind (small arrays, a dictionary, an exponential) are
timed in turn, so that whatever slows one slows the other, and only their ratio counts.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from throttle.bench.decision import DecidingEngine
from throttle.bench.reference import Reference
from throttle.bench.states import record
from throttle.bench.timing import settled_collector

if TYPE_CHECKING:
    from collections.abc import Callable

    from predictors.predictor import BundlePredictor

#: Requests in the engine that is decided for.
REQUESTS_COUNT = 64


def decision_ratio(predictor: BundlePredictor, samples_count: int) -> float:
    """Median time of a decision over that of the reference computation, timed in turn.

    Args:
        predictor: Of the shipped bundle.
        samples_count: Pairs that are timed.
    """
    engine = DecidingEngine(record(REQUESTS_COUNT, samples_count, predictor), predictor)
    engine.settle()
    decisions, references = [], []
    reference = Reference()
    with settled_collector():
        for call in engine.calls():
            references.append(_seconds(reference.compute))
            decisions.append(_seconds(call))
    return float(np.median(decisions) / np.median(references))


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
