"""Fits the operators' equations to measured times, at the clock that each kernel really had."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from throttle.simulation.power import bandwidth_ratio, small_tile_weight, voltage_ratio

if TYPE_CHECKING:
    from collections.abc import Callable

    from throttle.simulation.benchmark import Benchmark
    from throttle.simulation.equations import Numbers
    from throttle.simulation.parameters import GpuParameters

#: Share of fixed time that follows the clock, for kernels that the cap slowed: assumed.
_FIXED_SENSITIVITY = 0.5
_ROBUST_SCALE = 0.1  # residuals beyond this (10 %) count linearly
_OFFSET_DAMPING = 1e-2


def clock_ratios(benchmark: Benchmark, constants: Any, gpu: GpuParameters) -> Numbers:  # noqa: ANN401
    """The clock each kernel had, over the maximum: less than 1 where the power cap held it.

    Achieved bytes/s and FLOP/s follow from the measured time, so the power equation gives the
    highest supported clock at which they keep the limit, without any model of latency.

    Args:
        benchmark: The kernels.
        constants: Of their equation (only counts of bytes and FLOPs are taken from it).
        gpu: Power, limit and clocks.

    Returns:
        Ratios, shape (N,).
    """
    parts, power = benchmark.parts(constants, gpu), gpu.power
    rate = parts.traffic_bytes / benchmark.seconds / gpu.memory.bandwidth_bytes_per_second
    tensor = parts.tensor_seconds / benchmark.seconds
    if benchmark.section == "gemm":
        tensor = tensor * small_tile_weight(power, benchmark.axis)
    busy = power.busy_watts * (
        power.dequantization_ratio if benchmark.formats[:1] == ("mxfp4",) else 1
    )
    result = np.full(len(rate), gpu.clocks.minimum_mhz / gpu.clocks.maximum_mhz)
    for clock in gpu.clocks.clocks_mhz():
        x = clock / gpu.clocks.maximum_mhz
        squared = voltage_ratio(x, power) ** 2
        watts = (
            power.static_watts
            + (power.memory_watts + squared * power.memory_path_watts) * rate
            + squared * power.tensor_watts * tensor
            + x * squared * busy
        )
        result[watts <= power.limit_watts] = x
    return result


def clock_factors(gpu: GpuParameters, ratios: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """How fixed, memory and compute time stretch at these clocks over the maximum."""
    clocks, place = np.unique(ratios, return_inverse=True)
    memory = gpu.memory
    slow = [1.0 / bandwidth_ratio(x, memory.knee_ratio, memory.knee_sharpness) for x in clocks]
    fixed = (1.0 - _FIXED_SENSITIVITY) + _FIXED_SENSITIVITY / ratios
    return fixed, np.array(slow)[place.ravel()], 1.0 / ratios


def computed_seconds(
    benchmark: Benchmark,
    constants: Any,  # noqa: ANN401 - by operator
    gpu: GpuParameters,
    ratios: Numbers,
) -> Numbers:
    """What the equation gives at these clocks over the maximum."""
    return benchmark.parts(constants, gpu).seconds(*clock_factors(gpu, ratios))


def fit_constants(
    benchmark: Benchmark, gpu: GpuParameters, start: Numbers | None = None
) -> tuple[Any, Numbers]:
    """The constants of an operator's equation that come nearest to the measured times.

    Args:
        benchmark: The kernels.
        gpu: Clocks, power and peaks.
        start: Values in units to start from; by default those of the fit.

    Returns:
        The constants, and their values in units.
    """
    units = benchmark.fit.units.values()
    low, high = (np.array([unit[index] for unit in units], float) for index in (2, 3))
    first = np.array([unit[1] for unit in units], float) if start is None else start
    measured = np.log(benchmark.seconds)

    values = first
    for steps in (40, 20) if start is None else (8,):
        factors = clock_factors(gpu, clock_ratios(benchmark, benchmark.fit.build(values), gpu))
        residuals = functools.partial(_residuals, benchmark, gpu, factors, measured)
        values = least_squares(residuals, values, low, high, steps)
    return benchmark.fit.build(values), values


def _residuals(
    benchmark: Benchmark,
    gpu: GpuParameters,
    factors: tuple[Numbers, Numbers, Numbers],
    measured: Numbers,
    values: Numbers,
) -> Numbers:
    """Logarithm of computed over measured time."""
    seconds = benchmark.parts(benchmark.fit.build(values), gpu).seconds(*factors)
    difference: Numbers = np.log(seconds) - measured
    return difference


def least_squares(
    residuals: Callable[[Numbers], Numbers],
    start: Numbers,
    low: Numbers,
    high: Numbers,
    steps: int,
) -> Numbers:
    """Levenberg-Marquardt within bounds; large residuals count linearly.

    Args:
        residuals: Of a vector of parameters, shape (P,) to (N,).
        start: First parameters.
        low: Lower bounds.
        high: Upper bounds.
        steps: Most steps.
    """
    span = high - low
    values, damping = np.clip(start, low + 1e-6 * span, high - 1e-6 * span), _OFFSET_DAMPING
    current = residuals(values)
    cost = _robust_cost(current)
    for _ in range(steps):
        weights = 1.0 / np.sqrt(1.0 + (current / _ROBUST_SCALE) ** 2)
        slopes = np.empty((len(current), len(values)))
        for column, width in enumerate(span):
            moved = values.copy()
            step = 1e-5 * width if moved[column] < high[column] - 1e-5 * width else -1e-5 * width
            moved[column] += step
            slopes[:, column] = (residuals(moved) - current) / step * width
        weighted = slopes * weights[:, None]
        normal, gradient = slopes.T @ weighted, weighted.T @ current
        improved = False
        for _ in range(8):
            scale = np.diag(normal) + 1e-9
            move = -np.linalg.solve(normal + damping * np.diag(scale), gradient) * span
            tried = np.clip(values + move, low, high)
            found = residuals(tried)
            if (new_cost := _robust_cost(found)) < cost:
                improved = cost - new_cost > 1e-7 * cost
                values, current, cost, damping = tried, found, new_cost, damping * 0.3
                break
            damping = damping * 4.0 + 1e-9
        if not improved:
            break
    return values


def _robust_cost(residual: Numbers) -> float:
    return float((np.sqrt(1.0 + (residual / _ROBUST_SCALE) ** 2) - 1.0).sum())
