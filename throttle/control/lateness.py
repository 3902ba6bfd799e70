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
#: What lies ahead will be judged again before it is here, and the clock raised for it: answers that
#: end t seconds ahead, at the fastest clock, count exp(-t / this). Chosen on the second and third
#: ten minutes of the Azure trace and on two windows of m-large that no table shows.
RECOURSE_SECONDS = 0.4
#: Answers to come, which the clock can be raised for once they are here, count this share of that.
RECOURSE_RATIO = 0.05
#: Below this no budget tells shares apart.
LEAST_SHARE = 1e-9


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
    """

    lengths: LengthCurve
    tpot_seconds: float
    requests_per_second: float


@dataclass(frozen=True, slots=True)
class EndingShares:
    """Probability that each answer ends within each segment: decodes (d, K), prompts (p, K)."""

    decodes: NDArray[np.float64]
    prompts: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lateness:
    """What each clock makes late.

    Attributes:
        excess_ratio: Share of the answers that end soon that is late because the clock is not the
            fastest, (C,), falling.
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
        came = RECOURSE_RATIO * newcomers.requests_per_second * view.soon_seconds
        late = late + came * view.of_newcomers(newcomers, horizon.prefill_segments_count)
        weight += came
    if weight <= 0.0:
        return None
    share = late / max(weight, 1e-9)
    excess = np.maximum.accumulate(np.maximum(share - share[-1], 0.0)[::-1])[::-1]
    everywhere = np.arange(latency_seconds.shape[1])
    number, slack = _foremost(decodes, prompts, everywhere, judged)
    return Lateness(
        np.exp(np.interp(everywhere, judged, np.log(excess + LEAST_SHARE))) - LEAST_SHARE,
        number,
        slack,
    )


@dataclass(frozen=True, slots=True)
class _Judged:
    """Some answers: how late they are expected to be.

    Attributes:
        numbers: The engine's numbers, (n,).
        late: Probability of ending soon and being late, (n, J).
        weight: How many of them are expected to end soon.
        slack_seconds: Time left at the end of the segment that each most likely ends in, (n, J).
    """

    numbers: NDArray[np.float64]
    late: NDArray[np.float64]
    weight: float
    slack_seconds: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _View:
    """The horizon at the judged clocks: time computed by the end of each segment, (K, J).

    Whose prompts share the next iterations is known: the ones planned. Others come in only after
    `known_seconds`.
    """

    ends: NDArray[np.float64]  # iterations, (K,)
    seconds: NDArray[np.float64]
    deviation: NDArray[np.float64]
    iteration_seconds: NDArray[np.float64]
    iteration_deviation: NDArray[np.float64]
    token_seconds: NDArray[np.float64]
    known: NDArray[np.bool_]  # (K,)
    known_seconds: float
    soon: NDArray[np.float64]  # what an end within each segment counts, (K,)
    soon_seconds: float
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
        seconds = np.cumsum(each * iterations, axis=0)
        fastest = each[:, -1] * horizon.iterations
        soon = np.exp((0.5 * fastest - seconds[:, -1]) / RECOURSE_SECONDS)
        known = np.arange(len(seconds)) < max(horizon.prefill_segments_count, 1)
        return cls(
            np.cumsum(horizon.iterations),
            seconds,
            np.cumsum(deviation * iterations, axis=0),
            each,
            deviation,
            delay.token_seconds[:, judged],
            known,
            float(seconds[known, -1][-1]),
            soon,
            float(soon @ fastest),
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
        exposed = np.where(self.known, 0.0, granted - self.known_seconds)
        late = self._late(exposed, spare, self.token_seconds, self.deviation)
        return self._judge(rows[limited, Column.NUMBER], shares, late, spare)

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
        after_known = np.maximum(self.known_seconds - before[:, -1:], 0.0)
        exposed = np.where(self.known, 0.0, granted - after_known)
        late = self._late(exposed, spare, self.token_seconds, spread)
        return self._judge(rows[:, Column.NUMBER], shares, late, spare)

    def of_newcomers(self, newcomers: Newcomers, segment: int) -> NDArray[np.float64]:
        """Which share of them is late, (J,); they meet the first decode segment."""
        segment = min(segment, len(self.ends) - 1)
        gaps = NEWCOMER_GAPS[:, None]
        granted = newcomers.tpot_seconds * NEWCOMER_GAPS
        spare = granted[:, None] - gaps * self.iteration_seconds[segment]
        deviation = gaps * self.iteration_deviation[segment]
        late = self._late(granted, spare, self.token_seconds[segment], deviation)
        alive = newcomers.lengths.survival_ratio(np.append(1.0, 1.0 + NEWCOMER_GAPS))
        share: NDArray[np.float64] = -np.diff(alive) @ late
        return share

    def _judge(
        self,
        numbers: NDArray[np.float64],
        shares: NDArray[np.float64],
        late: NDArray[np.float64],
        spare: NDArray[np.float64],
    ) -> _Judged:
        likely = spare[:, 0]
        if len(numbers):
            likely = spare[np.arange(len(numbers)), shares.argmax(axis=1)]
        counted = shares * self.soon
        weighed = np.einsum("nk,nkj->nj", counted, late)
        return _Judged(numbers, weighed, float(counted.sum()), likely)

    def _late(
        self,
        exposed: NDArray[np.float64],
        spare: NDArray[np.float64],
        token_seconds: NDArray[np.float64],
        deviation: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Probability that prompts to come within `exposed` take longer than computing `spare`s.

        Their time is taken for gamma distributed, by its mean and variance (with that of the
        prediction added); its tail is that of Wilson and Hilferty (1931).
        """
        if self.work is None:
            return np.where(spare > 0.0, 0.0, 1.0)
        any_ratio, tokens, variance = self.work.within(exposed)
        mean = tokens[..., None] * token_seconds + 1e-9
        shape = mean * mean / (variance[..., None] * token_seconds**2 + deviation**2 + 1e-12)
        root = np.cbrt(np.maximum(spare, 0.0) / mean)
        met = _normal_share(3.0 * np.sqrt(shape) * (1.0 - 1.0 / (9.0 * shape) - root))
        return np.where(spare > 0.0, any_ratio[..., None] * met, 1.0)


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
