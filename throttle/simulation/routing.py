"""Which experts a batch of tokens activates under skewed routing."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """Active experts and load by number of tokens.

    Attributes:
        active_experts: Expected experts that at least one of n tokens selects, over all ranks;
            index n.
        fullest_rank_active_experts: The same on the rank with most of them.
        fullest_rank_load_ratio: Token-expert pairs of the most loaded rank over the mean rank's.
    """

    active_experts: tuple[float, ...]
    fullest_rank_active_experts: tuple[float, ...]
    fullest_rank_load_ratio: float


def selection_probabilities(
    experts_count: int, experts_per_token: int, skew_exponent: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Probability that a token selects each expert: `rank^-s`, at most 1, summing to k.

    Experts whose share exceeds 1 are always selected; the rest share what remains.

    Returns:
        Probabilities by falling popularity, shape (experts_count,).
    """
    weights = np.arange(1, experts_count + 1, dtype=np.float64) ** -skew_exponent
    probabilities = np.zeros(experts_count)
    certain = 0
    while certain < experts_per_token:
        tail = weights[certain:]
        probabilities[certain:] = tail * ((experts_per_token - certain) / tail.sum())
        if probabilities[certain] <= 1.0:
            break
        probabilities[certain] = 1.0
        certain += 1
    return np.minimum(probabilities, 1.0)


@functools.lru_cache(maxsize=16)
def routing_table(
    experts_count: int,
    experts_per_token: int,
    skew_exponent: float,
    ranks_count: int,
    tokens_limit: int,
) -> RoutingTable:
    """Expected active experts for 0 to `tokens_limit` tokens, `A = sum_e 1 - (1 - q_e)^n`.

    Tokens select independently of each other (those of one request are in truth correlated, which
    lowers the figure at a few tens of tokens). Over several ranks, popularity is spread by a few
    fixed random placements, one per group of layers, and the fullest rank is averaged over them.
    """
    probabilities = selection_probabilities(experts_count, experts_per_token, skew_exponent)
    placements = [np.random.default_rng(seed).permutation(experts_count) for seed in range(8)]
    loads = [
        probabilities[placement].reshape(ranks_count, -1).sum(axis=1).max()
        for placement in placements
    ]
    tokens = np.arange(tokens_limit + 1, dtype=np.float64)[:, None]
    selected = 1.0 - (1.0 - probabilities) ** tokens
    active = selected.sum(axis=1)
    fullest = active
    if ranks_count > 1:
        most = [
            selected[:, placement].reshape(len(tokens), ranks_count, -1).sum(axis=2).max(axis=1)
            for placement in placements
        ]
        fullest = np.mean(most, axis=0)
    mean_load = experts_per_token / ranks_count
    ratio = float(np.mean(loads)) / mean_load
    return RoutingTable(tuple(active.tolist()), tuple(fullest.tolist()), ratio)
