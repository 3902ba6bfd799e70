"""Seconds left to every limit at every clock, and which requests no clock can save.

One row per limit that could bind: its allowance (time the limit still grants) less the projected
time to the moment it speaks of. Limits are read as in the literature: TTFT from arrival to the
first token, TBT every single gap, E2E from arrival to the last token. TPOT, the mean gap over a
whole answer, is judged where it ends, which nobody knows: see `throttle.control.lateness`. Only
where nothing is known of single requests is it a limit on the next iteration.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.control.projection import Horizon, Positions
from throttle.control.scoreboard import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.state import Slos

#: Only the gaps of the next segments are judged token by token.
TBT_DECODE_SEGMENTS = 2


class Slo(enum.IntEnum):
    """Kinds of limits (values as in the protocol)."""

    TTFT = 1
    TBT = 2
    TPOT = 3
    E2E = 4


@dataclass(frozen=True, slots=True)
class Guards:
    """Shares of what a limit still grants that may be planned with, each in (0, 1].

    Attributes:
        ttft_ratio: Of the time left to a first token: bursts may join the queue.
        tbt_ratio: Of the limit on a single gap.
        tpot_ratio: Of the limit on the mean gap, where nothing is known of single requests.
        e2e_ratio: Of the time left to the last token: lengths are beliefs.
        reserve_seconds: Kept back from a first token: one clock switch and one decision.
    """

    ttft_ratio: float = 0.8
    tbt_ratio: float = 0.95
    tpot_ratio: float = 0.95
    e2e_ratio: float = 0.9
    reserve_seconds: float = 0.05


@dataclass(frozen=True, slots=True)
class SlackTable:
    """Slack of every limit at every clock.

    Attributes:
        slack_seconds: (M, C), by the calibrated upper bound; negative where the limit would break.
        slos: Kind of each row, (M,).
        request_numbers: Whose limit, (M,); 0 where a row speaks of every request.
        lost_requests_count: Requests left out because even the fastest clock is too slow.
    """

    slack_seconds: NDArray[np.float64]
    slos: NDArray[np.int64]
    request_numbers: NDArray[np.int64]
    lost_requests_count: int

    def least(self) -> NDArray[np.float64]:
        """The least slack at each clock, infinite where nothing binds, (C,)."""
        if len(self.slos) == 0:
            return np.full(self.slack_seconds.shape[1], np.inf)
        least: NDArray[np.float64] = self.slack_seconds.min(axis=0)
        return least


@dataclass(frozen=True, slots=True)
class _Rows:
    """Limits before they are compared with time: (n,) each."""

    slo: Slo
    positions: Positions
    granted_seconds: NDArray[np.float64]  # what the limit grants from now
    planned_seconds: NDArray[np.float64]  # what may be planned with
    numbers: NDArray[np.float64]


class _Timeline:
    """Projected time to positions in the horizon, at every clock."""

    def __init__(
        self,
        horizon: Horizon,
        latency: NDArray[np.float64],
        stretch: NDArray[np.float64] | None,
    ) -> None:
        if stretch is not None:
            latency = latency * stretch
        self._latency = latency
        spent = np.cumsum(latency * horizon.iterations[:, None], axis=0)
        self._before = np.vstack([np.zeros(latency.shape[1]), spent[:-1]])

    def at(self, positions: Positions) -> NDArray[np.float64]:
        """Seconds to each position at every clock, (n, C)."""
        step = self._latency[positions.segments] * positions.iterations[:, None]
        seconds: NDArray[np.float64] = self._before[positions.segments] + step
        return seconds

    def at_fastest(self, positions: Positions) -> NDArray[np.float64]:
        """Seconds to each position at the fastest clock, (n,)."""
        step = self._latency[positions.segments, -1] * positions.iterations
        seconds: NDArray[np.float64] = self._before[positions.segments, -1] + step
        return seconds


def measure_slack(
    horizon: Horizon,
    latency_seconds: NDArray[np.float64],
    latency_upper_seconds: NDArray[np.float64],
    now_seconds: float,
    guards: Guards,
    *,
    stretch_ratio: NDArray[np.float64] | None = None,
) -> SlackTable:
    """Slack of every limit of a per-request horizon.

    Args:
        horizon: The projected segments; must not be empty.
        latency_seconds: Expected duration of an iteration of each segment, (K, C).
        latency_upper_seconds: Its calibrated upper bound, (K, C).
        now_seconds: Engine time.
        guards: How much of each limit may be planned with.
        stretch_ratio: How much longer each segment takes than its iterations, since prompts that
            have not come yet will interrupt it, (K, C); None for not at all.
    """
    expected = _Timeline(horizon, latency_seconds, stretch_ratio)
    upper = _Timeline(horizon, latency_upper_seconds, stretch_ratio)
    rows = [
        _first_token_rows(horizon, now_seconds, guards),
        *_last_token_rows(horizon, now_seconds, guards),
    ]
    slack, slos, numbers, lost = [], [], [], []
    for limit in rows:
        savable = expected.at_fastest(limit.positions) <= limit.granted_seconds
        lost.append(limit.numbers[~savable])
        tightest = _tightest(_pick(limit, savable))
        slack.append(tightest.planned_seconds[:, None] - upper.at(tightest.positions))
        slos.append(np.full(len(tightest.numbers), limit.slo, dtype=np.int64))
        numbers.append(tightest.numbers.astype(np.int64))
    tbt = _single_gap_slack(horizon, latency_seconds, latency_upper_seconds, guards)
    slack.append(tbt)
    slos.append(np.full(len(tbt), Slo.TBT, dtype=np.int64))
    numbers.append(np.zeros(len(tbt), dtype=np.int64))
    return SlackTable(
        np.vstack(slack),
        np.concatenate(slos),
        np.concatenate(numbers),
        len(np.unique(np.concatenate(lost))),
    )


def measure_aggregate_slack(
    horizon: Horizon, latency_upper_seconds: NDArray[np.float64], slos: Slos, guards: Guards
) -> SlackTable:
    """Slack when only aggregates are known: the default limits on one iteration, nothing banked.

    An iteration that even the fastest clock cannot keep within the limit is left out.
    """
    slack, kinds = [], []
    for kind, limit, ratio in (
        (Slo.TBT, slos.tbt_seconds, guards.tbt_ratio),
        (Slo.TPOT, slos.tpot_seconds, guards.tpot_ratio),
    ):
        if limit is None or horizon.shapes[0, 3] == 0 or latency_upper_seconds[0, -1] > limit:
            continue
        slack.append(limit * ratio - latency_upper_seconds[0])
        kinds.append(int(kind))
    table = np.array(slack).reshape(-1, latency_upper_seconds.shape[1])
    numbers = np.zeros(len(kinds), dtype=np.int64)
    return SlackTable(table, np.array(kinds, dtype=np.int64), numbers, 0)


def _first_token_rows(horizon: Horizon, now: float, guards: Guards) -> _Rows:
    granted = horizon.prompts[:, Column.TTFT] - (now - horizon.prompts[:, Column.ARRIVAL])
    applies = np.isfinite(granted) & np.isnan(horizon.prompts[:, Column.FIRST_TOKEN])
    rows = _Rows(
        Slo.TTFT,
        horizon.first_tokens,
        granted,
        granted * guards.ttft_ratio - guards.reserve_seconds,
        horizon.prompts[:, Column.NUMBER],
    )
    return _pick(rows, applies)


def _last_token_rows(horizon: Horizon, now: float, guards: Guards) -> list[_Rows]:
    prompt_ends = horizon.iterations_at(horizon.first_tokens) + horizon.prompt_lengths - 1.0
    result = []
    for requests, ends in (
        (horizon.prompts, prompt_ends),
        (horizon.decodes, horizon.remaining_tokens),
    ):
        granted = requests[:, Column.E2E] - (now - requests[:, Column.ARRIVAL])
        applies = np.isfinite(granted)
        if applies.any():
            numbers = requests[:, Column.NUMBER]
            planned = granted * guards.e2e_ratio
            rows = _Rows(Slo.E2E, horizon.positions(ends), granted, planned, numbers)
            result.append(_pick(rows, applies))
    return result


def _single_gap_slack(
    horizon: Horizon,
    latency: NDArray[np.float64],
    latency_upper: NDArray[np.float64],
    guards: Guards,
) -> NDArray[np.float64]:
    limit = horizon.decodes[:, Column.TBT].min(initial=np.inf)
    if not np.isfinite(limit):
        return np.empty((0, latency.shape[1]))
    judged = horizon.prefill_segments_count + TBT_DECODE_SEGMENTS
    savable = latency[:judged, -1] <= limit
    slack: NDArray[np.float64] = limit * guards.tbt_ratio - latency_upper[:judged][savable]
    return slack


def _pick(rows: _Rows, mask: NDArray[np.bool_]) -> _Rows:
    if mask.all():
        return rows
    return _Rows(
        rows.slo,
        Positions(rows.positions.segments[mask], rows.positions.iterations[mask]),
        rows.granted_seconds[mask],
        rows.planned_seconds[mask],
        rows.numbers[mask],
    )


def _tightest(rows: _Rows) -> _Rows:
    """Keep, of the rows that share a position, the one with the least allowance."""
    if len(rows.numbers) < 2:
        return rows
    segments, iterations = rows.positions.segments, rows.positions.iterations
    order = np.lexsort((rows.planned_seconds, iterations, segments))
    first = np.ones(len(order), dtype=bool)
    same = (np.diff(segments[order]) == 0) & (np.diff(iterations[order]) == 0)
    first[1:] = ~same
    kept = order[first]
    return _Rows(
        rows.slo,
        Positions(segments[kept], iterations[kept]),
        rows.granted_seconds[kept],
        rows.planned_seconds[kept],
        rows.numbers[kept],
    )
