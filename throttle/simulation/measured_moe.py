"""Measured MoE kernels, and the load that their benchmark's routing puts on a rank.

How the benchmark deals tokens follows its public source (NVIDIA aiconfigurator, Apache-2.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.architecture import DTYPE_BYTES
from throttle.simulation import equations
from throttle.simulation.benchmark import DTYPES, Benchmark, Fit, peak, read_table
from throttle.simulation.operator_tables import KINDS
from throttle.simulation.parameters import MoeParameters

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pandas as pd

    from throttle.simulation.equations import Parts
    from throttle.simulation.parameters import GpuParameters

_MOE_SOURCES = {
    ("a100-sxm", "bf16"): ("vllm/0.14.0", "power_law_1.01"),  # no balanced rows there
    ("h100-sxm", ""): ("vllm/0.24.0", "balanced"),
    ("h200-sxm", "mxfp4"): ("vllm/0.24.0", "balanced"),
    ("h200-sxm", ""): ("vllm/0.22.0", "balanced"),
}

_MOE_FIT = Fit(
    MoeParameters,
    {
        "fixed_seconds": (1e-6, 25, 0, 80),
        "fixed_seconds_per_element": (1e-9, 1.2, 0, 15),
        "memory_efficiency_ratio": (1, 0.9, 0.5, 1.0),
        "compute_efficiency_ratio": (1, 0.6, 0.05, 1.0),
        "roofline_exponent": (1, 1.3, 1, 8),
        "padding_tokens": (1, 10, 0, 64),
        "activation_traffic_ratio": (1, 2.5, 0, 10),
        "benchmark_cache_speedup": (1, 2, 1, 6),
    },
)


def moe_rows(folder: Path, gpu: str, dtype: str, distribution: str = "") -> pd.DataFrame:
    """MoE kernels of one format, with the load that the benchmark's routing puts on its rank.

    Args:
        folder: Holds the files.
        gpu: One of `GPUS`.
        dtype: Weight format.
        distribution: Routing; empty means the one that is calibrated on.
    """
    columns = ("moe_dtype", "src", "distribution", "num_tokens", "latency_ms", "model")
    table = read_table(folder, "moe_kernels.csv.gz", gpu, columns)
    source, routing = _MOE_SOURCES.get((gpu, dtype)) or _MOE_SOURCES.get((gpu, ""), ("", ""))
    named = table.moe_dtype.map(DTYPES)
    table = table[
        (named == dtype) & (table.src == source) & (table.distribution == (distribution or routing))
    ].reset_index(drop=True)
    loads = {
        key: _benchmark_load(*key, grouped=source == "vllm/0.24.0")
        for key in set(_load_keys(table))
    }
    active, pairs = (
        zip(*(loads[key] for key in _load_keys(table)), strict=True) if len(table) else ((), ())
    )
    return table.assign(active=np.array(active, float), pairs=np.array(pairs, float))


def _load_keys(table: pd.DataFrame) -> list[tuple[int, int, int, int, str, bool]]:
    return list(
        zip(
            table.num_tokens.tolist(),
            table.num_experts.tolist(),
            table.topk.tolist(),
            table.moe_ep_size.tolist(),
            table.distribution.tolist(),
            (table.model == "deepseek-v3").tolist(),
            strict=True,
        )
    )


def _benchmark_load(  # noqa: PLR0917 - the columns of the file
    tokens: int,
    experts: int,
    per_token: int,
    ranks: int,
    distribution: str,
    is_deepseek: bool,  # noqa: FBT001 - a column too
    *,
    grouped: bool,
) -> tuple[float, float]:
    """Active experts and token-expert pairs of rank 0."""
    if distribution != "balanced":
        return _skewed_load(tokens, experts, per_token, ranks, float(distribution[10:]))
    if is_deepseek and grouped:
        return _grouped_load(tokens, experts, ranks)
    stride = -(-experts // per_token)
    token, pick = np.arange(tokens)[:, None], np.arange(per_token)[None]
    if tokens >= stride:
        chosen = (token + pick * stride) % experts
    else:
        chosen = (token * stride // tokens + pick * stride) % experts
    counts = np.bincount(chosen.ravel(), minlength=experts)[: experts // ranks]
    return float((counts > 0).sum()), float(counts.sum())


def _grouped_load(tokens: int, experts: int, ranks: int) -> tuple[float, float]:
    """DeepSeek-V3 under vLLM 0.24: its router keeps 4 of 8 groups of experts.

    Evenly dealt picks are one per group, so half of them fall outside the kept groups and go to the
    same few experts: half of all experts work. (Times confirm it: with all experts active the
    weights would stream at 5.6 TB/s on an H100.)
    """
    groups, kept = 8, 4
    share = kept / max(ranks / 2, 1.0)  # kept groups on rank 0, which holds the first ones
    local = min(experts / ranks, experts / 2)
    if ranks > groups:
        return min(tokens * 0.5 + kept, local), tokens * (0.5 + kept)
    return min(tokens * share + kept, local), tokens * (share + kept)


def _skewed_load(
    tokens: int, experts: int, per_token: int, ranks: int, alpha: float
) -> tuple[float, float]:
    """Mean load of the fullest rank under the benchmark's power-law token counts."""
    draws = 8
    generator = np.random.default_rng([tokens, experts, per_token, ranks, round(100 * alpha)])
    low, high = (1.0, tokens * 0.8) if tokens * per_token > experts else (0.01, 2.0)
    power = 1.0 - alpha
    active = pairs = 0.0
    for _ in range(draws):
        uniform = generator.random(experts)
        weights = ((high**power - low**power) * uniform + low**power) ** (1.0 / power)
        counts = np.floor(weights / weights.sum() * tokens * per_token + 0.5)
        order = np.argsort(-counts)
        missing = int(tokens * per_token - counts.sum())
        for place in range(abs(missing)):
            if missing > 0:
                counts[order[place % experts]] += 1
                continue
            least = order[-(place % experts) - 1]
            counts[least if counts[least] > 0 else counts.argmax()] -= 1
        by_rank = counts.reshape(ranks, -1)
        fullest = by_rank[by_rank.sum(axis=1).argmax()]
        active += float((fullest > 0).sum()) / draws
        pairs += float(fullest.sum()) / draws
    return active, pairs


def moe_benchmark(gpu: str, dtype: str, table: pd.DataFrame) -> Benchmark:
    """MoE kernels as a benchmark; rows whose rank has no work are left out."""
    table = table[table.active > 0].reset_index(drop=True)
    tokens = table.num_tokens.to_numpy(float)
    width = (table.inter_size / table.moe_tp_size).to_numpy(float)
    shapes = np.stack(
        [
            table.hidden_size.to_numpy(float), width, table.num_experts.to_numpy(float),
            table.topk.to_numpy(float), table.moe_ep_size.to_numpy(float),
        ],
        axis=1,
    )  # fmt: skip
    active, pairs = table.active.to_numpy(float), table.pairs.to_numpy(float)
    work = {"hidden": shapes[:, 0], "width": width, "tokens": tokens, "active": active}
    return Benchmark(
        gpu, dtype, "moe", KINDS["moe"], (dtype,), shapes, tokens, table.model.to_numpy(str),
        table.latency_ms.to_numpy(float) * 1e-3, (tokens >= 4) & (tokens <= 512),
        _MOE_FIT, work | {"pairs": pairs, "dtype": dtype},
        _moe_parts,
    )  # fmt: skip


def moe_benchmarks(folder: Path, gpu: str) -> Iterator[Benchmark]:
    """MoE kernels of one GPU, one benchmark per weight format."""
    for dtype in DTYPES.values():
        table = moe_rows(folder, gpu, dtype)
        if len(table):
            yield moe_benchmark(gpu, dtype, table)


def _moe_parts(constants: MoeParameters, work: dict[str, Any], gpu: GpuParameters) -> Parts:
    wide = DTYPE_BYTES[work["dtype"]]
    parts = equations.moe(
        constants, work["hidden"], work["width"], wide, work["tokens"], work["active"],
        work["pairs"], peak(gpu, work["dtype"]), gpu.memory.bandwidth_bytes_per_second,
    )  # fmt: skip
    weights = work["active"] * 3.0 * work["hidden"] * work["width"] * wide
    return equations.cached(parts, weights, gpu.memory.l2_bytes, constants.benchmark_cache_speedup)
