"""How many experts of a layer an iteration reads: by formula, by a fitted skew, or from latency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.errors import PredictorsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: What a figure of active experts rests on.
SOURCES: tuple[str, ...] = ("uniform", "reported", "residuals", "all")

#: Skew exponents that a fit tries.
_SKEWS = tuple(round(0.1 * step, 1) for step in range(16))

#: Tokens at which the skewed formula is tabulated; between them it is linear in log tokens.
TABLE_TOKENS = np.geomspace(2.0**-6, 2.0**17, 24 * 4)
LOG_TABLE_TOKENS = np.log(TABLE_TOKENS)

#: A skew must lower the error by this share before it replaces the uniform router: fits of latency
#: hardly tell small skews apart.
_LEAST_GAIN_RATIO = 0.02


def expected_active_experts(
    tokens: NDArray[np.float64], experts_count: int, experts_per_token: int
) -> NDArray[np.float64]:
    """Experts of one layer that at least one token takes, if the router chooses uniformly.

    A = E * (1 - (1 - k/E)^n), the expectation for n independent tokens that each take k of E
    experts. Skewed routing activates fewer.

    Args:
        tokens: Tokens in the iteration, any shape; fractions allowed.
        experts_count: E.
        experts_per_token: k.

    Returns:
        Expected experts, of the shape of `tokens`.
    """
    if experts_per_token >= experts_count:
        return np.full_like(tokens, experts_count, dtype=np.float64)
    log_missed = math.log1p(-experts_per_token / experts_count)
    active: NDArray[np.float64] = np.expm1(tokens * log_missed)
    active *= -experts_count
    return active


@dataclass(frozen=True, slots=True)
class Routing:
    """How a model's router spreads tokens, and how that is known.

    Attributes:
        skew_exponent: s of a popularity that falls as rank^-s; 0 is a uniform router.
        source: "uniform" (assumed), "reported" (fitted to counts that the engine gave),
            "residuals" (fitted to latency), or "all" (every expert always counts as active, as for
            a dense model: what an ablation compares with).
    """

    skew_exponent: float = 0.0
    source: str = "uniform"

    def __post_init__(self) -> None:
        """Refuse what no fit gives.

        Raises:
            PredictorsError: Naming the value and what is allowed.
        """
        if not 0.0 <= self.skew_exponent <= _SKEWS[-1]:
            raise PredictorsError(
                f"skew_exponent is {self.skew_exponent!r}; allowed: 0 to {_SKEWS[-1]}"
            )
        if self.source not in SOURCES:
            raise PredictorsError(
                f"source of routing is {self.source!r}; allowed: {', '.join(SOURCES)}"
            )


class ActiveExperts:
    """Active experts by number of tokens, fast enough to ask before every decision.

    A(n) = sum_e 1 - (1 - q_e)^n with q_e ~ rank^-s, at most 1, summing to k. Tokens are taken as
    independent; those of one request are not quite, which lowers A at a few tens of tokens.

    Args:
        experts_count: E.
        experts_per_token: k.
        skew_exponent: s; 0 gives `expected_active_experts`.

    Attributes:
        experts_per_token: k.
        table: A at `TABLE_TOKENS`; None for a uniform router, which needs none.
    """

    def __init__(
        self, experts_count: int, experts_per_token: int, skew_exponent: float = 0.0
    ) -> None:
        self._experts_count, self.experts_per_token = experts_count, experts_per_token
        self.table: NDArray[np.float64] | None = None
        if skew_exponent > 0.0 and experts_per_token < experts_count:
            chosen = selection_probabilities(experts_count, experts_per_token, skew_exponent)
            with np.errstate(divide="ignore"):
                missed = np.log1p(-chosen)
            self.table = -np.expm1(np.multiply.outer(TABLE_TOKENS, missed)).sum(axis=1)

    def __call__(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Expected active experts of one layer, of the shape of `tokens`."""
        if self.table is None:
            return expected_active_experts(tokens, self._experts_count, self.experts_per_token)
        logs = np.log(np.maximum(tokens, TABLE_TOKENS[0]))
        active: NDArray[np.float64] = np.interp(logs, LOG_TABLE_TOKENS, self.table)
        return active


def selection_probabilities(
    experts_count: int, experts_per_token: int, skew_exponent: float
) -> NDArray[np.float64]:
    """Probability that a token takes each expert, by falling popularity, (E,); they sum to k."""
    weights = np.arange(1, experts_count + 1, dtype=np.float64) ** -skew_exponent
    chosen = np.zeros(experts_count)
    certain = 0
    while certain < experts_per_token:  # who would be taken more than always is taken always
        rest = weights[certain:]
        chosen[certain:] = rest * ((experts_per_token - certain) / rest.sum())
        if chosen[certain] <= 1.0:
            break
        chosen[certain] = 1.0
        certain += 1
    return np.minimum(chosen, 1.0)


def fit_reported_skew(
    tokens: NDArray[np.float64],
    active_experts: NDArray[np.float64],
    experts_count: int,
    experts_per_token: int,
) -> Routing:
    """The skew that explains counts which an engine reported.

    Args:
        tokens: (N,) tokens of each iteration.
        active_experts: (N,) mean active experts of a layer.
        experts_count: E.
        experts_per_token: k.
    """
    errors = [
        float(
            np.mean(
                (ActiveExperts(experts_count, experts_per_token, skew)(tokens) / active_experts - 1)
                ** 2
            )
        )
        for skew in _SKEWS
    ]
    return Routing(_SKEWS[int(np.argmin(errors))], "reported")


def chosen_skew(errors: dict[float, float]) -> Routing:
    """The skew with the least error of latency, if it is worth leaving the uniform router.

    Args:
        errors: Skew exponent -> error of a fit with it; holds 0.
    """
    best = min(errors, key=lambda skew: (errors[skew], skew))
    if best == 0.0 or errors[best] > (1.0 - _LEAST_GAIN_RATIO) * errors[0.0]:
        return Routing()
    return Routing(best, "residuals")


def skews_to_try() -> tuple[float, ...]:
    """Skew exponents for `chosen_skew`, rising from 0."""
    return _SKEWS


class ActiveExpertsEstimator:
    """Active experts seen through latency, while serving.

    A_hat = (t - t_other) * bw / (L * 3 * H * I * wb): what an iteration took beyond everything but
    reading experts, in experts. With the fitted base, `expert_seconds` is the time that reading all
    experts of the formula takes, so that A_hat / A = (t - t_other) / expert_seconds. Only
    iterations in which that time is a good share of the whole tell anything.

    Args:
        smoothing: Weight of one iteration in the smoothed ratio.
        least_share: Least share of the predicted time that reading experts must take.
    """

    def __init__(self, smoothing: float = 0.02, least_share: float = 0.3) -> None:
        self._smoothing, self._least_share = smoothing, least_share
        self._ratio, self._count = 1.0, 0

    @property
    def ratio(self) -> float:
        """Active experts over those of the formula, smoothed; 1 before the first iteration."""
        return self._ratio

    @property
    def source(self) -> str:
        """What `ratio` rests on: "inverted" once iterations were taken in, else "formula"."""
        return "inverted" if self._count else "formula"

    def observe(
        self, observed_seconds: float, predicted_seconds: float, expert_seconds: float
    ) -> None:
        """Take in one iteration that had no prompts.

        Args:
            observed_seconds: Its duration.
            predicted_seconds: Predicted duration with the formula's active experts.
            expert_seconds: The part of it that reads experts.
        """
        if expert_seconds < self._least_share * predicted_seconds:
            return
        ratio = 1.0 + (observed_seconds - predicted_seconds) / expert_seconds
        ratio = min(max(ratio, 0.1), 2.0)  # one odd iteration says little
        self._count += 1
        weight = max(self._smoothing, 1.0 / (self._count + 1.0))
        self._ratio += weight * (ratio - self._ratio)

    def active_experts(
        self, formula: float, experts_count: int, experts_per_token: int = 1
    ) -> float:
        """A_hat for an iteration, between k and E."""
        return min(max(formula * self._ratio, float(experts_per_token)), float(experts_count))
