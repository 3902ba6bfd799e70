"""A simple roofline estimate: features of both models, and the base of the latency model.

Simple on purpose: computing takes time in inverse proportion to the clock, memory traffic and
fixed costs are what the data say. Nothing here comes from the simulated GPU, nor may it.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.errors import PredictorsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from predictors.features import Work

#: Share of the nominal peak that large kernels reach (arithmetic, memory), the fixed cost of one
#: layer and the cost of one more sequence: orders of magnitude for today's engines. The fitted
#: base scales them.
COMPUTE_EFFICIENCY = 0.75
MEMORY_EFFICIENCY = 0.85
FIXED_SECONDS_PER_LAYER = 60e-6
SECONDS_PER_SEQUENCE = 10e-6
SECONDS_PER_SEQUENCE_HEAD = 1e-9
COMMUNICATION_BYTES_PER_SECOND = 200e9

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
    "communication",
    "moe_fixed",
    "mla_fixed",
    "block_fixed",
    "sequence_heads",
    "activation_memory",
)

#: What a fitted base is made of: (name, terms of it). `flat` parts do not depend on the clock,
#: `slope` parts grow as one over the clock, `overlap` parts take the longer of a memory time and a
#: compute time that grows as one over the clock.
_FLAT = (
    "fixed",
    "sequences",
    "kv_memory",
    "communication",
    "moe_fixed",
    "mla_fixed",
    "block_fixed",
    "sequence_heads",
    "activation_memory",
)
_SLOPE = (
    "fixed",
    "sequences",
    "kv_memory",
    "expert_memory",
    "expert_compute",
    "projection_compute",
    "attention_compute",
    "moe_fixed",
    "mla_fixed",
    "block_fixed",
    "sequence_heads",
    "activation_memory",
)
_OVERLAP = ("expert", "projection")
COEFFICIENTS: tuple[str, ...] = (
    *(f"flat_{term}" for term in _FLAT),
    *(f"slope_{term}" for term in _SLOPE),
    *(f"overlap_{term}" for term in _OVERLAP),
)

#: Least coefficient of the flat fixed cost: keeps the base above zero for every shape.
_LEAST_FIXED_COEFFICIENT = 0.01

#: Rows that a fit looks at; more do not change twelve coefficients.
_FIT_ROWS_COUNT = 20_000


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


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers that have costs of their own, whatever they compute.

    Attributes:
        count: All decoder layers.
        moe_count: Those with routed experts.
        mla_count: Those with multi-head latent attention.
        block_scaled_count: Those with block-scaled 8-bit weights.
        attention_heads_count: Query heads over all layers, on one GPU.
    """

    count: int
    moe_count: int
    mla_count: int
    block_scaled_count: int
    attention_heads_count: float


class Roofline:
    """Roofline times of one model's iterations on one kind of GPU, from nominal figures.

    Args:
        layers: Decoder layers, each with a fixed cost.
        weight_bytes: Bytes per expert weight. One byte computes at the 8-bit peak; four-bit formats
            are widened to bf16 first.
        gpu: Nominal figures.
    """

    def __init__(self, layers: Layers, weight_bytes: float, gpu: NominalGpu) -> None:
        peak = gpu.fp8_flops if weight_bytes == 1.0 else gpu.bf16_flops
        self._seconds_per_flop = 1.0 / (peak * COMPUTE_EFFICIENCY)
        # attention itself is computed in 16 bits
        self._seconds_per_attention_flop = 1.0 / (gpu.bf16_flops * COMPUTE_EFFICIENCY)
        self._seconds_per_byte = 1.0 / (gpu.memory_bytes_per_second * MEMORY_EFFICIENCY)
        self._fixed_seconds = layers.count * FIXED_SECONDS_PER_LAYER
        kinds = (layers.moe_count, layers.mla_count, layers.block_scaled_count)
        self._kinds_fixed_seconds = np.array(kinds)[:, None] * FIXED_SECONDS_PER_LAYER
        self._seconds_per_sequence = layers.attention_heads_count * SECONDS_PER_SEQUENCE_HEAD

    def constants(self) -> dict[str, float]:
        """All that `terms` multiplies with, by name, for compiled code."""
        moe, mla, block = (float(each) for each in self._kinds_fixed_seconds[:, 0])
        return {
            "seconds_per_flop": self._seconds_per_flop,
            "seconds_per_attention_flop": self._seconds_per_attention_flop,
            "seconds_per_byte": self._seconds_per_byte,
            "seconds_per_sequence": self._seconds_per_sequence,
            "fixed_seconds": self._fixed_seconds,
            "moe_fixed_seconds": moe,
            "mla_fixed_seconds": mla,
            "block_fixed_seconds": block,
        }

    def terms(self, work: Work) -> NDArray[np.float64]:
        """Times at maximum clock, (14, K) seconds, rows as in `TERMS`."""
        terms = np.empty((len(TERMS), len(work.kv_bytes)))
        terms[0] = self._fixed_seconds
        np.multiply(work.sequences_count, SECONDS_PER_SEQUENCE, out=terms[1])
        np.multiply(work.kv_bytes, self._seconds_per_byte, out=terms[2])
        np.multiply(work.expert_bytes, self._seconds_per_byte, out=terms[3])
        np.multiply(work.expert_flops, self._seconds_per_flop, out=terms[4])
        terms[5] = work.projection_bytes * self._seconds_per_byte
        np.multiply(work.projection_flops, self._seconds_per_flop, out=terms[6])
        np.multiply(work.attention_flops, self._seconds_per_attention_flop, out=terms[7])
        np.divide(work.communication_bytes, COMMUNICATION_BYTES_PER_SECOND, out=terms[8])
        # fixed costs of layers of each kind: one number each per model, apart for the sake of fits
        # over many models
        terms[9:12] = self._kinds_fixed_seconds
        np.multiply(work.sequences_count, self._seconds_per_sequence, out=terms[12])
        np.multiply(work.activation_bytes, self._seconds_per_byte, out=terms[13])
        return terms


class LatencyBase(ABC):
    """Time at each clock as a sum of six parts; positive, and never rising with clock.

    t(x) = flat + slope / x + max(memory_1, compute_1 / x) + max(memory_2, compute_2 / x)

    with x the clock over the maximum clock. Subclasses say how parts come from terms.

    Attributes:
        coefficients: Name -> value, none negative.
    """

    coefficients: dict[str, float]
    _weights: NDArray[np.float64]

    @property
    def weights(self) -> NDArray[np.float64]:
        """How terms are weighed into parts, (6, T)."""
        return self._weights

    def parts(self, terms: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weigh terms (T, K) into the (6, K) parts that `seconds` adds up."""
        parts: NDArray[np.float64] = self._weights @ terms
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
        flat, slope, memory_1, compute_1, memory_2, compute_2 = parts[:, :, None]
        slowdown = 1.0 / clock_ratios
        seconds: NDArray[np.float64] = slope * slowdown
        seconds += flat
        seconds += np.maximum(memory_1, compute_1 * slowdown)
        seconds += np.maximum(memory_2, compute_2 * slowdown)
        return seconds


class FittedBase(LatencyBase):
    """Roofline time at each clock, scaled to an engine.

    t(x) = sum flat_i r_i + (1/x) sum slope_i r_i
           + overlap_expert * max(expert_memory, expert_compute / x)
           + overlap_projection * max(projection_memory, projection_compute / x)

    with x the clock over the maximum clock, r the terms of `Roofline`, no coefficient negative.

    The roofline is that of Williams et al. (CACM 52, 2009); that memory traffic and fixed costs may
    slow down with the clock, too, is what coefficients beside `overlap` are for.

    Args:
        coefficients: Name (of `COEFFICIENTS`) -> value, none negative.

    Raises:
        PredictorsError: If a coefficient is missing or negative.
    """

    def __init__(self, coefficients: Mapping[str, float]) -> None:
        self.coefficients = checked_coefficients(coefficients, COEFFICIENTS)
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
            terms: (14, N) of `Roofline.terms`.
            clock_ratios: (N,) clock over maximum clock.
            seconds: (N,) measured durations.
            weights: (N,) how much each row counts.
        """
        named, slowdown = dict(zip(TERMS, terms, strict=True)), 1.0 / clock_ratios
        columns = [named[name] for name in _FLAT]
        columns += [named[name] * slowdown for name in _SLOPE]
        columns += [
            np.maximum(named[f"{name}_memory"], named[f"{name}_compute"] * slowdown)
            for name in _OVERLAP
        ]
        found = fit_nonnegative(np.stack(columns), seconds, weights)
        coefficients = dict(zip(COEFFICIENTS, map(float, found), strict=True))
        least = max(coefficients["flat_fixed"], _LEAST_FIXED_COEFFICIENT)
        return cls(coefficients | {"flat_fixed": least})


def checked_coefficients(
    coefficients: Mapping[str, float], names: Sequence[str]
) -> dict[str, float]:
    """The named coefficients as plain numbers.

    Raises:
        PredictorsError: If one is missing or negative.
    """
    for name in names:
        if not coefficients.get(name, -1.0) >= 0.0:
            raise PredictorsError(
                f"base coefficient {name} is {coefficients.get(name)!r}; allowed: 0 or more"
            )
    return {name: float(coefficients[name]) for name in names}


def fit_nonnegative(
    columns: NDArray[np.float64], target: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Non-negative least squares of the relative error (Lawson and Hanson, 1974).

    Args:
        columns: (J, N), what the target is a sum of.
        target: (N,), above zero.
        weights: (N,) how much each row counts.

    Returns:
        (J,) factors, none negative.
    """
    from scipy.optimize import (  # type: ignore[import-untyped]  # noqa: PLC0415 (only for training)
        nnls,
    )

    chosen = np.linspace(0, len(target) - 1, min(len(target), _FIT_ROWS_COUNT)).astype(int)
    root = np.sqrt(weights[chosen])
    matrix = (columns[:, chosen] * (root / target[chosen])).T
    sizes = np.sqrt((matrix**2).sum(axis=0))
    sizes[sizes == 0.0] = 1.0  # columns differ by many powers of ten
    found: NDArray[np.float64] = nnls(matrix / sizes, root)[0] / sizes
    return found
