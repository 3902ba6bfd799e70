"""The frequency sweep: every clock at once for the price of about one row.

For each shape every tree is walked once with the interval of clocks still alive. A split on the
clock that divides them takes both branches, each with its part. A leaf adds its value to a
difference array over the clocks, and a running sum gives the prediction at every clock. The
numbers are those of row-by-row prediction, up to the order of summation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.calibration import OLD_KV_RATIO
from predictors.compiled_features import build_features
from predictors.elementary import compiled, exponentials
from predictors.features import CLOCK_FEATURE
from predictors.forest import LEAF, MAXIMUM_DEPTH
from predictors.prediction import SHAPE_COLUMNS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHAPE_WIDTH = len(SHAPE_COLUMNS)

#: Rows that walk a tree together, marked by the bits of a number.
_ROWS_AT_ONCE = 32

#: Branches that may wait: one at each level of a tree.
_WAITING_LIMIT = MAXIMUM_DEPTH + 1

#: Where the clock ratios stand in a model.
_CLOCK_RATIOS = 2


@compiled
def predict_shapes(
    shapes: NDArray[np.float64], space: tuple[Any, ...], model: tuple[Any, ...]
) -> NDArray[np.float64]:
    """Latency, its bound and power of (K, 7) shapes, (3, K, C); (0, K, C) if one is not allowed.

    Args:
        shapes: What is computed, columns as in `SHAPE_COLUMNS`.
        space: `CompiledFeatures.arguments`.
        model: As `predict_rows` takes it.
    """
    constants, table, weights, features_count, parts_count = space
    rows_count, clocks_count = len(shapes), len(model[_CLOCK_RATIOS])
    if shapes.shape[1] != _SHAPE_WIDTH:
        return np.empty((0, rows_count, clocks_count))
    features = np.empty((features_count, rows_count), np.float32)
    weighed = np.empty((len(weights), rows_count))
    if not build_features(shapes, constants, table, weights, features, weighed):
        return np.empty((0, rows_count, clocks_count))
    phases = np.zeros(rows_count, np.intp)
    for row in range(rows_count):  # `phases_of`
        requests, tokens, old = shapes[row, 0], shapes[row, 1], shapes[row, 2]
        if tokens > 0.0:
            phases[row] = 2 if requests > 1.5 and old > OLD_KV_RATIO * tokens else 1
    found = np.empty((3, rows_count, clocks_count))
    predict_rows(features, weighed[:parts_count], weighed[parts_count:], phases, found, model)
    return found


@compiled
def shapes_covered(
    shapes: NDArray[np.float64], lowest: NDArray[np.float64], highest: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Whether `envelope_columns` of each of (K, 7) shapes lie within their ranges, (K,)."""
    inside = np.empty(len(shapes), np.bool_)
    for row in range(len(shapes)):
        covered = True
        for column in range(len(lowest)):
            if column < 6:
                value = shapes[row, column]
            elif column == 6:
                value = shapes[row, 1] + shapes[row, 5]
            else:
                value = shapes[row, 4] / max(shapes[row, 3], 1.0)
            covered = covered and lowest[column] <= value <= highest[column]
        inside[row] = covered
    return inside


@compiled
def predict_rows(
    features: NDArray[np.float32],
    parts: NDArray[np.float64],
    work: NDArray[np.float64],
    phases: NDArray[np.intp],
    found: NDArray[np.float64],
    model: tuple[Any, ...],
) -> None:
    """Fill latency, bound and power; rows that the walk can mark at once in turn.

    Args:
        features: Of each row, (F, K).
        parts: Of the analytic latency, (6, K).
        work: Of the analytic power, (kinds, K).
        phases: `phases_of` each row, (K,).
        found: Filled: seconds, their upper bound in seconds, watts, (3, K, C).
        model: `Forest.arguments` of latency and of power; clock ratios (C,); bound factors
            (phases, C); static watts (C,); work rates (kinds, C); power limit in watts.
    """
    (
        latency_forest,
        power_forest,
        clock_ratios,
        bound_factors,
        static_watts,
        work_rates,
        power_limit_watts,
    ) = model
    latency, upper, power = found[0], found[1], found[2]
    rows_count, clocks_count = latency.shape
    room = (clocks_count + 1) * min(rows_count, _ROWS_AT_ONCE)
    bits, base = np.empty(room, np.int64), np.empty(clocks_count)
    margins, factors = np.empty(room), np.empty(room)
    for first in range(0, rows_count, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, rows_count - first)
        size = clocks_count * count
        form = (clocks_count + 1, count)
        sums = margins[: size + count].reshape(form)
        ratios = factors[: size + count].reshape(form)
        _sweep(features, first, latency_forest, sums)
        exponentials(margins, bits, factors, size)
        _finish_latency(
            latency, upper, ratios, first, parts, clock_ratios, phases, bound_factors, base
        )
        _sweep(features, first, power_forest, sums)
        exponentials(margins, bits, factors, size)
        _finish_power(
            power, latency, ratios, first, work, static_watts, work_rates, power_limit_watts, base
        )


@compiled
def _sweep(
    features: NDArray[np.float32],
    first: int,
    forest: tuple[Any, ...],
    out: NDArray[np.float64],
) -> None:
    """Fill `out` (C + 1, rows) with the forest's sums for the rows from `first` on.

    The last row of `out` is where intervals that reach beyond the last clock end.
    """
    roots, nodes, base_score, thresholds, firsts = forest
    clocks_count, rows_count = len(out) - 1, out.shape[1]
    out[:] = 0.0
    # which rows go right at each threshold: a node then looks up what all its rows do
    rights = np.zeros(len(thresholds), np.int32)
    for feature in range(len(firsts) - 1):
        # slices: indices that may be negative keep the loop from becoming vector instructions
        steps = thresholds[firsts[feature] : firsts[feature + 1]]
        beyond = rights[firsts[feature] : firsts[feature + 1]]
        for row in range(rows_count):
            value, bit = features[feature, first + row], np.int32(1 << row)
            for place in range(len(steps)):
                beyond[place] = beyond[place] | bit if value >= steps[place] else beyond[place]
    waiting = np.empty(_WAITING_LIMIT, np.int32)
    marks = np.empty(_WAITING_LIMIT, np.int64)
    lows = np.empty(_WAITING_LIMIT, np.int32)
    highs = np.empty(_WAITING_LIMIT, np.int32)
    everyone = np.int64((1 << rows_count) - 1)
    for root in roots:
        waiting[0], marks[0], lows[0], highs[0] = root, everyone, 0, clocks_count
        left_over = 1
        while left_over:
            left_over -= 1
            index, mark = waiting[left_over], marks[left_over]
            low, high = lows[left_over], highs[left_over]
            split = nodes[index].feature
            while split != LEAF:
                left = nodes[index].left
                if split != CLOCK_FEATURE:
                    right = rights[nodes[index].cut] & mark
                    if right == 0:
                        index = left
                    elif right == mark:
                        index = left + 1
                    else:
                        waiting[left_over], marks[left_over] = left + 1, right
                        lows[left_over], highs[left_over] = low, high
                        left_over += 1
                        index, mark = left, mark ^ right
                else:
                    cut = nodes[index].cut
                    if cut >= high:
                        index = left
                    elif cut <= low:
                        index = left + 1
                    else:
                        waiting[left_over], marks[left_over] = left + 1, mark
                        lows[left_over], highs[left_over] = cut, high
                        left_over += 1
                        index, high = left, cut
                split = nodes[index].feature
            leaf = nodes[index].value
            for row in range(rows_count):
                added = leaf if (mark >> row) & 1 else np.float32(0.0)
                out[low, row] += added
                out[high, row] -= added
    for row in range(rows_count):
        out[0, row] += base_score
    for clock in range(1, clocks_count):
        for row in range(rows_count):
            out[clock, row] += out[clock - 1, row]


@compiled
def _finish_latency(
    latency: NDArray[np.float64],
    upper: NDArray[np.float64],
    factors: NDArray[np.float64],
    first: int,
    parts: NDArray[np.float64],
    clock_ratios: NDArray[np.float64],
    phases: NDArray[np.intp],
    bound_factors: NDArray[np.float64],
    base: NDArray[np.float64],
) -> None:
    """Turn factors (C, rows) into seconds and their bound; neither rises with clock."""
    clocks_count = len(clock_ratios)
    for row in range(factors.shape[1]):
        at = first + row
        flat, slope = parts[0, at], parts[1, at]
        memory_1, compute_1, memory_2, compute_2 = parts[2:, at]
        for clock in range(clocks_count):
            slowdown = 1.0 / clock_ratios[clock]
            base[clock] = (  # FittedBase.seconds
                flat
                + slope * slowdown
                + max(memory_1, compute_1 * slowdown)
                + max(memory_2, compute_2 * slowdown)
            )
        widths = bound_factors[phases[at]]
        slowest = slowest_bound = 0.0
        for clock in range(clocks_count - 1, -1, -1):
            slowest = max(slowest, base[clock] * factors[clock, row])
            slowest_bound = max(slowest_bound, slowest * widths[clock])
            latency[at, clock] = slowest
            upper[at, clock] = slowest_bound


@compiled
def _finish_power(
    power: NDArray[np.float64],
    latency: NDArray[np.float64],
    factors: NDArray[np.float64],
    first: int,
    work: NDArray[np.float64],
    static_watts: NDArray[np.float64],
    work_rates: NDArray[np.float64],
    power_limit_watts: float,
    base: NDArray[np.float64],
) -> None:
    """Turn factors (C, rows) into watts, never falling with clock, never above the limit."""
    clocks_count = len(static_watts)
    for row in range(factors.shape[1]):
        at = first + row
        base[:] = 0.0
        for kind in range(len(work)):  # PowerBase.watts
            done = work[kind, at]
            for clock in range(clocks_count):
                base[clock] += done * work_rates[kind, clock]
        for clock in range(clocks_count):
            watts = static_watts[clock] + base[clock] / latency[at, clock]
            base[clock] = min(watts, power_limit_watts)
        highest = 0.0
        for clock in range(clocks_count):
            watts = min(base[clock] * factors[clock, row], power_limit_watts)
            highest = max(highest, watts)
            power[at, clock] = highest
