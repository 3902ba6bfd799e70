"""How many prompt tokens come in between: the interruptions that a generating request meets.

A request shares its iterations with the prompts of others, and a short answer has few tokens to
spread one long prompt over. How much prompt work falls into a window of time is therefore learned
as it comes, bursts and heavy tails included: for windows of many lengths, each begun where a first
token was produced, the share in which any prompt came, and the mean and variance of the tokens.
Arrivals do not wait for the engine, so the figures hold at every clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.prediction import SHAPE_COLUMNS, estimated_attention_pairs
from throttle.control.state import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from throttle.control.state import IterationState

    Measure = Callable[
        [
            NDArray[np.float64],
            NDArray[np.float64],
            NDArray[np.float64],
            NDArray[np.float64],
            float,
        ],
        NDArray[np.float64],
    ]

#: Lengths of the windows: from half a fast iteration to where bursts have averaged out.
WINDOW_SECONDS = np.geomspace(0.02, 8.0, 16)
#: Prompt iterations remembered: about a minute of a busy engine.
_MEMORY_ITERATIONS = 1024
#: Fewer of them tell nothing yet.
LEAST_ITERATIONS = 20
#: Of the iterations without prompts, one in so many begins a window.
_DECODES_STRIDE = 4
#: A work window begins with the iteration after the one that it is measured from.
SAME_MOMENT_SECONDS = 1e-4
#: Fewer windows with work than this share are never believed.
LEAST_SHARE = 1e-3
#: Spread of the tokens in one window, as a share of their mean, is never believed to be less.
LEAST_SPREAD_RATIO = 0.3


#: Prompt tokens of one iteration at which its cost is predicted; between them it is interpolated.
_SIZES_TOKENS = np.array([64, 256, 512, 1024, 2048, 4096, 8192, 16384.0])


@dataclass(frozen=True, slots=True)
class PromptCost:
    """What prompts of a size cost, in tokens of an iteration of mean size.

    Attention grows with the square of a prompt, and a short one still reads every expert's weights:
    a token's cost depends on how many others share its iteration. The shape of that differs little
    from clock to clock.

    Attributes:
        tokens: Prompt tokens of an iteration, rising, (S,).
        equivalent_tokens: How many tokens of an iteration of mean size take as long, (S,).
    """

    tokens: NDArray[np.float64]
    equivalent_tokens: NDArray[np.float64]

    def equivalent(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Equivalents of iterations of any size, (n,)."""
        inside = np.interp(tokens, self.tokens, self.equivalent_tokens)
        return inside * np.where(tokens < self.tokens[0], tokens / self.tokens[0], 1.0)


def prompt_size_shapes(
    prefill_kv_tokens: float, batch_requests: float, context_tokens: float, tokens_limit: float
) -> NDArray[np.float64]:
    """Shapes whose prediction `prompt_cost` needs: no prompt, then one of each size, (1 + S, 7).

    Args:
        prefill_kv_tokens: Tokens of an iteration's prompts already in KV.
        batch_requests: Generating requests beside it.
        context_tokens: Their mean context.
        tokens_limit: Most tokens of one iteration.
    """
    sizes = _sizes(tokens_limit)
    shapes = np.zeros((1 + len(sizes), len(SHAPE_COLUMNS)))
    shapes[:, 3] = shapes[:, 5] = batch_requests
    shapes[:, 4] = batch_requests * context_tokens
    shapes[1:, 0], shapes[1:, 1], shapes[1:, 2] = 1.0, sizes, prefill_kv_tokens
    shapes[1:, 6] = estimated_attention_pairs(shapes[1:, 0], sizes, shapes[1:, 2])
    return shapes


def prompt_cost(
    latency_seconds: NDArray[np.float64], mean_tokens: float, tokens_limit: float
) -> PromptCost:
    """The cost of prompts by size.

    Args:
        latency_seconds: Of `prompt_size_shapes` at one clock, (1 + S,).
        mean_tokens: Prompt tokens of an iteration that has some.
        tokens_limit: As given there.
    """
    sizes = _sizes(tokens_limit)
    added = np.maximum.accumulate(np.maximum(latency_seconds[1:] - latency_seconds[0], 1e-9))
    scale = mean_tokens / float(np.interp(mean_tokens, sizes, added))
    return PromptCost(sizes, added * scale)


def _sizes(tokens_limit: float) -> NDArray[np.float64]:
    return np.append(_SIZES_TOKENS[tokens_limit > _SIZES_TOKENS], tokens_limit)


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

    @property
    def arguments(self) -> tuple[NDArray[np.float64], ...]:
        """Its fields, in order: what compiled code takes."""
        return self.log_seconds, self.any_ratio, self.log_mean_tokens, self.log_variance

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


class _Recent:
    """The last rows of numbers, oldest first, each column in one piece.

    Args:
        columns_count: Numbers in a row.
    """

    def __init__(self, columns_count: int) -> None:
        self._kept = np.empty((columns_count, 2 * _MEMORY_ITERATIONS))
        self._stop = 0

    def __len__(self) -> int:
        return min(self._stop, _MEMORY_ITERATIONS)

    def append(self, *row: float) -> None:
        if self._stop == self._kept.shape[1]:
            self._kept[:, :_MEMORY_ITERATIONS] = self._kept[:, _MEMORY_ITERATIONS:]
            self._stop = _MEMORY_ITERATIONS
        self._kept[:, self._stop] = row
        self._stop += 1

    def columns(self) -> NDArray[np.float64]:
        """A view, (columns, n); the next `append` may move what it shows."""
        return self._kept[:, self._stop - len(self) : self._stop]


class PromptWorkEstimator:
    """Remembers the prompt iterations of about the last minute.

    Args:
        measured: `measure`, or its compiled form.
    """

    def __init__(self, measured: Measure | None = None) -> None:
        self._measure = measured or measure
        self._prompts = _Recent(4)  # start, end, tokens, requests
        self._decode_ends = _Recent(1)
        self._decodes_count = 0
        self._last_seconds = 0.0

    def add(self, state: IterationState) -> None:
        """Take in one state; those that computed no prompt only pass time."""
        work = state.scheduled
        if state.phase is Phase.COMPLETED and work.sum_prefill_tokens:
            end = state.engine_time_seconds
            duration = state.iteration_duration_seconds
            start = self._last_seconds if duration is None else end - duration
            self._prompts.append(start, end, work.sum_prefill_tokens, work.num_prefill_requests)
        elif state.phase is Phase.COMPLETED and work.num_decode_requests:
            self._decodes_count += 1
            if self._decodes_count % _DECODES_STRIDE == 0:
                self._decode_ends.append(state.engine_time_seconds)
        self._last_seconds = state.engine_time_seconds

    def after_prompts(self, cost: PromptCost) -> PromptWork | None:
        """What was seen after iterations with prompts; None while too little was.

        The next iteration often computes what arrived during a long one; after a short one there
        is less of that.
        """
        if len(self._prompts) < LEAST_ITERATIONS:
            return None
        _, ends, _, prompts = self._prompts.columns()
        return self._work(cost, ends, prompts)

    def after_decodes(self, cost: PromptCost) -> PromptWork | None:
        """What was seen after iterations without prompts; `after_prompts` while too little was."""
        if len(self._prompts) < LEAST_ITERATIONS:
            return None
        ends = self._decode_ends.columns()[0]
        ends = ends[np.searchsorted(ends, self._prompts.columns()[0, 0]) :]
        return self._work(cost, ends, np.ones(len(ends))) or self.after_prompts(cost)

    def _work(
        self, cost: PromptCost, begins: NDArray[np.float64], weights: NDArray[np.float64]
    ) -> PromptWork | None:
        starts, _, tokens, _ = self._prompts.columns()
        before = np.concatenate([[0.0], np.cumsum(cost.equivalent(tokens))])
        figures = self._measure(starts, before, begins, weights, self._last_seconds)
        if not len(figures):
            return None
        # rows of their own: compiled code would be compiled anew for columns
        shares, means, variances = figures.T.copy()
        windows = np.log(WINDOW_SECONDS[: len(figures)])
        return PromptWork(windows, shares, np.log(means), np.log(variances))


def measure(
    starts: NDArray[np.float64],
    before: NDArray[np.float64],
    begins: NDArray[np.float64],
    weights: NDArray[np.float64],
    now_seconds: float,
) -> NDArray[np.float64]:
    """Prompt work in windows of every length that were seen to their end often enough.

    Args:
        starts: When iterations with prompts began, rising, (n,).
        before: The work of all before each, and of all, (n + 1,).
        begins: When windows begin, rising, (m,).
        weights: What each window counts, positive, (m,).
        now_seconds: Until when everything is known.

    Returns:
        Share of windows with work, and the mean and variance of work in those, (W, 3).
    """
    figures = []
    for window in WINDOW_SECONDS:
        seen = begins + window <= now_seconds
        if np.count_nonzero(seen) < LEAST_ITERATIONS:
            break
        # Work counts by the iteration that it begins in: that one delays the next token.
        first = np.searchsorted(starts, begins[seen] - SAME_MOMENT_SECONDS)
        stop = np.searchsorted(starts, begins[seen] + window - SAME_MOMENT_SECONDS)
        came = np.maximum(before[stop] - before[first], 0.0)
        weight = weights[seen] / weights[seen].sum()
        share = max(float(weight @ (came > 0)), LEAST_SHARE)
        mean = max(float(weight @ came) / share, 1.0)
        variance = float(weight @ came**2) / share - mean**2
        figures.append((share, mean, max(variance, (LEAST_SPREAD_RATIO * mean) ** 2)))
    return np.array(figures).reshape(-1, 3)
