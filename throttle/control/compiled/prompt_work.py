"""`throttle.control.prompt_work.measure` compiled: each window is walked once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from throttle.control.compiled.compiler import compiled
from throttle.control.prompt_work import (
    LEAST_ITERATIONS,
    LEAST_SHARE,
    LEAST_SPREAD_RATIO,
    SAME_MOMENT_SECONDS,
    WINDOW_SECONDS,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


@compiled
def measure(
    starts: NDArray[np.float64],
    before: NDArray[np.float64],
    begins: NDArray[np.float64],
    weights: NDArray[np.float64],
    now_seconds: float,
) -> NDArray[np.float64]:
    """As `throttle.control.prompt_work.measure`."""
    figures = np.empty((len(WINDOW_SECONDS), 3))
    known = 0
    firsts, first = np.empty(len(begins), np.int64), 0  # the same for windows of every length
    for index in range(len(begins)):
        while first < len(starts) and starts[first] < begins[index] - SAME_MOMENT_SECONDS:
            first += 1
        firsts[index] = first
    for window in WINDOW_SECONDS:
        count, weight, share, total, squares = 0, 0.0, 0.0, 0.0, 0.0
        stop = 0
        for index in range(len(begins)):
            begin = begins[index]
            if begin + window > now_seconds:
                break
            while stop < len(starts) and starts[stop] < begin + window - SAME_MOMENT_SECONDS:
                stop += 1
            came = max(before[stop] - before[firsts[index]], 0.0)
            own = weights[index]
            count += 1
            weight += own
            if came > 0.0:
                share += own
                total += own * came
                squares += own * came * came
        if count < LEAST_ITERATIONS:
            break
        ratio = max(share / weight, LEAST_SHARE)
        mean = max(total / weight / ratio, 1.0)
        variance = squares / weight / ratio - mean * mean
        figures[known, 0] = ratio
        figures[known, 1] = mean
        figures[known, 2] = max(variance, (LEAST_SPREAD_RATIO * mean) ** 2)
        known += 1
    return figures[:known]
