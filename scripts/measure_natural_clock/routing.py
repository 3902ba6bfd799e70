"""Which token goes to which expert, and how grouped GEMM lays the pairs out in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Token-expert pairs sorted by expert, each expert's padded to whole blocks.

    Attributes:
        pair_of_row: Pair (token times experts per token plus choice) of each row, or the number of
            pairs where the row is padding; shape (rows,).
        expert_of_block: Expert of each block of rows; shape (blocks,).
        active_experts_count: Experts that at least one token chose.
    """

    pair_of_row: NDArray[np.int32]
    expert_of_block: NDArray[np.int32]
    active_experts_count: int


def draw_choices(tokens: int, experts: int, experts_per_token: int, seed: int) -> NDArray[np.int64]:
    """Uniform routing: each token chooses different experts; shape (tokens, experts_per_token)."""
    generator = np.random.default_rng(seed)
    return generator.random((tokens, experts)).argsort(axis=1)[:, :experts_per_token]


def lay_out(choices: NDArray[np.int64], block_rows: int) -> BlockLayout:
    """Sort pairs by expert into blocks of so many rows."""
    flat = choices.reshape(-1)
    rows: list[NDArray[np.int64]] = []
    experts: list[int] = []
    active = np.unique(flat)
    for expert in active.tolist():
        pairs = np.flatnonzero(flat == expert)
        padding = -len(pairs) % block_rows
        rows += [pairs, np.full(padding, len(flat))]
        experts += [expert] * ((len(pairs) + padding) // block_rows)
    return BlockLayout(
        np.concatenate(rows).astype(np.int32), np.array(experts, dtype=np.int32), len(active)
    )
