"""Which share of answers will miss their mean gap between tokens, at every clock.

A limit on the mean gap (TPOT) is judged when an answer ends, and nobody knows when that is. An
answer that ends after n more tokens has been granted some time for them; it is late when computing
those tokens, and the prompts of others that come in between, take longer. The probability of that,
weighed by the probability of ending there and summed over the answers that run, the prompts that
are planned and the answers that will begin meanwhile, is the share that a clock would make late.
Short answers are late by one long prompt and long ones hardly ever, so no single horizon or
quantile would do for both.

What the fastest clock would make late too is no clock's fault and is subtracted: requests that
cannot be saved do not hold the clock up for others.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.control.scoreboard import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.lengths import LengthCurve
    from throttle.control.projection import Horizon
    from throttle.control.prompt_work import PromptWork

#: Clocks at which lateness is computed; between them its logarithm is interpolated.
_JUDGED_CLOCKS_COUNT = 12
#: Lengths of the answers to come that are told apart, gaps between tokens.
NEWCOMER_GAPS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128.0])
#: The calibrated upper bound of an iteration lies this many standard deviations above its mean: the
#: normal distribution's 99 % quantile.
BOUND_DEVIATIONS = 2.33
#: Answers to come will be judged again once they are here, and the clock raised for them: only this
#: share of what a standing clock would make late has to be planned for now.
RECOURSE_RATIO = 0.05
#: Below this no budget tells shares apart.
LEAST_SHARE = 1e-9
#: Prompts alone never fill more of the time than this.
PROMPT_BUSY_LIMIT = 0.9


@dataclass(frozen=True, slots=True)
class PromptDelay:
    """What prompts to come cost the answers between them.

    Attributes:
        work: Prompt tokens per window of time; None where hardly any prompts come.
        token_seconds: Time that a prompt token adds to an iteration of each segment, (K, C).
    """

    work: PromptWork | None
    token_seconds: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Newcomers:
    """Answers that will begin within the horizon.

    Attributes:
        lengths: How long they will be.
        tpot_seconds: Their limit.
        requests_per_second: How many come.
        prompt_tokens_per_second: What they bring.
    """

    lengths: LengthCurve
    tpot_seconds: float
    requests_per_second: float
    prompt_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class EndingShares:
    """Probability that each answer ends within each segment: decodes (d, K), prompts (p, K)."""

    decodes: NDArray[np.float64]
    prompts: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lateness:
    """What each clock makes late.

    Attributes:
        excess_ratio: Share of answers late because the clock is not the fastest, (C,), falling.
        request_number: Whose answer has the largest part in it; 0 for those to come.
        request_slack_seconds: What that answer is expected to have left when it ends, at every
            clock, (C,).
    """

    excess_ratio: NDArray[np.float64]
    request_number: int
    request_slack_seconds: NDArray[np.float64]


@functools.cache
def judged_clocks(clocks: tuple[int, int]) -> NDArray[np.int64]:
    """Indices at which lateness is computed, from the first that may be chosen to the last."""
    count = min(_JUDGED_CLOCKS_COUNT, clocks[1] - clocks[0] + 1)
    return np.linspace(*clocks, count).round().astype(np.int64)


def expect_lateness(
    horizon: Horizon,
    latency_seconds: NDArray[np.float64],
    latency_upper_seconds: NDArray[np.float64],
    *,
    now_seconds: float,
    ending: EndingShares,
    delay: PromptDelay,
    newcomers: Newcomers | None,
    clocks: tuple[int, int],
) -> Lateness | None:
    """Compute the lateness of every clock.

    Args:
        horizon: The projected segments, K of them, not none.
        latency_seconds: Expected duration of an iteration of each segment, (K, C).
        latency_upper_seconds: Its calibrated upper bound, (K, C).
        now_seconds: Engine time.
        ending: When the answers end.
        delay: What interrupts them.
        newcomers: Who else will be there; None while that is not known.
        clocks: First and last clock that may be chosen; below and above, the nearest one speaks.

    Returns:
        None where no answer has a limit on its mean gap.
    """
    judged = judged_clocks(clocks)
    view = _View.of(horizon, latency_seconds, latency_upper_seconds, delay, judged)
    decodes = view.of_decodes(horizon, now_seconds, ending.decodes)
    prompts = view.of_prompts(horizon, ending.prompts)
    weight = decodes.weight + prompts.weight
    late = decodes.late.sum(axis=0) + prompts.late.sum(axis=0)
    if newcomers is not None:
        added, came = view.of_newcomers(newcomers, horizon.prefill_segments_count)
        late, total = late + RECOURSE_RATIO * came * added, weight + came
    else:
        total = np.full(len(judged), weight)
    if not total.any():
        return None
    share = late / np.maximum(total, 1e-9)
    excess = np.maximum.accumulate(np.maximum(share - share[-1], 0.0)[::-1])[::-1]
    everywhere = np.arange(latency_seconds.shape[1])
    number, slack = _foremost(decodes, prompts, everywhere, judged)
    return Lateness(
        np.exp(np.interp(everywhere, judged, np.log(excess + LEAST_SHARE))) - LEAST_SHARE,
        number,
        slack,
    )


class LateBudget:
    """How much lateness may be planned with, so that what is seen keeps to the target.

    Adaptive conformal inference (Gibbs and Candes 2021, equation 2) on the logarithm: an answer
    that is late although it need not be lowers the budget at once, the others raise it slowly.

    Args:
        target_ratio: Share of answers that may be late because of lower clocks.
    """

    _STEP = 0.15
    _LIMITS = (math.log(1.0 / 8.0), math.log(2.0))

    def __init__(self, target_ratio: float) -> None:
        self._target_ratio = target_ratio
        self._log_scale = 0.0

    @property
    def ratio(self) -> float:
        """Share to plan with now."""
        return self._target_ratio * math.exp(self._log_scale)

    def learn(self, *, late: bool) -> None:
        """Take in one answer that ended, late for want of a faster clock or not."""
        surplus = float(late) - self._target_ratio
        scale = self._log_scale - self._STEP * surplus
        self._log_scale = min(max(scale, self._LIMITS[0]), self._LIMITS[1])


@dataclass(frozen=True, slots=True)
class _Judged:
    """Some answers: how late they are expected to be.

    Attributes:
        numbers: The engine's numbers, (n,).
        late: Probability of being late within the horizon, (n, J).
        weight: How many of them are expected to end within the horizon.
        slack_seconds: Time left at the end of the segment that each most likely ends in, (n, J).
    """

    numbers: NDArray[np.float64]
    late: NDArray[np.float64]
    weight: float
    slack_seconds: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _View:
    """The horizon at the judged clocks: time computed by the end of each segment, (K, J)."""

    ends: NDArray[np.float64]  # iterations, (K,)
    seconds: NDArray[np.float64]
    deviation: NDArray[np.float64]
    iteration_seconds: NDArray[np.float64]
    iteration_deviation: NDArray[np.float64]
    token_seconds: NDArray[np.float64]
    work: PromptWork | None

    @classmethod
    def of(
        cls,
        horizon: Horizon,
        latency: NDArray[np.float64],
        upper: NDArray[np.float64],
        delay: PromptDelay,
        judged: NDArray[np.int64],
    ) -> _View:
        each = latency[:, judged]
        deviation = (upper[:, judged] - each) / BOUND_DEVIATIONS
        iterations = horizon.iterations[:, None]
        return cls(
            np.cumsum(horizon.iterations),
            np.cumsum(each * iterations, axis=0),
            np.cumsum(deviation * iterations, axis=0),
            each,
            deviation,
            delay.token_seconds[:, judged],
            delay.work,
        )

    def of_decodes(self, horizon: Horizon, now: float, shares: NDArray[np.float64]) -> _Judged:
        rows = horizon.decodes
        tpot = rows[:, Column.TPOT]
        gaps = rows[:, Column.GENERATED] - rows[:, Column.FIRST_GENERATED]
        elapsed = now - rows[:, Column.FIRST_TOKEN]
        limited = np.isfinite(tpot) & np.isfinite(elapsed)
        tpot, gaps, elapsed, shares = (
            tpot[limited],
            gaps[limited],
            elapsed[limited],
            shares[limited],
        )
        granted = tpot[:, None] * (gaps[:, None] + self.ends) - elapsed[:, None]
        spare = granted[:, :, None] - self.seconds
        late = self._late(granted, spare, self.token_seconds, self.deviation)
        return _judge(rows[limited, Column.NUMBER], shares, late, spare)

    def of_prompts(self, horizon: Horizon, shares: NDArray[np.float64]) -> _Judged:
        rows, first = horizon.prompts, horizon.first_tokens
        if not len(rows):
            nobody = np.empty((0, self.seconds.shape[1]))
            return _Judged(np.empty(0), nobody, 0.0, nobody)
        tpot = rows[:, Column.TPOT]
        begins = horizon.iterations_at(first)
        gaps = self.ends - begins[:, None]
        shares = np.where((gaps > 0) & np.isfinite(tpot)[:, None], shares, 0.0)
        # Only what comes after its own first token delays an answer.
        segments, into = first.segments, first.iterations[:, None]
        left = horizon.iterations[segments, None] - into
        before = self.seconds[segments] - left * self.iteration_seconds[segments]
        deviation = self.deviation[segments] - left * self.iteration_deviation[segments]
        granted = np.where(np.isfinite(tpot), tpot, 1.0)[:, None] * np.maximum(gaps, 0.0)
        spare = granted[:, :, None] - (self.seconds - before[:, None, :])
        spread = np.maximum(self.deviation - deviation[:, None, :], 0.0)
        late = self._late(granted, spare, self.token_seconds, spread)
        return _judge(rows[:, Column.NUMBER], shares, late, spare)

    def of_newcomers(
        self, newcomers: Newcomers, segment: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Their lateness and how many come, (J,) each; they meet the first decode segment."""
        segment = min(segment, len(self.ends) - 1)
        gaps = NEWCOMER_GAPS[:, None]
        granted = newcomers.tpot_seconds * NEWCOMER_GAPS
        spare = granted[:, None] - gaps * self.iteration_seconds[segment]
        token_seconds = self.token_seconds[segment]
        deviation = gaps * self.iteration_deviation[segment]
        late = self._late(granted, spare, token_seconds, deviation)
        alive = newcomers.lengths.survival_ratio(np.append(1.0, 1.0 + NEWCOMER_GAPS))
        busy = np.minimum(newcomers.prompt_tokens_per_second * token_seconds, PROMPT_BUSY_LIMIT)
        came = newcomers.requests_per_second * self.seconds[-1] / (1.0 - busy)
        return -np.diff(alive) @ late, came

    def _late(
        self,
        granted: NDArray[np.float64],
        spare: NDArray[np.float64],
        token_seconds: NDArray[np.float64],
        deviation: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Probability that prompts within `granted` take longer than what computing `spare`s.

        Their time is taken for gamma distributed, by its mean and variance (with that of the
        prediction added); its tail is that of Wilson and Hilferty (1931).
        """
        if self.work is None:
            return np.where(spare > 0.0, 0.0, 1.0)
        any_ratio, tokens, variance = self.work.within(granted)
        mean = tokens[..., None] * token_seconds + 1e-9
        shape = mean * mean / (variance[..., None] * token_seconds**2 + deviation**2 + 1e-12)
        root = np.cbrt(np.maximum(spare, 0.0) / mean)
        met = _normal_share(3.0 * np.sqrt(shape) * (1.0 - 1.0 / (9.0 * shape) - root))
        return np.where(spare > 0.0, any_ratio[..., None] * met, 1.0)


def _judge(
    numbers: NDArray[np.float64],
    shares: NDArray[np.float64],
    late: NDArray[np.float64],
    spare: NDArray[np.float64],
) -> _Judged:
    likely = spare[np.arange(len(numbers)), shares.argmax(axis=1)] if len(numbers) else spare[:, 0]
    weighed = np.einsum("nk,nkj->nj", shares, late)
    return _Judged(numbers, weighed, float(shares.sum()), likely)


def _foremost(
    decodes: _Judged,
    prompts: _Judged,
    everywhere: NDArray[np.int64],
    judged: NDArray[np.int64],
) -> tuple[int, NDArray[np.float64]]:
    """The answer that a slower clock makes late before all others, and its slack."""
    numbers = np.concatenate([decodes.numbers, prompts.numbers])
    if not len(numbers):
        return 0, np.full(len(everywhere), np.inf)
    late = np.concatenate([decodes.late, prompts.late])
    row = int(np.argmax((late - late[:, -1:]).sum(axis=1)))
    slack = np.concatenate([decodes.slack_seconds, prompts.slack_seconds])[row]
    return int(numbers[row]), np.interp(everywhere, judged, slack)


def _normal_share(deviations: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard normal distribution function, to 0.0002 (Bowling et al. 2009, equation 7)."""
    z = np.clip(deviations, -8.0, 8.0)
    share: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-z * (1.5976 + 0.07056 * z * z)))
    return share
