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
    unselected = np.ones(experts_count)
    active, fullest = [0.0], [0.0]
    for _ in range(tokens_limit):
        unselected *= 1.0 - probabilities
        selected = 1.0 - unselected
        active.append(float(selected.sum()))
        if ranks_count > 1:
            most = [
                selected[placement].reshape(ranks_count, -1).sum(axis=1).max()
                for placement in placements
            ]
            fullest.append(float(np.mean(most)))
        else:
            fullest.append(active[-1])
    mean_load = experts_per_token / ranks_count
    return RoutingTable(tuple(active), tuple(fullest), float(np.mean(loads)) / mean_load)
