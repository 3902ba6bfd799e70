"""The clock of least long-run average power at the present load.

Serving is open-loop: requests keep arriving while an iteration runs, so a slower clock makes
batches larger, not the day longer. Each clock is therefore judged at the equilibrium it would
settle at: with N iterations per second, of which some compute prompts, the batch is B = output
tokens per second / N, and N follows from the predicted durations at that batch. Average power is
then busy-with-prompts * P_mixed + busy-with-decode * P_decode + idle * P_idle.

This replaces "lowest feasible clock", P*t and (P - P_idle)*t, each of which is right at one load
and wrong at another (docs/decisions/0002-long-run-average-power.md).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from predictors.prediction import SHAPE_COLUMNS, estimated_attention_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from predictors.prediction import Prediction
    from throttle.control.arrivals import OfferedLoad

#: Batches at which durations are predicted; between them they are interpolated.
_BATCH_GRID = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512.0])
#: The equilibrium batch is bisected between these, on a logarithmic scale, to within 0.01 %.
LEAST_BATCH = 1e-3
BISECTIONS = 18
#: A clock at which prompts alone keep the engine this busy has no equilibrium worth the name.
PREFILL_BUSY_LIMIT = 0.95
#: The engine must have room for the mean batch and so many standard deviations: a batch that finds
#: no room queues, and a queue at a clock that just carries the load does not go away.
_CROWD_DEVIATIONS = 2.0
#: Batches at which growth is looked for, about 3 % apart.
_GROWTH_BATCHES_COUNT = 192
#: The slope of average power over load is taken between the present load and this share of it.
_LESSER_LOAD_RATIO = 0.8
#: Bursts are planned for over about the time that a mean gap is judged over: 48 tokens.
_BURST_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class CarryingLimits:
    """What an equilibrium may not exceed.

    Attributes:
        batch_requests: Generating requests at once.
        kv_tokens: Tokens of context at once.
        tpot_seconds: Mean gap between tokens; infinite when not limited.
        ttft_seconds: Mean time to first token; infinite when not limited.
    """

    batch_requests: float
    kv_tokens: float
    tpot_seconds: float
    ttft_seconds: float


@dataclass(frozen=True, slots=True)
class Equilibrium:
    """What each clock settles at, (C,) each.

    Attributes:
        power_watts: Long-run average power of one GPU; infinite where the load is not carried.
        batch_requests: Mean number of generating requests.
        busy_ratio: Share of time in which something runs.
        tpot_seconds: Mean gap between tokens.
    """

    power_watts: NDArray[np.float64]
    batch_requests: NDArray[np.float64]
    busy_ratio: NDArray[np.float64]
    tpot_seconds: NDArray[np.float64]


def equilibrium_shapes(load: OfferedLoad, limits: CarryingLimits) -> NDArray[np.float64]:
    """Shapes whose prediction `settle` needs: decode iterations, then mixed ones, (2G, 7)."""
    grid = _grid(limits)
    decode = np.zeros((len(grid), len(SHAPE_COLUMNS)))
    decode[:, 3] = decode[:, 5] = grid
    decode[:, 4] = grid * load.context_tokens
    mixed = decode.copy()
    iterations = max(load.prefill_iterations_per_second, 1e-9)
    mixed[:, 0] = max(load.prefill_requests_per_iteration, 1.0)
    mixed[:, 1] = max(load.prefill_tokens_per_second / iterations, 1.0)
    mixed[:, 2] = load.prefill_kv_tokens_per_iteration
    mixed[:, 6] = estimated_attention_pairs(mixed[:, 0], mixed[:, 1], mixed[:, 2])
    return np.vstack([decode, mixed])


@dataclass(frozen=True, slots=True)
class Interruptions:
    """How much prompts that have not come yet will stretch the time between tokens.

    A generating request shares its iterations with the prompts of later arrivals, so that N
    iterations take longer than N decode iterations. With m prompt iterations per second, each
    `mixed - decode` seconds longer, time is stretched by 1 / (1 - m * (mixed - decode)).

    Attributes:
        batches: Batches of the table's rows, rising, (G,).
        ratios: Stretch at each batch and clock, 1 or more, (G, C).
        token_seconds: Time that a prompt token adds to an iteration, likewise.
    """

    batches: NDArray[np.float64]
    ratios: NDArray[np.float64]
    token_seconds: NDArray[np.float64]

    def stretch_ratio(self, batch: NDArray[np.float64]) -> NDArray[np.float64]:
        """Stretch at each of (K,) batches and every clock, (K, C)."""
        return self._at(self.ratios, batch)

    def prompt_token_seconds(self, batch: NDArray[np.float64]) -> NDArray[np.float64]:
        """Time that a prompt token adds at each of (K,) batches and every clock, (K, C)."""
        return self._at(self.token_seconds, batch)

    def _at(self, table: NDArray[np.float64], batch: NDArray[np.float64]) -> NDArray[np.float64]:
        grid = self.batches
        lower = np.clip(np.searchsorted(grid, batch, side="right") - 1, 0, len(grid) - 2)
        share = np.clip((batch - grid[lower]) / (grid[lower + 1] - grid[lower]), 0.0, 1.0)
        share = share[:, None]
        return table[lower] * (1.0 - share) + table[lower + 1] * share


def expect_interruptions(
    load: OfferedLoad, limits: CarryingLimits, prediction: Prediction, deviations: float
) -> Interruptions:
    """Stretch by later arrivals, with a margin for bursts.

    Args:
        load: What arrives.
        limits: As given to `equilibrium_shapes`.
        prediction: Of `equilibrium_shapes(load, limits)`.
        deviations: Standard deviations of the number of prompt iterations, over
            `_BURST_SECONDS`, that are planned for on top of the mean.
    """
    decode_seconds, mixed_seconds = np.split(prediction.latency_seconds, 2)
    rate = _burst_rate(load, deviations)
    added = np.maximum(mixed_seconds - decode_seconds, 0.0)
    share = np.minimum(rate * added, PREFILL_BUSY_LIMIT)
    iterations = max(load.prefill_iterations_per_second, 1e-9)
    tokens = max(load.prefill_tokens_per_second / iterations, 1.0)
    return Interruptions(_grid(limits), 1.0 / (1.0 - share), added / tokens)


class Balance(Protocol):
    """`balance`, or its compiled form."""

    def __call__(
        self,
        grid: NDArray[np.float64],
        load: OfferedLoad,
        prediction: Prediction,
        idle_power_watts: NDArray[np.float64],
    ) -> Balanced:
        """As `balance`."""
        ...


class Balanced(NamedTuple):
    """Where every clock's batch settles, whatever limits it breaks, (C,) each.

    Attributes:
        batch_requests: Mean number of generating requests.
        iterations_per_second: While something runs.
        prefill_share: Share of time that iterations with prompts take.
        mixed_seconds: Duration of one of those.
        busy_ratio: Share of time in which something runs.
        power_watts: Long-run average.
    """

    batch_requests: NDArray[np.float64]
    iterations_per_second: NDArray[np.float64]
    prefill_share: NDArray[np.float64]
    mixed_seconds: NDArray[np.float64]
    busy_ratio: NDArray[np.float64]
    power_watts: NDArray[np.float64]


def balance(
    grid: NDArray[np.float64],
    load: OfferedLoad,
    prediction: Prediction,
    idle_power_watts: NDArray[np.float64],
) -> Balanced:
    """Find the batch at which as many tokens are generated as arrive.

    Args:
        grid: Batches that were predicted, rising, (G,).
        load: What arrives.
        prediction: Of decode iterations at those batches, then of mixed ones, (2G, C).
        idle_power_watts: Power while nothing runs, (C,).
    """
    decode_seconds, mixed_seconds = np.split(prediction.latency_seconds, 2)
    decode_watts, mixed_watts = np.split(prediction.power_watts, 2)
    prompts_per_second = load.prefill_iterations_per_second

    def iterations_per_second(batch: NDArray[np.float64]) -> NDArray[np.float64]:
        at = _interpolation(grid, _while_busy(batch))
        prefill_share = np.minimum(at(mixed_seconds) * prompts_per_second, PREFILL_BUSY_LIMIT)
        return prompts_per_second + (1.0 - prefill_share) / at(decode_seconds)

    # Below the equilibrium more tokens arrive than the batch generates, above it fewer.
    low = np.full(decode_seconds.shape[1], np.log(LEAST_BATCH))
    high = np.full_like(low, np.log(grid[-1]))
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        batch = np.exp(middle)
        short = batch * iterations_per_second(batch) < load.decode_tokens_per_second
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    batch = np.exp(high)
    at = _interpolation(grid, _while_busy(batch))
    prefill_share = at(mixed_seconds) * prompts_per_second
    # Requests come and go independently: their number is Poisson, and idle time is exp(-mean).
    busy = prefill_share + (1.0 - prefill_share) * -np.expm1(-batch)
    power = (
        prefill_share * at(mixed_watts)
        + (busy - prefill_share) * at(decode_watts)
        + (1.0 - busy) * idle_power_watts
    )
    rate = iterations_per_second(batch)
    return Balanced(batch, rate, prefill_share, at(mixed_seconds), busy, power)


def settle(
    load: OfferedLoad,
    limits: CarryingLimits,
    prediction: Prediction,
    idle_power_watts: NDArray[np.float64],
    *,
    balanced: Balance = balance,
) -> Equilibrium:
    """Find the equilibrium of every clock.

    Args:
        load: What arrives.
        limits: What may not be exceeded.
        prediction: Of `equilibrium_shapes(load, limits)`.
        idle_power_watts: Power while nothing runs, if this clock is the cruise clock, (C,).
        balanced: `balance`, or its compiled form.
    """
    grid = _grid(limits)
    found = balanced(grid, load, prediction, idle_power_watts)
    waiting = 1.0 - np.minimum(found.prefill_share, PREFILL_BUSY_LIMIT)
    carried = (
        (found.prefill_share < PREFILL_BUSY_LIMIT)
        & (found.batch_requests < 0.999 * grid[-1])
        & _has_room(found.batch_requests, load, limits)
        & (found.iterations_per_second * limits.tpot_seconds >= 1.0)
        & (found.mixed_seconds <= limits.ttft_seconds * waiting)
    )
    power = np.where(carried, found.power_watts, np.inf)
    gap_seconds = 1.0 / found.iterations_per_second
    return Equilibrium(power, found.batch_requests, found.busy_ratio, gap_seconds)


def growth_limit_ratio(
    load: OfferedLoad, limits: CarryingLimits, latency_seconds: NDArray[np.float64]
) -> float:
    """How many times the load one clock would carry: 1 for just this one, 0 for none at all.

    At a batch of B requests, prompts and answers of f times the load are carried where
    B N(B) = f D with N(B) = f m + (1 - f m t_mixed) / t_decode iterations per second: solved for f
    at every batch, the largest that keeps every limit is the answer.

    Args:
        load: What arrives: m prompt iterations and D output tokens per second.
        limits: What may not be exceeded.
        latency_seconds: Of `equilibrium_shapes(load, limits)` at that clock, (2G,).
    """
    grid = _grid(limits)
    batch = _growth_batches(float(grid[0]), float(grid[-1]))
    decode_seconds, mixed_seconds = (
        np.interp(batch, grid, half) for half in np.split(latency_seconds, 2)
    )
    prompts = load.prefill_iterations_per_second
    wanted = load.decode_tokens_per_second + batch * prompts * (mixed_seconds / decode_seconds - 1)
    ratio = batch / decode_seconds / np.maximum(wanted, 1e-9)
    prefill_share = ratio * prompts * mixed_seconds
    rate = ratio * prompts + (1.0 - prefill_share) / decode_seconds
    kept = (
        (prefill_share < PREFILL_BUSY_LIMIT)
        & _has_room(batch, load, limits)
        & (rate * limits.tpot_seconds >= 1.0)
        & (mixed_seconds <= limits.ttft_seconds * (1.0 - prefill_share))
    )
    return float(ratio[kept].max(initial=0.0))


@functools.cache
def _growth_batches(least: float, most: float) -> NDArray[np.float64]:
    return np.geomspace(least, most, _GROWTH_BATCHES_COUNT)


def _has_room(
    batch: NDArray[np.float64], load: OfferedLoad, limits: CarryingLimits
) -> NDArray[np.bool_]:
    crowd = batch + _CROWD_DEVIATIONS * np.sqrt(batch * load.dispersion_ratio)
    return (crowd < limits.batch_requests) & (crowd * load.context_tokens < limits.kv_tokens)


def refund_watts(
    load: OfferedLoad,
    limits: CarryingLimits,
    prediction: Prediction,
    equilibrium: Equilibrium,
    idle_power_watts: NDArray[np.float64],
    *,
    balanced: Balance = balance,
) -> float:
    """What a second more is worth: the rate at which time is refunded to a slower clock.

    Serving is a semi-Markov process: the best action minimizes P t - (g - c r) t, with g the least
    average power at load r and c = dg/dr, what a unit of work costs at the margin. The tangent's
    intercept g - c r is idle power where the engine is mostly idle, and far more where it never is.

    Args:
        load: What arrives.
        limits: What may not be exceeded.
        prediction: Of `equilibrium_shapes(load, limits)`.
        equilibrium: Of this load.
        idle_power_watts: As given to `settle`.
        balanced: Likewise.

    Returns:
        Watts of one GPU, between the least idle power and the least average power.
    """
    lesser = replace(
        load,
        prefill_tokens_per_second=load.prefill_tokens_per_second * _LESSER_LOAD_RATIO,
        prefill_iterations_per_second=load.prefill_iterations_per_second * _LESSER_LOAD_RATIO,
        decode_tokens_per_second=load.decode_tokens_per_second * _LESSER_LOAD_RATIO,
    )
    least = float(equilibrium.power_watts.min())
    if not math.isfinite(least):
        return float(idle_power_watts.min())
    settled = settle(lesser, limits, prediction, idle_power_watts, balanced=balanced)
    less = float(settled.power_watts.min())
    intercept = least - (least - less) / (1.0 - _LESSER_LOAD_RATIO)
    return min(max(intercept, float(idle_power_watts.min())), least)


def _burst_rate(load: OfferedLoad, deviations: float) -> float:
    """Prompt iterations per second in a burst so many standard deviations above the mean."""
    mean = load.prefill_iterations_per_second
    return mean + deviations * math.sqrt(mean * load.dispersion_ratio / _BURST_SECONDS)


def _grid(limits: CarryingLimits) -> NDArray[np.float64]:
    return _BATCH_GRID[max(limits.batch_requests, 2.0) >= _BATCH_GRID]


def _while_busy(batch: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of a Poisson number given that it is not zero."""
    given: NDArray[np.float64] = batch / -np.expm1(-np.maximum(batch, 1e-9))
    return given


def _interpolation(
    grid: NDArray[np.float64], batch: NDArray[np.float64]
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Interpolate (G, C) tables at one batch per clock, linearly, clipped to the grid."""
    lower = np.clip(np.searchsorted(grid, batch, side="right") - 1, 0, len(grid) - 2)
    share = np.clip((batch - grid[lower]) / (grid[lower + 1] - grid[lower]), 0.0, 1.0)
    columns = np.arange(len(batch))

    def at(table: NDArray[np.float64]) -> NDArray[np.float64]:
        return table[lower, columns] * (1.0 - share) + table[lower + 1, columns] * share

    return at
