"""throttLL'eM's clock controller: the lowest clock whose projection keeps every deadline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.prediction import SHAPE_COLUMNS
from throttle.control.lengths import LengthBeliefs, RequestLengths
from throttle.control.scoreboard import Column
from throttle.simulation.policies.outlook import EngineView

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.state import IterationState, Slos
    from throttle.simulation.policies.outlook import Outlook
    from throttle.simulation.policies.policy import PolicyInputs

#: Iterations from now at which batch and KV are projected; between them time is interpolated.
_GRID = np.unique(np.round(np.geomspace(1.0, 2048.0, 20)))


@dataclass(frozen=True, slots=True)
class ThrottllemKnobs:
    """Knobs of `Throttllem`, chosen on the Azure trace.

    Attributes:
        length_margin_ratio: Planned lengths are inflated by this share.
        guard_ratio: Share of each limit that is planned with; the source plans with all of it.
        floor_ratio: Lowest clock over the highest. The source's grid starts at 0.15.
        refresh_seconds: At the latest after so long the projection is made anew.
    """

    length_margin_ratio: float = 0.1
    guard_ratio: float = 0.75
    floor_ratio: float = 0.4
    refresh_seconds: float = 1.0


class Throttllem:
    """Scoreboard, projection of batch and KV, and the lowest clock at which no deadline breaks.

    Kakolyris et al., HPCA 2025 (arXiv 2408.05235). Per request a scheduled iteration and a planned
    length; batch B[j] and KV[j] over future iterations; the mean time between tokens and every
    last token must hold at the chosen clock; a lost request means the highest clock while present.
    Decided anew at admission, completion and when a length proves too short, not per token.

    Adapted: the source's deadline is a limit on end-to-end time; where the limits are TTFT and
    mean gap, a request's deadlines are those that these two imply (the first token's within TTFT,
    the last one's within TPOT of the first for each further token). Lengths come from the same
    survival curves that our controller learns, inflated by a margin, since the source's learned
    length predictor has no counterpart here. Its binary search and one batched prediction over all
    clocks give the same clock, because latency never rises with clock. Its admission control and
    autoscaler are left out: a clock policy cannot hold requests back.

    Args:
        inputs: What it may know.
        knobs: Its knobs.
    """

    name = "throttllem"

    def __init__(self, inputs: PolicyInputs, knobs: ThrottllemKnobs) -> None:
        self._knobs = knobs
        self._predictor = inputs.predictor
        self._slos: Slos = inputs.profile.default_slos
        self._view = EngineView(inputs.profile)
        self._lengths = LengthBeliefs()
        clocks = inputs.predictor.clocks_mhz
        self._floor = int(np.searchsorted(clocks, knobs.floor_ratio * clocks[-1]))
        self._current = len(clocks) - 1
        self._due_seconds = 0.0

    def clock_mhz(self, state: IterationState) -> int:
        """The lowest feasible clock, decided anew when a request comes or goes."""
        for ended in self._view.observe(state):
            self._lengths.add(ended.length_class, ended.generated_tokens, censored=ended.censored)
        now = state.engine_time_seconds
        if state.request_events or now >= self._due_seconds or state.progress is None:
            self._due_seconds = now + self._knobs.refresh_seconds
            self._current = self._choose(self._view.outlook(state), now)
        return int(self._predictor.clocks_mhz[self._current])

    def _choose(self, outlook: Outlook, now: float) -> int:
        fastest = len(self._predictor.clocks_mhz) - 1
        if outlook.idle:
            return fastest if outlook.waiting_count else self._floor
        if not len(outlook.decodes) and not len(outlook.prompts):  # only aggregates are known
            limit = min(self._slos.tpot_seconds or np.inf, self._slos.tbt_seconds or np.inf)
            latency = self._predictor.predict(outlook.shapes[:1]).latency_seconds[0]
            feasible = latency <= limit * self._knobs.guard_ratio
        else:
            feasible = self._feasible(outlook, now)
        feasible[: self._floor] = False
        return int(np.argmax(feasible)) if feasible.any() else fastest

    def _feasible(self, outlook: Outlook, now: float) -> NDArray[np.bool_]:
        """Which clocks keep the mean time between tokens and every deadline, (C,)."""
        prefills = outlook.shapes if outlook.has_prompts else outlook.shapes[:0]
        decodes, prompts = outlook.decodes, outlook.prompts
        remaining, planned = self._planned(decodes), self._planned(prompts)
        reached = np.where(outlook.prompts_at > 0, outlook.prompts_at, len(prefills))
        starts = np.concatenate([np.zeros(len(decodes)), reached])
        left = np.concatenate([remaining, planned - 1.0])
        context = np.concatenate(
            [decodes[:, Column.PROMPT] + decodes[:, Column.GENERATED], prompts[:, Column.TARGET]]
        )
        grid = len(prefills) + _GRID
        grid = grid[: np.searchsorted(grid, (starts + left).max(), side="left") + 1]
        active = (starts[:, None] < grid) & (grid <= (starts + left)[:, None])
        shapes = np.zeros((len(grid), len(SHAPE_COLUMNS)))
        shapes[:, 3] = shapes[:, 5] = np.maximum(active.sum(axis=0), 1.0)
        held = (context - starts)[:, None] + grid
        shapes[:, 4] = np.maximum((active * held).sum(axis=0), 1.0)
        latency = self._predictor.predict(np.vstack([prefills, shapes])).latency_seconds
        first = np.cumsum(latency[: len(prefills)], axis=0)
        widths = np.diff(grid, prepend=float(len(prefills)))
        began = first[-1] if len(first) else 0.0
        spent = began + np.cumsum(latency[len(prefills) :] * widths[:, None], axis=0)
        ends = np.concatenate([np.zeros((1, spent.shape[1])), first, spent])
        moments = np.concatenate([np.arange(len(prefills) + 1.0), grid])
        return self._judge(outlook, now, moments, ends, starts + left, planned)

    def _judge(  # noqa: PLR0917 - the projection's parts
        self,
        outlook: Outlook,
        now: float,
        moments: NDArray[np.float64],
        ends: NDArray[np.float64],
        last: NDArray[np.float64],
        planned: NDArray[np.float64],
    ) -> NDArray[np.bool_]:
        count = len(outlook.decodes)
        first_at = np.where(outlook.prompts_at > 0, outlook.prompts_at, moments[-1])
        at = np.concatenate([last[:count], first_at, last[count:]])
        times = _interpolate(moments, ends, at)
        guard = self._knobs.guard_ratio
        mean_gap = ends[-1] / moments[-1]
        kept: NDArray[np.bool_] = mean_gap <= guard * (self._slos.tpot_seconds or np.inf)
        lost = times[:, -1] > _deadlines(outlook, now, last, planned, 1.0)
        deadlines = _deadlines(outlook, now, last, planned, guard)
        kept &= (times[~lost] <= deadlines[~lost, None]).all(axis=0)
        if lost.any():
            kept[:-1] = False  # best effort for a lost request, at the highest clock
        return kept

    def _planned(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Planned remaining output, inflated and capped, at least 1."""
        if not len(rows):
            return np.empty(0)
        planned_tokens = self._lengths.planned_tokens(
            RequestLengths(
                self._view.length_classes,
                rows[:, Column.LENGTH_CLASS],
                rows[:, Column.GENERATED],
                rows[:, Column.MAX_OUTPUT],
                rows[:, Column.PREDICTED_OUTPUT],
            )
        )
        inflated = np.ceil(planned_tokens * (1.0 + self._knobs.length_margin_ratio))
        limit = rows[:, Column.MAX_OUTPUT] - rows[:, Column.GENERATED]
        planned: NDArray[np.float64] = np.maximum(np.minimum(inflated, limit), 1.0)
        return planned


def _deadlines(
    outlook: Outlook,
    now: float,
    last: NDArray[np.float64],
    planned: NDArray[np.float64],
    guard: float,
) -> NDArray[np.float64]:
    """Time left to the generators' last tokens, then the prompts' first and last tokens, (n,)."""
    decodes, prompts = outlook.decodes, outlook.prompts
    gaps = decodes[:, Column.GENERATED] - decodes[:, Column.FIRST_GENERATED]
    tokens = gaps + last[: len(decodes)]
    age = now - prompts[:, Column.ARRIVAL]
    begun = np.isfinite(prompts[:, Column.FIRST_TOKEN])  # preempted and computed anew
    first = np.where(begun, np.inf, prompts[:, Column.TTFT] * guard - age)
    implied = np.concatenate(
        [
            decodes[:, Column.TPOT] * guard * tokens + decodes[:, Column.FIRST_TOKEN] - now,
            first,
            first + prompts[:, Column.TPOT] * guard * (planned - 1.0),
        ]
    )
    end_to_end = np.concatenate(
        [
            decodes[:, Column.E2E] * guard - (now - decodes[:, Column.ARRIVAL]),
            np.full(len(prompts), np.inf),
            prompts[:, Column.E2E] * guard - age,
        ]
    )
    deadlines: NDArray[np.float64] = np.fmin(implied, end_to_end)
    return np.where(np.isnan(deadlines), np.inf, deadlines)


def _interpolate(
    moments: NDArray[np.float64], ends: NDArray[np.float64], at: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Time to each iteration in `at` at every clock, (n, C); the last pace goes on."""
    upper = np.clip(np.searchsorted(moments, at), 1, len(moments) - 1)
    width = moments[upper] - moments[upper - 1]
    share = ((at - moments[upper - 1]) / width)[:, None]
    times: NDArray[np.float64] = ends[upper - 1] * (1.0 - share) + ends[upper] * share
    return times
