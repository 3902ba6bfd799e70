"""Triton kernels: the clock probe, and the grouped GEMM of a MoE layer.

Imported only on a machine that has Triton.
"""

from __future__ import annotations

import importlib
from typing import Any

triton: Any = importlib.import_module("triton")  # no types, and absent where there is no GPU
tl: Any = importlib.import_module("triton.language")


@triton.jit
def probe_kernel(out, cycles):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Spin for some SM cycles; store the global timer before and after (ns), and the cycles."""
    begin = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    first = tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    now = first
    while now - first < cycles:
        now = tl.inline_asm_elementwise(
            "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    end = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    tl.store(out, begin)
    tl.store(out + 1, end)
    tl.store(out + 2, now - first)


@triton.jit
def timer_kernel(out, count):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Read the global timer again and again, to see how coarsely it ticks."""
    for index in range(count):
        now = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
        tl.store(out + index, now)


@triton.jit  # type: ignore[untyped-decorator]
def grouped_gemm_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201, PLR0917
    x,  # noqa: ANN001
    w,  # noqa: ANN001
    y,  # noqa: ANN001
    pair_of_row,  # noqa: ANN001
    expert_of_block,  # noqa: ANN001
    pairs_count,  # noqa: ANN001
    columns,  # noqa: ANN001
    inner,  # noqa: ANN001
    PAIRS_PER_X_ROW: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
):
    """`y[pair] = x[pair // PAIRS_PER_X_ROW] @ w[expert].T`, one expert per block of rows.

    x is (rows, inner), w (experts, columns, inner), y (pairs, columns); inner is a multiple of
    BLOCK_K.
    """
    block_m = tl.program_id(1)
    block_n = tl.program_id(0)
    expert = tl.load(expert_of_block + block_m).to(tl.int64)
    pairs = tl.load(pair_of_row + block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    valid = pairs < pairs_count
    offsets_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = tl.arange(0, BLOCK_K)
    inside = offsets_n < columns
    x_at = x + (pairs // PAIRS_PER_X_ROW)[:, None] * inner + offsets_k[None, :]
    w_at = w + expert * columns * inner + offsets_n[None, :] * inner + offsets_k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, inner, BLOCK_K):
        left = tl.load(x_at, mask=valid[:, None], other=0.0)
        right = tl.load(w_at, mask=inside[None, :], other=0.0)
        total = tl.dot(left, right, total)
        x_at += BLOCK_K
        w_at += BLOCK_K
    y_at = y + pairs[:, None] * columns + offsets_n[None, :]
    tl.store(y_at, total.to(tl.bfloat16), mask=valid[:, None] & inside[None, :])
