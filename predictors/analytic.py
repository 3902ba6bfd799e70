"""A simple roofline estimate: features of both models, and the base of the latency model.

Simple on purpose: computing takes time in inverse proportion to the clock, memory traffic and
fixed costs are what the data say. Nothing here comes from the simulated GPU, nor may it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.errors import PredictorsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from predictors.features import Work

#: Share of the nominal peak that large kernels reach (arithmetic, memory), the fixed cost of one
#: layer and the cost of one more sequence: orders of magnitude for today's engines. The fitted
#: base scales them.
COMPUTE_EFFICIENCY = 0.75
MEMORY_EFFICIENCY = 0.85
FIXED_SECONDS_PER_LAYER = 60e-6
SECONDS_PER_SEQUENCE = 10e-6

#: Rows of the matrix that `Roofline.terms` returns, seconds at maximum clock.
TERMS: tuple[str, ...] = (
    "fixed",
    "sequences",
    "kv_memory",
    "expert_memory",
    "expert_compute",
    "projection_memory",
    "projection_compute",
    "attention_compute",
)

#: What a fitted base is made of: (name, terms of it). `flat` parts do not depend on the clock,
#: `slope` parts grow as one over the clock, `overlap` parts take the longer of a memory time and a
#: compute time that grows as one over the clock.
_FLAT = ("fixed", "sequences", "kv_memory")
_SLOPE = (
    "fixed",
    "sequences",
    "kv_memory",
    "expert_memory",
    "expert_compute",
    "projection_compute",
    "attention_compute",
)
_OVERLAP = ("expert", "projection")
COEFFICIENTS: tuple[str, ...] = (
    *(f"flat_{term}" for term in _FLAT),
    *(f"slope_{term}" for term in _SLOPE),
    *(f"overlap_{term}" for term in _OVERLAP),
)

#: Share of the fitted clock dependence that the base keeps; the rest stands at its value at maximum
#: clock. The trees' correction may not rise with clock, so it can add dependence but never take
#: any back: a base with all of it would be too steep wherever an iteration depends on the clock
#: less than the fit says, above all at the power limit. On records of an invented engine, the
#: mean error was 1.0 % with 0, 0.9 % with 0.3, 1.3 % with 0.7 and 2.6 % with 1 (noise alone 0.8 %).
CLOCK_SHARE = 0.3

#: Least coefficient of the flat fixed cost: keeps the base above zero for every shape.
_LEAST_FIXED_COEFFICIENT = 0.01

#: Rows that a fit looks at; more do not change twelve coefficients.
_FIT_ROWS_COUNT = 50_000


@dataclass(frozen=True, slots=True)
class NominalGpu:
    """Nominal figures of a GPU, from its data sheet unless noted.

    Attributes:
        name: Our name.
        bf16_flops: Dense bf16 FLOP per second at maximum clock.
        fp8_flops: Dense 8-bit FLOP per second at maximum clock.
        memory_bytes_per_second: Bandwidth of the device memory.
        maximum_clock_mhz: Highest SM clock.
        minimum_clock_mhz: Lowest SM clock that serving uses.
        power_limit_watts: Default power limit.
        parked_power_watts: Idle at minimum clock. A100, H100, L40S measured without a context
            (arXiv 2605.23918); H200 and B200 assumed.
        idle_power_watts: Idle at maximum clock with a live context; same source.
    """

    name: str
    bf16_flops: float
    fp8_flops: float
    memory_bytes_per_second: float
    maximum_clock_mhz: int
    minimum_clock_mhz: int
    power_limit_watts: float
    parked_power_watts: float
    idle_power_watts: float


GPUS: dict[str, NominalGpu] = {
    gpu.name: gpu
    for gpu in (
        NominalGpu("a100-sxm", 312e12, 312e12, 2.04e12, 1410, 210, 400, 54, 80),
        NominalGpu("h100-sxm", 989e12, 1979e12, 3.35e12, 1980, 345, 700, 72, 122),
        NominalGpu("h200-sxm", 989e12, 1979e12, 4.8e12, 1980, 345, 700, 80, 130),
        NominalGpu("b200", 2250e12, 4500e12, 7.7e12, 1965, 120, 1000, 140, 220),
        NominalGpu("l40s", 362e12, 733e12, 0.864e12, 2520, 210, 350, 36, 102),
    )
}


def gpu_by_name(name: str) -> NominalGpu:
    """Find a GPU by our name or by the driver's ("NVIDIA H200", "NVIDIA A100-SXM4-80GB").

    Raises:
        PredictorsError: If the GPU is not known.
    """
    words = name.lower().replace("-", " ").replace("_", " ").split()
    for key, gpu in GPUS.items():
        if key == name.lower() or (key.split("-")[0] in words and "pcie" not in words):
            return gpu
    raise PredictorsError(f"gpu is {name!r}; allowed: {', '.join(GPUS)}")


class Roofline:
    """Roofline times of one model's iterations on one kind of GPU, from nominal figures.

    Args:
        layers_count: Decoder layers, each with a fixed cost.
        weight_bytes: Bytes per expert weight. One byte computes at the 8-bit peak; four-bit formats
            are widened to bf16 first.
        gpu: Nominal figures.
    """

    def __init__(self, layers_count: int, weight_bytes: float, gpu: NominalGpu) -> None:
        peak = gpu.fp8_flops if weight_bytes == 1.0 else gpu.bf16_flops
        self._seconds_per_flop = 1.0 / (peak * COMPUTE_EFFICIENCY)
        # attention itself is computed in 16 bits
        self._seconds_per_attention_flop = 1.0 / (gpu.bf16_flops * COMPUTE_EFFICIENCY)
        self._seconds_per_byte = 1.0 / (gpu.memory_bytes_per_second * MEMORY_EFFICIENCY)
        self._fixed_seconds = layers_count * FIXED_SECONDS_PER_LAYER

    def terms(self, work: Work) -> NDArray[np.float64]:
        """Times at maximum clock, (8, K) seconds, rows as in `TERMS`."""
        terms = np.empty((len(TERMS), len(work.kv_bytes)))
        terms[0] = self._fixed_seconds
        np.multiply(work.sequences_count, SECONDS_PER_SEQUENCE, out=terms[1])
        np.multiply(work.kv_bytes, self._seconds_per_byte, out=terms[2])
        np.multiply(work.expert_bytes, self._seconds_per_byte, out=terms[3])
        np.multiply(work.expert_flops, self._seconds_per_flop, out=terms[4])
        terms[5] = work.projection_bytes * self._seconds_per_byte
        np.multiply(work.projection_flops, self._seconds_per_flop, out=terms[6])
        np.multiply(work.attention_flops, self._seconds_per_attention_flop, out=terms[7])
        return terms


class FittedBase:
    """Roofline time at each clock, scaled to an engine; positive, and never rising with clock.

    t(x) = sum flat_i r_i + (1/x) sum slope_i r_i
           + overlap_expert * max(expert_memory, expert_compute / x)
           + overlap_projection * max(projection_memory, projection_compute / x)

    with x the clock over the maximum clock, r the terms of `Roofline`, no coefficient negative,
    and only `CLOCK_SHARE` of what this rises below x = 1.

    The roofline is that of Williams et al. (CACM 52, 2009); that memory traffic and fixed costs may
    slow down with the clock, too, is what coefficients beside `overlap` are for.

    Args:
        coefficients: Name (of `COEFFICIENTS`) -> value, none negative.

    Raises:
        PredictorsError: If a coefficient is missing or negative.
    """

    def __init__(self, coefficients: Mapping[str, float]) -> None:
        for name in COEFFICIENTS:
            if not coefficients.get(name, -1.0) >= 0.0:
                raise PredictorsError(
                    f"base coefficient {name} is {coefficients.get(name)!r}; allowed: 0 or more"
                )
        self.coefficients = {name: float(coefficients[name]) for name in COEFFICIENTS}
        # rows: flat, slope, then memory and compute of each overlap
        self._weights = np.zeros((2 + 2 * len(_OVERLAP), len(TERMS)))
        for name in _FLAT:
            self._weights[0, TERMS.index(name)] = coefficients[f"flat_{name}"]
        for name in _SLOPE:
            self._weights[1, TERMS.index(name)] = coefficients[f"slope_{name}"]
        for row, name in enumerate(_OVERLAP):
            weight = coefficients[f"overlap_{name}"]
            self._weights[2 + 2 * row, TERMS.index(f"{name}_memory")] = weight
            self._weights[3 + 2 * row, TERMS.index(f"{name}_compute")] = weight

    def parts(self, terms: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weigh terms (8, K) into the (6, K) parts that `seconds` adds up."""
        parts: NDArray[np.float64] = self._weights @ terms
        flat, slope, expert_memory, expert_compute, memory, compute = parts
        full = slope + np.maximum(expert_memory, expert_compute) + np.maximum(memory, compute)
        parts[1:] *= CLOCK_SHARE
        flat += (1.0 - CLOCK_SHARE) * full
        return parts

    @staticmethod
    def seconds(
        parts: NDArray[np.float64], clock_ratios: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Time at each clock.

        Args:
            parts: (6, K) of `parts`.
            clock_ratios: (C,) for every shape at every clock; (K, 1) for one clock per shape.

        Returns:
            (K, C) seconds, or (K, 1).
        """
        flat, slope, expert_memory, expert_compute, memory, compute = parts[:, :, None]
        slowdown = 1.0 / clock_ratios
        seconds: NDArray[np.float64] = slope * slowdown
        seconds += flat
        seconds += np.maximum(expert_memory, expert_compute * slowdown)
        seconds += np.maximum(memory, compute * slowdown)
        return seconds

    @classmethod
    def fit(
        cls,
        terms: NDArray[np.float64],
        clock_ratios: NDArray[np.float64],
        seconds: NDArray[np.float64],
        weights: NDArray[np.float64],
    ) -> FittedBase:
        """Fit by non-negative least squares of the relative error.

        Args:
            terms: (8, N) of `Roofline.terms`.
            clock_ratios: (N,) clock over maximum clock.
            seconds: (N,) measured durations.
            weights: (N,) how much each row counts.
        """
        from scipy.optimize import (  # type: ignore[import-untyped]  # noqa: PLC0415 (only for training)
            nnls,
        )

        chosen = np.linspace(0, len(seconds) - 1, min(len(seconds), _FIT_ROWS_COUNT)).astype(int)
        terms, slowdown = terms[:, chosen], 1.0 / clock_ratios[chosen]
        named = dict(zip(TERMS, terms, strict=True))
        columns = [named[name] for name in _FLAT]
        columns += [named[name] * slowdown for name in _SLOPE]
        columns += [
            np.maximum(named[f"{name}_memory"], named[f"{name}_compute"] * slowdown)
            for name in _OVERLAP
        ]
        root = np.sqrt(weights[chosen])
        matrix = np.stack(columns, axis=1) * (root / seconds[chosen])[:, None]
        found, _ = nnls(matrix, root)
        coefficients = dict(zip(COEFFICIENTS, map(float, found), strict=True))
        least = max(coefficients["flat_fixed"], _LEAST_FIXED_COEFFICIENT)
        return cls(coefficients | {"flat_fixed": least})
