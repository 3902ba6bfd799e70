"""A simple estimate of power from latency and work: the base of the power model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from predictors.analytic import TERMS, checked_coefficients, fit_nonnegative

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

#: Powers of x = clock over maximum clock that each part may follow. Dynamic power is f V^2 and
#: energy per operation V^2, with V flat at low clocks and about linear above: between x and x^3,
#: and between 1 and x^2.
_STATIC_POWERS = (0, 1, 3)
_RATE_POWERS = (0, 1, 2)

#: Work of the roofline that draws power while it is done: name -> terms (of `TERMS`) in it.
ROOFLINE_WORK: dict[str, tuple[str, ...]] = {
    "memory": ("kv_memory", "expert_memory", "projection_memory"),
    "expert_compute": ("expert_compute",),
    "other_compute": ("projection_compute", "attention_compute"),
}

#: Readings above this share of the power limit say what the limit is, not what the work draws.
_CAPPED_RATIO = 0.97


class PowerBase:
    """Power at each clock from what an iteration does and how long it takes.

    P(x) = sum_p a_p x^p + sum_j (w_j / t(x)) sum_p b_jp x^p

    with w_j the work of kind j, t the latency, and no coefficient negative; it never falls with
    clock as long as t never rises. Static power, power that follows the clock, and energy per
    unit of work: the form of moe-throttle's notes and of arXiv 2607.00819, linear in f at first
    and steeper beyond.

    Args:
        coefficients: Name (of `power_coefficients`) -> value, none negative.
        work: Kind of work -> terms in it.
        terms: Names of the terms' rows.

    Raises:
        PredictorsError: If a coefficient is missing or negative.
    """

    def __init__(
        self,
        coefficients: Mapping[str, float],
        work: Mapping[str, tuple[str, ...]] = ROOFLINE_WORK,
        terms: tuple[str, ...] = TERMS,
    ) -> None:
        self.coefficients = checked_coefficients(coefficients, power_coefficients(work))
        self._kinds = _kinds(work, terms)
        self._static = np.array([self.coefficients[f"static_{p}"] for p in _STATIC_POWERS])
        self._rates = np.array(
            [[self.coefficients[f"{kind}_{p}"] for p in _RATE_POWERS] for kind in work]
        )

    @property
    def weights(self) -> NDArray[np.float64]:
        """How terms are weighed into kinds of work, (J, T)."""
        return self._kinds

    def work(self, terms: NDArray[np.float64]) -> NDArray[np.float64]:
        """Work of each kind, (J, K), from terms (T, K)."""
        done: NDArray[np.float64] = self._kinds @ terms
        return done

    def static_watts(self, clock_ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        """What does not depend on the work, (C,)."""
        watts: NDArray[np.float64] = _powers(clock_ratios, _STATIC_POWERS).T @ self._static
        return watts

    def rates(self, clock_ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        """Joules per unit of each kind of work, (J, C)."""
        rates: NDArray[np.float64] = self._rates @ _powers(clock_ratios, _RATE_POWERS)
        return rates

    def watts(
        self,
        terms: NDArray[np.float64],
        clock_ratios: NDArray[np.float64],
        seconds: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Power without any limit.

        Args:
            terms: (T, K).
            clock_ratios: (C,).
            seconds: (K, C) latency.

        Returns:
            (K, C).
        """
        work = self.work(terms).T @ self.rates(clock_ratios)
        watts: NDArray[np.float64] = self.static_watts(clock_ratios) + work / seconds
        return watts

    def watts_of_rows(
        self,
        terms: NDArray[np.float64],
        clock_ratios: NDArray[np.float64],
        seconds: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """The same for one clock per shape: terms (T, N), others (N,)."""
        rates = np.einsum("jn,jn->n", self.work(terms), self.rates(clock_ratios))
        watts: NDArray[np.float64] = self.static_watts(clock_ratios) + rates / seconds
        return watts

    @classmethod
    def fit(  # noqa: PLR0917 (each is one thing that callers name)
        cls,
        terms: NDArray[np.float64],
        clock_ratios: NDArray[np.float64],
        seconds: NDArray[np.float64],
        watts: NDArray[np.float64],
        limit_watts: NDArray[np.float64] | float,
        work: Mapping[str, tuple[str, ...]] = ROOFLINE_WORK,
        names: tuple[str, ...] = TERMS,
        weights: NDArray[np.float64] | None = None,
    ) -> PowerBase:
        """Fit by non-negative least squares of the relative error.

        Args:
            terms: (T, N).
            clock_ratios: (N,) clock over maximum clock.
            seconds: (N,) predicted durations, as serving will have them.
            watts: (N,) measured power.
            limit_watts: Power limit; rows at it are left out if others remain.
            work: Kind of work -> terms in it.
            names: Names of the terms' rows.
            weights: (N,) how much each row counts; all alike if None.
        """
        weights = np.ones(len(watts)) if weights is None else weights
        free = watts < _CAPPED_RATIO * limit_watts
        if np.count_nonzero(free) < min(30, len(watts)):
            free = np.ones(len(watts), dtype=bool)
        terms, clock_ratios, seconds = terms[:, free], clock_ratios[free], seconds[free]
        done = (_kinds(work, names) @ terms) / seconds
        powers = _powers(clock_ratios, _RATE_POWERS)
        columns = np.concatenate(
            [_powers(clock_ratios, _STATIC_POWERS), *(kind * powers for kind in done)]
        )
        found = fit_nonnegative(columns, watts[free], weights[free])
        coefficients = dict(zip(power_coefficients(work), map(float, found), strict=True))
        # keeps the base above zero for every shape
        least = max(coefficients["static_0"], 0.01 * float(np.median(watts)))
        return cls(coefficients | {"static_0": least}, work, names)


def power_coefficients(work: Mapping[str, tuple[str, ...]] = ROOFLINE_WORK) -> tuple[str, ...]:
    """Names of the coefficients, in order."""
    return (
        *(f"static_{power}" for power in _STATIC_POWERS),
        *(f"{kind}_{power}" for kind in work for power in _RATE_POWERS),
    )


def _kinds(work: Mapping[str, tuple[str, ...]], terms: tuple[str, ...]) -> NDArray[np.float64]:
    """(J, T) that sums terms into kinds of work."""
    return np.array([[float(term in inside) for term in terms] for inside in work.values()])


def _powers(clock_ratios: NDArray[np.float64], powers: tuple[int, ...]) -> NDArray[np.float64]:
    return np.stack([clock_ratios**power for power in powers])
