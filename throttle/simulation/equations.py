"""Roofline equations of the operators, over arrays of work.

Each says what an operator costs at full clock, in parts that follow the clock differently. The
forms and their sources stand in docs/plant.md; their constants are fitted to the operator tables of
NVIDIA aiconfigurator (Apache-2.0) by `throttle.simulation.calibration`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from throttle.simulation.parameters import (
        DecodeAttentionParameters,
        GemmParameters,
        LatentAttentionParameters,
        MoeParameters,
        PrefillAttentionParameters,
    )

Numbers = NDArray[np.float64]
Mask = NDArray[np.bool_]

_TILE = 128  # rows and columns of one GEMM output tile
_PADDED_ROWS = 64  # GEMM rows are padded to a multiple of this
_WORST_WAVE = 8.0
#: Efficiency of the full tiles for which the power of the tensor cores is stated.
FULL_EFFICIENCY = 0.75
#: Rows of padding of an expert's tile that draw power: set on measured H200 bf16 kernels, whose
#: tensor power per useful FLOP is 4.7, 3.3, 2.5, 1.85 and 1.6 times that of full tiles at 6, 12,
#: 24, 48 and 96 pairs per expert.
_POWERED_ROWS = 18.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What an operator costs at full clock; arrays of one shape, times in seconds.

    Time is `g fixed + ((b memory)^p + (c compute)^p)^(1/p) + b moved`, where g, b and c stretch
    fixed, memory and compute time with the clock.

    Attributes:
        fixed: Launches and latencies, of which a share follows the clock.
        memory: Streaming of weights or KV.
        compute: Tensor work.
        exponent: The p above.
        moved: Traffic of activations, beside the rest.
        traffic_bytes: Bytes to and from device memory.
        tensor_seconds: What the tensor cores' power follows: floating-point work over the peak; for
            grouped GEMM the time its tiles compute, padding included, times `FULL_EFFICIENCY`.
    """

    fixed: Numbers
    memory: Numbers
    compute: Numbers
    exponent: float
    moved: Numbers
    traffic_bytes: Numbers
    tensor_seconds: Numbers

    def seconds(
        self, fixed_factor: Numbers, memory_factor: Numbers, compute_factor: Numbers
    ) -> Numbers:
        """Time with each part stretched by its factor."""
        p = self.exponent
        blend = (self.memory * memory_factor) ** p + (self.compute * compute_factor) ** p
        return self.fixed * fixed_factor + blend ** (1.0 / p) + self.moved * memory_factor


def cached(parts: Parts, loaded_bytes: Numbers, cache_bytes: float, speedup: float) -> Parts:
    """The same for a benchmark, which finds small weights in L2 again.

    Memory time shrinks by `(1 - h) + h / g` with `h = 1 / (1 + (bytes / (0.8 L2))^4)`. Only for
    reading benchmarks: real iterations evict, so the plant leaves it out.
    """
    share = 1.0 / (1.0 + (loaded_bytes / (0.8 * cache_bytes)) ** 4)
    return replace(parts, memory=parts.memory * ((1.0 - share) + share / speedup))


def moe(  # noqa: PLR0917 - the symbols of the equation
    parameters: MoeParameters,
    hidden: Numbers,
    width: Numbers,
    weight_bytes: float,
    tokens: Numbers,
    active: Numbers,
    pairs: Numbers,
    peak: float,
    bandwidth: float,
) -> Parts:
    """Grouped GEMM of one MoE layer on one rank.

    `g (t0 + cl (H + I)) + (tm^p + tc^p)^(1/p) + ca (T (2H + 3I) + n H) 2 / bw` with
    `tm = A 3 H I wb / (bw em)` and `tc = 6 H I (T + A mpad) / (C ec)`. The tensor cores draw power
    for as long as tiles compute, useful or not: measured H200 kernels draw the same 650 to 690 W
    when compute bound, be their efficiency .3 or .55.

    Args:
        parameters: Constants.
        hidden: H.
        width: I, the expert's width on this rank.
        weight_bytes: wb, bytes per weight.
        tokens: n, tokens that enter the layer.
        active: A, active experts of the rank.
        pairs: T, token-expert pairs of the rank.
        peak: FLOP/s.
        bandwidth: Bytes/s.
    """
    weights = active * 3.0 * hidden * width * weight_bytes
    activations = 2.0 * (pairs * (2.0 * hidden + 3.0 * width) + tokens * hidden)
    pair_seconds = 6.0 * hidden * width / (peak * parameters.compute_efficiency_ratio)
    elements = hidden + width
    return Parts(
        fixed=parameters.fixed_seconds + parameters.fixed_seconds_per_element * elements,
        memory=weights / (bandwidth * parameters.memory_efficiency_ratio),
        compute=pair_seconds * (pairs + active * parameters.padding_tokens),
        exponent=parameters.roofline_exponent,
        moved=parameters.activation_traffic_ratio * activations / bandwidth,
        traffic_bytes=weights + activations,
        tensor_seconds=pair_seconds * (pairs + active * _POWERED_ROWS) * FULL_EFFICIENCY,
    )


def gemm(  # noqa: PLR0917 - the symbols of the equation
    parameters: GemmParameters,
    rows: Numbers,
    columns: Numbers,
    inner: Numbers,
    weight_bytes: float,
    peak: float,
    bandwidth: float,
    multiprocessors: int,
) -> Parts:
    """One dense GEMM of rows x inner by inner x columns.

    `g (t0 + K mp) + (tm^p + tc^p)^(1/p)`, `tm = bytes / (bw em)`,
    `tc = 2 Mp N K / (C ec) wave^q`; Mp is M padded to 64, the wave is that of 128 x 128 tiles.
    """
    moved = 2.0 * rows * (inner + columns) + columns * inner * weight_bytes
    padded = np.ceil(rows / _PADDED_ROWS) * _PADDED_ROWS
    tiles = np.maximum(np.ceil(rows / _TILE), 1.0) * np.ceil(columns / _TILE)
    wave = np.minimum(_WORST_WAVE, np.ceil(tiles / multiprocessors) * multiprocessors / tiles)
    flops = 2.0 * columns * inner
    return Parts(
        fixed=parameters.fixed_seconds
        + parameters.fixed_seconds_per_element * inner
        + np.zeros_like(moved),
        memory=moved / (bandwidth * parameters.memory_efficiency_ratio),
        compute=flops
        * padded
        * wave**parameters.wave_exponent
        / (peak * parameters.compute_efficiency_ratio),
        exponent=parameters.roofline_exponent,
        moved=np.zeros_like(moved),
        traffic_bytes=moved,
        tensor_seconds=flops * rows / peak,
    )


def decode_attention(  # noqa: PLR0917 - the symbols of the equation
    parameters: DecodeAttentionParameters,
    requests: Numbers,
    kv_bytes: Numbers,
    heads: Numbers,
    flops: Numbers,
    peak: float,
    bandwidth: float,
) -> Parts:
    """Decode attention: `g (t0 + cb B heads) + (KV + s0 KV / (KV + 5 MB)) / (bw em)`."""
    extra = parameters.extra_bytes * kv_bytes / (kv_bytes + 5e6)
    return Parts(
        fixed=parameters.fixed_seconds + parameters.seconds_per_row * requests * heads,
        memory=(kv_bytes + extra) / (bandwidth * parameters.memory_efficiency_ratio),
        compute=np.zeros_like(kv_bytes),
        exponent=1.0,
        moved=np.zeros_like(kv_bytes),
        traffic_bytes=kv_bytes,
        tensor_seconds=flops / peak,
    )


def prefill_attention(  # noqa: PLR0917 - the symbols of the equation
    parameters: PrefillAttentionParameters,
    tokens: Numbers,
    pairs: Numbers,
    pair_flops: Numbers,
    moved_bytes: Numbers,
    peak: float,
    bandwidth: float,
) -> Parts:
    """Causal attention of one layer: `g t0 + F (pairs + tokens s0 / 2) / (C ec) + cm IO / bw`.

    A whole prompt has S^2 / 2 query-key pairs of F = 4 heads hd FLOPs each, which gives
    `2 S^2 heads hd (1 + s0 / S)`.
    """
    spent = pairs + tokens * parameters.extra_tokens / 2.0
    return Parts(
        fixed=parameters.fixed_seconds + np.zeros_like(spent),
        memory=np.zeros_like(spent),
        compute=spent * pair_flops / (peak * parameters.compute_efficiency_ratio),
        exponent=1.0,
        moved=parameters.traffic_ratio * moved_bytes / bandwidth,
        traffic_bytes=moved_bytes + np.zeros_like(spent),
        tensor_seconds=pairs * pair_flops / peak,
    )


def latent_attention(  # noqa: PLR0917 - the symbols of the equation
    parameters: LatentAttentionParameters,
    rows: Numbers,
    streamed_bytes: Numbers,
    projection_seconds: Numbers,
    attention_seconds: Numbers,
    bandwidth: float,
) -> Parts:
    """Block of multi-head latent attention with its projections.

    `g (t0 + cb rows) + (w + KV) / (bw em) + (projections + attention) / ec`

    Args:
        parameters: Constants, of decode or of prefill.
        rows: Requests times heads for decode; tokens times heads for prefill.
        streamed_bytes: Projection weights and compressed KV.
        projection_seconds: FLOPs of the projections over their peak.
        attention_seconds: FLOPs of attention over the bf16 peak.
        bandwidth: Bytes/s.
    """
    work = projection_seconds + attention_seconds
    return Parts(
        fixed=parameters.fixed_seconds + parameters.seconds_per_row * rows,
        memory=streamed_bytes / (bandwidth * parameters.memory_efficiency_ratio),
        compute=work / parameters.compute_efficiency_ratio,
        exponent=1.0,
        moved=np.zeros_like(work),
        traffic_bytes=streamed_bytes + np.zeros_like(work),
        tensor_seconds=work,
    )
