"""`throttle.control.cruise.balance` compiled: each clock's bisection by itself.

Neighboring clocks settle close to each other, so their bisections begin with the same batches: what
a batch alone decides is kept from one clock to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from throttle.control.compiled.compiler import compiled
from throttle.control.cruise import BISECTIONS, LEAST_BATCH, PREFILL_BUSY_LIMIT, Balanced

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from predictors.prediction import Prediction
    from throttle.control.arrivals import OfferedLoad


def balance(
    grid: NDArray[np.float64],
    load: OfferedLoad,
    prediction: Prediction,
    idle_power_watts: NDArray[np.float64],
) -> Balanced:
    """As `throttle.control.cruise.balance`."""
    found = _balance(
        grid,
        np.ascontiguousarray(prediction.latency_seconds),
        np.ascontiguousarray(prediction.power_watts),
        float(load.prefill_iterations_per_second),
        float(load.decode_tokens_per_second),
        idle_power_watts,
    )
    return Balanced(*found)


@compiled
def _balance(
    grid: NDArray[np.float64],
    seconds: NDArray[np.float64],
    watts: NDArray[np.float64],
    prompts_per_second: float,
    tokens_per_second: float,
    idle_power_watts: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The fields of `Balanced`, (6, C)."""
    rows, clocks_count = len(grid), seconds.shape[1]
    found = np.empty((6, clocks_count))
    # of each step's batch, by the clock before
    middles, batches = np.full(BISECTIONS, np.nan), np.empty(BISECTIONS)
    places, shares = np.empty(BISECTIONS, np.int64), np.empty(BISECTIONS)
    least, most = np.log(LEAST_BATCH), np.log(grid[rows - 1])
    for clock in range(clocks_count):
        low, high = least, most
        for step in range(BISECTIONS):
            middle = 0.5 * (low + high)
            if middle != middles[step]:
                middles[step], batches[step] = middle, np.exp(middle)
                places[step], shares[step] = _place(grid, batches[step])
            batch, place, share = batches[step], places[step], shares[step]
            decode = _at(seconds, place, share, clock)
            mixed = _at(seconds, rows + place, share, clock)
            prefill = min(mixed * prompts_per_second, PREFILL_BUSY_LIMIT)
            rate = prompts_per_second + (1.0 - prefill) / decode
            if batch * rate < tokens_per_second:
                low = middle
            else:
                high = middle
        batch = np.exp(high)
        place, share = _place(grid, batch)
        decode = _at(seconds, place, share, clock)
        mixed = _at(seconds, rows + place, share, clock)
        prefill = mixed * prompts_per_second
        busy = prefill + (1.0 - prefill) * -np.expm1(-batch)
        found[0, clock] = batch
        within = min(prefill, PREFILL_BUSY_LIMIT)
        found[1, clock] = prompts_per_second + (1.0 - within) / decode
        found[2, clock] = prefill
        found[3, clock] = mixed
        found[4, clock] = busy
        found[5, clock] = (
            prefill * _at(watts, rows + place, share, clock)
            + (busy - prefill) * _at(watts, place, share, clock)
            + (1.0 - busy) * idle_power_watts[clock]
        )
    return found


@compiled
def _place(grid: NDArray[np.float64], batch: float) -> tuple[int, float]:
    """Row below the batch that is met while busy, and the share of the one above."""
    met = batch / -np.expm1(-max(batch, 1e-9))
    place = min(max(np.searchsorted(grid, met, side="right") - 1, 0), len(grid) - 2)
    share = (met - grid[place]) / (grid[place + 1] - grid[place])
    return place, min(max(share, 0.0), 1.0)


@compiled
def _at(table: NDArray[np.float64], place: int, share: float, clock: int) -> float:
    between: float = table[place, clock] * (1.0 - share) + table[place + 1, clock] * share
    return between
