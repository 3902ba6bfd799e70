"""Reads the measured operator tables that the plant is calibrated on.

The files are extracts of the operator tables of NVIDIA aiconfigurator (Apache-2.0, commit 095f58a):
one row per kernel and shape, at default clocks under the default power limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.architecture import DTYPE_BYTES, from_catalogue
from throttle.simulation import equations
from throttle.simulation.attention import latent_flops, latent_weight_count
from throttle.simulation.benchmark import DTYPES, Benchmark, Fit, peak, read_table
from throttle.simulation.measured_moe import moe_benchmarks
from throttle.simulation.operator_tables import KINDS
from throttle.simulation.operators import BF16_COMPUTED
from throttle.simulation.parameters import (
    AllReduceParameters,
    DecodeAttentionParameters,
    GemmParameters,
    LatentAttentionParameters,
    PrefillAttentionParameters,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from throttle.simulation.equations import Parts
    from throttle.simulation.parameters import GpuParameters


def read_benchmarks(folder: Path, gpu: str) -> Iterator[Benchmark]:
    """Every operator measured on one GPU.

    Args:
        folder: Holds the files.
        gpu: One of `GPUS`.

    Raises:
        NotFoundError: A file is missing.
        InvalidInputError: A file lacks a column.
    """
    yield from moe_benchmarks(folder, gpu)
    yield from _gemm(folder, gpu)
    yield from _attention(folder, gpu)
    if gpu != "a100-sxm":
        yield from _latent(folder, gpu)
    yield from _all_reduce(folder, gpu)


# -- dense GEMM ----------------------------------------------------------------------------------

_GEMM_FIT = Fit(
    GemmParameters,
    {
        "fixed_seconds": (1e-6, 4, 0, 80),
        "fixed_seconds_per_element": (1e-9, 0.2, 0, 4),
        "memory_efficiency_ratio": (1, 0.9, 0.5, 1.0),
        "compute_efficiency_ratio": (1, 0.8, 0.1, 1.0),
        "roofline_exponent": (1, 4, 1, 8),
        "wave_exponent": (1, 0.1, 0, 1),
        "benchmark_cache_speedup": (1, 2, 1, 6),
    },
)


def _gemm(folder: Path, gpu: str) -> Iterator[Benchmark]:
    columns = ("gemm_dtype", "m", "n", "k", "latency_ms")
    table = read_table(folder, "gemm.csv", gpu, columns)
    for name, rows in table.groupby("gemm_dtype"):
        dtype = DTYPES[str(name)]
        m, n, k = (rows[column].to_numpy(float) for column in ("m", "n", "k"))
        yield Benchmark(
            gpu, dtype, "gemm", KINDS["gemm"], (dtype,), np.stack([n, k], axis=1), m,
            np.array([f"{a:g}x{b:g}" for a, b in zip(n, k, strict=True)]),
            rows.latency_ms.to_numpy(float) * 1e-3, np.ones(len(m), bool), _GEMM_FIT,
            {"rows": m, "columns": n, "inner": k, "dtype": dtype},
            _gemm_parts,
        )  # fmt: skip


def _gemm_parts(constants: GemmParameters, work: dict[str, Any], gpu: GpuParameters) -> Parts:
    rows, columns, inner = work["rows"], work["columns"], work["inner"]
    wide = 2.0 if work["dtype"] in BF16_COMPUTED else 1.0
    parts = equations.gemm(
        constants, rows, columns, inner, wide, peak(gpu, work["dtype"]),
        gpu.memory.bandwidth_bytes_per_second, gpu.compute.multiprocessors_count,
    )  # fmt: skip
    return equations.cached(
        parts, parts.traffic_bytes, gpu.memory.l2_bytes, constants.benchmark_cache_speedup
    )


# -- attention -----------------------------------------------------------------------------------

_DECODE_FIT = Fit(
    DecodeAttentionParameters,
    {
        "fixed_seconds": (1e-6, 10, 0, 40),
        "memory_efficiency_ratio": (1, 0.85, 0.4, 1.0),
        "extra_bytes": (1e6, 15, 0, 80),
        "seconds_per_row": (1e-9, 1, 0, 10),
    },
)
_PREFILL_FIT = Fit(
    PrefillAttentionParameters,
    {
        "fixed_seconds": (1e-6, 12, 0, 40),
        "compute_efficiency_ratio": (1, 0.65, 0.2, 1.0),
        "extra_tokens": (1, 100, 0, 3000),
        "traffic_ratio": (1, 1, 0, 10),
    },
)


def _attention(folder: Path, gpu: str) -> Iterator[Benchmark]:
    for file, name, axis in (
        ("gen_attention.csv.gz", "decode", "step"),
        ("ctx_attention.csv.gz", "prefill", "isl"),
    ):
        columns = ("kv_cache_dtype", "head_dim", "num_heads", "num_key_value_heads", axis)
        table = read_table(folder, file, gpu, columns)
        for (dtype, width), rows in table.groupby(["kv_cache_dtype", "head_dim"]):
            kv_dtype = DTYPES[str(dtype)]
            heads, kv_heads, requests = (
                rows[column].to_numpy(float)
                for column in ("num_heads", "num_key_value_heads", "batch_size")
            )
            along = rows[axis].to_numpy(float) + (1.0 if name == "decode" else 0.0)
            hd = np.full_like(along, float(str(width)))
            work = {"heads": heads, "kv_heads": kv_heads, "width": hd, "requests": requests}
            yield Benchmark(
                gpu, f"{kv_dtype}_{width}", f"{name}_attention", KINDS[name], (kv_dtype,),
                np.stack([heads, kv_heads, hd, requests], axis=1), along,
                np.array([f"{a:g}/{b:g}" for a, b in zip(heads, kv_heads, strict=True)]),
                rows.latency_ms.to_numpy(float) * 1e-3, np.ones(len(along), bool),
                _DECODE_FIT if name == "decode" else _PREFILL_FIT,
                work | {"tokens": along, "kv_bytes": DTYPE_BYTES[kv_dtype]},
                _decode_parts if name == "decode" else _prefill_parts,
            )  # fmt: skip


def _decode_parts(
    constants: DecodeAttentionParameters, work: dict[str, Any], gpu: GpuParameters
) -> Parts:
    context = work["requests"] * work["tokens"]
    kv = context * 2.0 * work["kv_heads"] * work["width"] * work["kv_bytes"]
    flops = 4.0 * context * work["heads"] * work["width"]
    return equations.decode_attention(
        constants, work["requests"], kv, work["heads"], flops,
        gpu.compute.bf16_flops_per_second, gpu.memory.bandwidth_bytes_per_second,
    )  # fmt: skip


def _prefill_parts(
    constants: PrefillAttentionParameters, work: dict[str, Any], gpu: GpuParameters
) -> Parts:
    tokens = work["requests"] * work["tokens"]
    moved = tokens * (2.0 * work["heads"] + 2.0 * work["kv_heads"]) * work["width"] * 2.0
    return equations.prefill_attention(
        constants, tokens, tokens * work["tokens"] / 2.0, 4.0 * work["heads"] * work["width"],
        moved, gpu.compute.bf16_flops_per_second, gpu.memory.bandwidth_bytes_per_second,
    )  # fmt: skip


# -- latent attention ----------------------------------------------------------------------------

_LATENT_FIT = Fit(
    LatentAttentionParameters,
    {
        "fixed_seconds": (1e-6, 85, 0, 300),
        "memory_efficiency_ratio": (1, 0.9, 0.3, 1.0),
        "compute_efficiency_ratio": (1, 0.6, 0.05, 1.0),
        "seconds_per_row": (1e-9, 3, 0, 30),
    },
)


def _latent(folder: Path, gpu: str) -> Iterator[Benchmark]:
    for file, name, axis in (
        ("mla_gen_module.csv", "decode", "step"),
        ("mla_ctx_module.csv", "prefill", "isl"),
    ):
        table = read_table(folder, file, gpu, ("gemm_type", "kv_cache_dtype", "num_heads", axis))
        for (gemm, kv), rows in table.groupby(["gemm_type", "kv_cache_dtype"]):
            formats = (DTYPES[str(gemm)], DTYPES[str(kv)])
            heads, requests = (
                rows[column].to_numpy(float) for column in ("num_heads", "batch_size")
            )
            along = rows[axis].to_numpy(float) + (1.0 if name == "decode" else 0.0)
            yield Benchmark(
                gpu, "_".join(formats), f"latent_{name}", KINDS[f"mla_{name}"], formats,
                np.stack([heads, requests], axis=1), along,
                np.array([f"{value:g} heads" for value in heads]),
                rows.latency_ms.to_numpy(float) * 1e-3, np.ones(len(along), bool),
                _LATENT_FIT,
                {"heads": heads, "requests": requests, "tokens": along, "formats": formats,
                 "is_decode": name == "decode"},
                _latent_parts,
            )  # fmt: skip


def _latent_parts(
    constants: LatentAttentionParameters, work: dict[str, Any], gpu: GpuParameters
) -> Parts:
    model = from_catalogue("deepseek-v3", *work["formats"])
    heads, requests, tokens = work["heads"], work["requests"], work["tokens"]
    weights = latent_weight_count(model, heads)
    decode_flops, pair_flops = latent_flops(model, heads)
    rows = requests if work["is_decode"] else requests * tokens
    if work["is_decode"]:
        kv = requests * tokens * model.kv_elements_per_token_and_layer * model.kv_bytes
        attention = requests * tokens * decode_flops
    else:
        kv, attention = 0.0, requests * tokens**2 / 2.0 * pair_flops
    bf16 = gpu.compute.bf16_flops_per_second
    wide = model.attention_weight_bytes >= 2.0
    peak = bf16 if wide else gpu.compute.fp8_flops_per_second
    return equations.latent_attention(
        constants, rows * heads, weights * model.attention_weight_bytes + kv,
        2.0 * weights * rows / peak, attention / bf16, gpu.memory.bandwidth_bytes_per_second,
    )  # fmt: skip


# -- all-reduce ----------------------------------------------------------------------------------

_ALL_REDUCE_FIT = Fit(
    AllReduceParameters,
    {"fixed_seconds": (1e-6, 5, 0, 40), "bytes_per_second": (1e9, 150, 10, 900)},
)


def _all_reduce(folder: Path, gpu: str) -> Iterator[Benchmark]:
    columns = ("num_gpus", "message_size", "latency_ms", "backend")
    table = read_table(folder, "custom_allreduce.csv", gpu, columns)
    table = table[table.backend == "vllm_graph"]
    for gpus, rows in table.groupby("num_gpus"):
        size = rows.message_size.to_numpy(float) * 2.0
        count = np.full((len(size), 1), float(str(gpus)))
        yield Benchmark(
            gpu, str(gpus), "all_reduce", KINDS["all_reduce"], (), count, size,
            count[:, 0].astype(str), rows.latency_ms.to_numpy(float) * 1e-3,
            np.ones(len(size), bool), _ALL_REDUCE_FIT,
            {"bytes": size}, _all_reduce_parts,
        )  # fmt: skip


def _all_reduce_parts(
    constants: AllReduceParameters, work: dict[str, Any], _: GpuParameters
) -> Parts:
    size = work["bytes"]
    none = np.zeros_like(size)
    moving = size / constants.bytes_per_second
    return equations.Parts(
        fixed=constants.fixed_seconds + moving, memory=none, compute=none, exponent=1.0,
        moved=none, traffic_bytes=none, tensor_seconds=none,
    )  # fmt: skip
