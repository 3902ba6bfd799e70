"""How many tokens an answer will still have, learned from answers that ended.

A survival curve per class (Kaplan and Meier 1958): requests cut by their limit or aborted are
censored, not counted as short. Output lengths are heavy-tailed (coefficient of variation 0.8 to 1.3
on public traces), so a curve serves better than one predicted number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

#: Longest answer told apart, tokens.
_LONGEST_TOKENS = 131072
#: Bin edges: every length up to 32, then about 6 % apart.
_EDGES = np.unique(
    np.concatenate([np.arange(1, 33), np.geomspace(32, _LONGEST_TOKENS, 144).round()])
)
#: Before any answer is seen: log-normal with this median and spread, worth this many answers.
#: Assumed, in the range of public conversation traces (medians 39 to 129; reasoning: 2035).
_PRIOR_MEDIAN_TOKENS = 128.0
_PRIOR_SPREAD = 1.1
_PRIOR_WEIGHT = 4.0
#: Counts are halved once they exceed this many answers, so that the curve follows a drift.
_MEMORY_ANSWERS = 4000.0
#: The curve is computed anew when this share of answers is new.
_REFRESH_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class RequestLengths:
    """What is known of the answers of some requests; (n,) each but `classes`.

    Attributes:
        classes: Names of the classes.
        class_index: Each request's class, as a position in `classes`.
        generated_tokens: Output so far.
        max_output_tokens: Its limit; infinite where there is none.
        predicted_output_tokens: The engine's guess; NaN where there is none.
    """

    classes: Sequence[str]
    class_index: NDArray[np.float64]
    generated_tokens: NDArray[np.float64]
    max_output_tokens: NDArray[np.float64]
    predicted_output_tokens: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LengthTable:
    """All curves at once, for compiled code.

    Attributes:
        starts: Lengths between which the curves are linear, rising, (S,).
        survival: Share of answers longer than each, (L, S): one row per class, everyone last.
        expected_remaining: E[L - g | L > g] for g from each start on, likewise.
        excess: Stationary excess of the last row's curve, (S,).
    """

    starts: NDArray[np.float64]
    survival: NDArray[np.float64]
    expected_remaining: NDArray[np.float64]
    excess: NDArray[np.float64]

    @property
    def arguments(self) -> tuple[NDArray[np.float64], ...]:
        """Its fields, in order."""
        return (self.starts, self.survival, self.expected_remaining, self.excess)

    @classmethod
    def of(cls, curves: Sequence[LengthCurve]) -> LengthTable:
        """The curves in this order."""
        last = curves[-1]
        return cls(
            last.starts,
            np.array([curve.survival for curve in curves]),
            np.array([curve.expected_remaining for curve in curves]),
            last.excess,
        )


class LengthCurve:
    """Survival curve of some requests.

    Attributes:
        starts: Lengths between which the curves are linear, rising, (S,).
        survival: Share of answers longer than each, (S,).
        excess: Its stationary excess, (S,).
        expected_remaining: E[L - g | L > g] for g from each start on, (S,).
    """

    starts: NDArray[np.float64]
    survival: NDArray[np.float64]
    excess: NDArray[np.float64]
    expected_remaining: NDArray[np.float64]

    def __init__(self) -> None:
        logs = np.log(_EDGES / _PRIOR_MEDIAN_TOKENS) / _PRIOR_SPREAD
        density = np.exp(-0.5 * logs**2) * np.gradient(np.log(_EDGES))
        self._ended = _PRIOR_WEIGHT * density / density.sum()
        self._censored = np.zeros_like(self._ended)
        self._unseen = 0.0
        self._compute()

    def add(self, generated_tokens: int, *, censored: bool) -> bool:
        """Take in one answer of `generated_tokens`, which ended there or was cut there.

        Returns:
            Whether the curve was computed anew.
        """
        index = min(int(np.searchsorted(_EDGES, generated_tokens)), len(_EDGES) - 1)
        (self._censored if censored else self._ended)[index] += 1.0
        self._unseen += 1.0
        due = bool(self._unseen >= _REFRESH_SHARE * (self._ended.sum() + self._censored.sum()))
        if due:
            if self._ended.sum() + self._censored.sum() > _MEMORY_ANSWERS:
                self._ended *= 0.5
                self._censored *= 0.5
            self._compute()
            self._unseen = 0.0
        return due

    def expected_remaining_tokens(
        self, generated_tokens: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """E[L - g | L > g] for each g in `generated_tokens`, at least 1."""
        positions = np.searchsorted(_EDGES, generated_tokens, side="right")
        remaining: NDArray[np.float64] = self.expected_remaining[positions]
        return remaining

    def survival_ratio(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of answers longer than each of `tokens`."""
        alive: NDArray[np.float64] = np.interp(tokens, self.starts, self.survival)
        return alive

    def successor_ratio(self, iterations: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of a steady batch that is not of today's requests, so many iterations from now.

        What is left of the requests of a steady batch follows the curve's stationary excess.
        """
        joined: NDArray[np.float64] = 1.0 - np.interp(iterations, self.starts, self.excess)
        return joined

    def mean_tokens(self, going_on_tokens: NDArray[np.float64]) -> float:
        """Mean length of an answer.

        Args:
            going_on_tokens: Output so far of answers that still go on, (n,). They are censored
                there: without them, long answers would be missed until the first of them end.
        """
        places = np.minimum(np.searchsorted(_EDGES, going_on_tokens), len(_EDGES) - 1)
        censored = self._censored + np.bincount(places, minlength=len(_EDGES))
        survival = self._survival_ratio(censored)
        return float(survival[:-1] @ np.diff(self.starts))

    def _survival_ratio(self, censored: NDArray[np.float64]) -> NDArray[np.float64]:
        # Entry i is for g in [start[i], start[i+1]): the answer outlived the bins before i.
        at_risk = np.cumsum((self._ended + censored)[::-1])[::-1]
        hazard = np.divide(self._ended, at_risk, out=np.zeros_like(at_risk), where=at_risk > 0)
        return np.concatenate([[1.0], np.cumprod(1.0 - np.minimum(hazard, 1.0))])

    def _compute(self) -> None:
        survival = self._survival_ratio(self._censored)
        starts = np.concatenate([[0.0], _EDGES])
        # Mean residual life by the area under the curve: sum over later bins of S * width.
        area = np.cumsum((survival[:-1] * np.diff(starts))[::-1])[::-1]
        area = np.concatenate([area, [0.0]])
        remaining = np.divide(area, survival, out=np.ones_like(area), where=survival > 1e-12)
        self.starts, self.survival = starts, survival
        self.excess = area / area[0]
        self.expected_remaining = np.maximum(remaining, 1.0)


class LengthBeliefs:
    """One curve per class, one of everyone, and what the engine itself predicts."""

    def __init__(self) -> None:
        self._curves: dict[str, LengthCurve] = {}
        self._everyone = LengthCurve()
        self._table: LengthTable | None = None
        self._table_classes: Sequence[str] = ()

    @property
    def everyone(self) -> LengthCurve:
        """The curve of all requests, for those that have not come yet."""
        return self._everyone

    def add(self, length_class: str, generated_tokens: int, *, censored: bool) -> None:
        """Take in one answer of a class."""
        for curve in (self._curve(length_class), self._everyone):
            if curve.add(generated_tokens, censored=censored):
                self._table = None

    def table(self, classes: Sequence[str]) -> LengthTable:
        """The curves of these classes, in order, and everyone's last; made anew if one changed."""
        if self._table is None or classes != self._table_classes:
            curves = [*(self._curve(name) for name in classes), self._everyone]
            self._table, self._table_classes = LengthTable.of(curves), classes
        return self._table

    def planned_tokens(self, requests: RequestLengths) -> NDArray[np.float64]:
        """Remaining output of each request to plan with, tokens, whole, at least 1, (n,).

        An engine's prediction is used until the answer has outlived it (throttLL'eM falls back to
        the maximum there; the curve is used instead, capped by the maximum).
        """
        generated = requests.generated_tokens
        remaining = np.empty(len(generated))
        for mask, curve in self._by_class(requests):
            remaining[mask] = curve.expected_remaining_tokens(generated[mask])
        predicted = requests.predicted_output_tokens - generated
        remaining = np.where(predicted > 0, predicted, remaining)  # NaN compares false
        limit = np.maximum(requests.max_output_tokens - generated, 1.0)
        planned: NDArray[np.float64] = np.maximum(np.ceil(np.minimum(remaining, limit)), 1.0)
        return planned

    def ending_shares(
        self, requests: RequestLengths, ahead_tokens: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Probability that each answer ends within each stretch of its next tokens, (n, K).

        Args:
            requests: The requests, n of them; each is known to go on.
            ahead_tokens: Ends of the stretches, tokens from now, rising in each row, (n, K).
        """
        if not len(requests.generated_tokens):
            return np.empty(ahead_tokens.shape)
        reached = requests.generated_tokens[:, None] + ahead_tokens
        alive = np.empty_like(reached)
        for mask, curve in self._by_class(requests):
            now = curve.survival_ratio(requests.generated_tokens[mask])
            alive[mask] = curve.survival_ratio(reached[mask]) / np.maximum(now, 1e-9)[:, None]
        predicted = requests.predicted_output_tokens
        guessed = predicted > requests.generated_tokens
        if guessed.any():
            alive[guessed] = reached[guessed] < predicted[guessed, None]
        alive[reached >= requests.max_output_tokens[:, None]] = 0.0
        shares: NDArray[np.float64] = -np.diff(alive, axis=1, prepend=1.0)
        return shares

    def _by_class(
        self, requests: RequestLengths
    ) -> Iterator[tuple[NDArray[np.bool_], LengthCurve]]:
        for index in np.unique(requests.class_index).astype(int):
            yield requests.class_index == index, self._curve(requests.classes[index])

    def _curve(self, length_class: str) -> LengthCurve:
        curve = self._curves.get(length_class)
        if curve is None:
            curve = self._curves[length_class] = LengthCurve()
        return curve
