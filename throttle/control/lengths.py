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
    from collections.abc import Sequence

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
#: An answer may end early; this share of those alive is allowed to, when its limits are judged.
_EARLY_SHARE = 0.02
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
class LengthBelief:
    """What is believed of their remaining output, tokens, at least 1; (n,) each.

    Attributes:
        planned_tokens: To plan with; whole.
        early_tokens: Within these, one in fifty ends; never more than planned.
    """

    planned_tokens: NDArray[np.float64]
    early_tokens: NDArray[np.float64]


class LengthCurve:
    """Survival curve of one class of requests."""

    def __init__(self) -> None:
        logs = np.log(_EDGES / _PRIOR_MEDIAN_TOKENS) / _PRIOR_SPREAD
        density = np.exp(-0.5 * logs**2) * np.gradient(np.log(_EDGES))
        self._ended = _PRIOR_WEIGHT * density / density.sum()
        self._censored = np.zeros_like(self._ended)
        self._unseen = 0.0
        self._expected_remaining, self._early_remaining = self._compute()

    def add(self, generated_tokens: int, *, censored: bool) -> None:
        """Take in one answer of `generated_tokens`, which ended there or was cut there."""
        index = min(int(np.searchsorted(_EDGES, generated_tokens)), len(_EDGES) - 1)
        (self._censored if censored else self._ended)[index] += 1.0
        self._unseen += 1.0
        if self._unseen >= _REFRESH_SHARE * (self._ended.sum() + self._censored.sum()):
            if self._ended.sum() + self._censored.sum() > _MEMORY_ANSWERS:
                self._ended *= 0.5
                self._censored *= 0.5
            self._expected_remaining, self._early_remaining = self._compute()
            self._unseen = 0.0

    def expected_remaining_tokens(
        self, generated_tokens: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """E[L - g | L > g] for each g in `generated_tokens`, at least 1."""
        positions = np.searchsorted(_EDGES, generated_tokens, side="right")
        remaining: NDArray[np.float64] = self._expected_remaining[positions]
        return remaining

    def early_remaining_tokens(self, generated_tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tokens within which one answer in fifty ends, for each g in `generated_tokens`."""
        positions = np.searchsorted(_EDGES, generated_tokens, side="right")
        early: NDArray[np.float64] = self._early_remaining[positions]
        return early

    def _compute(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        # Entry i is for g in [edge[i-1], edge[i]): the answer outlived the bins before i.
        at_risk = np.cumsum((self._ended + self._censored)[::-1])[::-1]
        hazard = np.divide(self._ended, at_risk, out=np.zeros_like(at_risk), where=at_risk > 0)
        survival = np.concatenate([[1.0], np.cumprod(1.0 - np.minimum(hazard, 1.0))])
        starts = np.concatenate([[0.0], _EDGES])
        widths = np.diff(starts)
        # Mean residual life by the area under the curve: sum over later bins of S * width.
        area = np.concatenate([np.cumsum((survival[:-1] * widths)[::-1])[::-1], [0.0]])
        remaining = np.divide(area, survival, out=np.ones_like(area), where=survival > 1e-12)
        # The first bin after which less than nine tenths of those alive at i are left.
        ends = np.searchsorted(-survival, -(1.0 - _EARLY_SHARE) * survival, side="left")
        early = starts[np.minimum(ends, len(starts) - 1)] - starts
        return np.maximum(remaining, 1.0), np.maximum(early, 1.0)


class LengthBeliefs:
    """One curve per class, and what the engine itself predicts."""

    def __init__(self) -> None:
        self._curves: dict[str, LengthCurve] = {}

    def add(self, length_class: str, generated_tokens: int, *, censored: bool) -> None:
        """Take in one answer of a class."""
        self._curve(length_class).add(generated_tokens, censored=censored)

    def beliefs(self, requests: RequestLengths) -> LengthBelief:
        """Planned and early remaining output of each request.

        An engine's prediction is used until the answer has outlived it (throttLL'eM falls back to
        the maximum there; the curve is used instead, capped by the maximum).
        """
        generated = requests.generated_tokens
        remaining, early = np.empty(len(generated)), np.empty(len(generated))
        for index in np.unique(requests.class_index).astype(int):
            mask = requests.class_index == index
            curve = self._curve(requests.classes[index])
            remaining[mask] = curve.expected_remaining_tokens(generated[mask])
            early[mask] = curve.early_remaining_tokens(generated[mask])
        predicted = requests.predicted_output_tokens - generated
        remaining = np.where(predicted > 0, predicted, remaining)  # NaN compares false
        limit = np.maximum(requests.max_output_tokens - generated, 1.0)
        planned = np.maximum(np.ceil(np.minimum(remaining, limit)), 1.0)
        return LengthBelief(planned, np.minimum(early, planned))

    def _curve(self, length_class: str) -> LengthCurve:
        curve = self._curves.get(length_class)
        if curve is None:
            curve = self._curves[length_class] = LengthCurve()
        return curve
