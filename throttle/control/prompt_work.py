"""How many prompt tokens come in between: the interruptions that a generating request meets.

A request shares its iterations with the prompts of others, and a short answer has few tokens to
spread one long prompt over. How much prompt work falls into a window of time is therefore learned
as it comes, bursts and heavy tails included: for windows of many lengths, each begun where a first
token was produced, the share in which any prompt came, and the mean and variance of the tokens.
Arrivals do not wait for the engine, so the figures hold at every clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.control.state import Phase

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.state import IterationState

#: Lengths of the windows: from half a fast iteration to where bursts have averaged out.
_WINDOW_SECONDS = np.geomspace(0.02, 8.0, 16)
#: Prompt iterations remembered: about a minute of a busy engine.
_MEMORY_ITERATIONS = 1024
#: Fewer of them tell nothing yet.
_LEAST_ITERATIONS = 20
#: The variance within windows is taken for this many times what the last minute showed: bursts are
#: rarer than the windows that were seen, and the tails of their work heavier than gamma's. Chosen
#: on the Azure trace, where the share of late answers was twice the budget with 1.
_BURST_VARIANCE_RATIO = 1.5
#: A work window begins with the iteration after the one that it is measured from.
_SAME_MOMENT_SECONDS = 1e-4
#: Spread of the tokens in one window, as a share of their mean, is never believed to be less.
_LEAST_SPREAD_RATIO = 0.3


@dataclass(frozen=True, slots=True)
class PromptWork:
    """Prompt tokens that fall into windows of time, (W,) each.

    Attributes:
        log_seconds: Logarithm of the windows' lengths, rising.
        any_ratio: Share of windows with any prompt.
        log_mean_tokens: Logarithm of the mean of tokens, in windows that have some.
        log_variance: Logarithm of their variance.
    """

    log_seconds: NDArray[np.float64]
    any_ratio: NDArray[np.float64]
    log_mean_tokens: NDArray[np.float64]
    log_variance: NDArray[np.float64]

    def within(
        self, seconds: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Share of windows with prompts, their mean tokens and variance, for lengths of any shape.

        Shorter windows than those measured meet proportionally fewer prompts, longer ones hold
        proportionally more.
        """
        grid = self.log_seconds
        seconds = np.maximum(seconds, 1e-6)
        log_seconds = np.log(seconds)
        shrunk = np.minimum(seconds / np.exp(grid[0]), 1.0)
        grown = np.maximum(seconds / np.exp(grid[-1]), 1.0)
        mean = np.exp(np.interp(log_seconds, grid, self.log_mean_tokens))
        variance = np.exp(np.interp(log_seconds, grid, self.log_variance))
        any_ratio = np.interp(log_seconds, grid, self.any_ratio)
        return any_ratio * shrunk, mean * grown, variance * grown


class PromptWorkEstimator:
    """Remembers the prompt iterations of about the last minute."""

    def __init__(self) -> None:
        self._rows: deque[tuple[float, float, float, float]] = deque(maxlen=_MEMORY_ITERATIONS)
        self._last_seconds = 0.0

    def add(self, state: IterationState) -> None:
        """Take in one state; those that computed no prompt only pass time."""
        work = state.scheduled
        if state.phase is Phase.COMPLETED and work.sum_prefill_tokens:
            end = state.engine_time_seconds
            duration = state.iteration_duration_seconds
            start = self._last_seconds if duration is None else end - duration
            tokens, prompts = work.sum_prefill_tokens, work.num_prefill_requests
            self._rows.append((start, end, tokens, prompts))
        self._last_seconds = state.engine_time_seconds

    def estimate(self) -> PromptWork | None:
        """What was seen; None while that is too little."""
        if len(self._rows) < _LEAST_ITERATIONS:
            return None
        start, end, tokens, prompts = np.array(self._rows).T
        before = np.concatenate([[0.0], np.cumsum(tokens)])
        figures = []
        for window in _WINDOW_SECONDS:
            seen = end + window <= self._last_seconds
            if np.count_nonzero(seen) < _LEAST_ITERATIONS:
                break
            # Work counts by the iteration that it begins in: that one delays the next token.
            stop = np.searchsorted(start, end[seen] + window - _SAME_MOMENT_SECONDS)
            came = np.maximum(before[stop] - before[1:][seen], 0.0)
            weight = prompts[seen] / prompts[seen].sum()
            share = max(float(weight @ (came > 0)), 1e-3)
            mean = max(float(weight @ came) / share, 1.0)
            variance = _BURST_VARIANCE_RATIO * (float(weight @ came**2) / share - mean**2)
            figures.append((share, mean, max(variance, (_LEAST_SPREAD_RATIO * mean) ** 2)))
        if not figures:
            return None
        # rows of their own: compiled code would be compiled anew for columns
        shares, means, variances = np.array(figures).T.copy()
        windows = np.log(_WINDOW_SECONDS[: len(figures)])
        return PromptWork(windows, shares, np.log(means), np.log(variances))
