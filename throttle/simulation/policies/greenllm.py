"""GreenLLM's two loops for decode and its optimization for prefill."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.prediction import SHAPE_COLUMNS
from throttle.simulation.policies.outlook import EngineView
from throttle.simulation.policies.reactive import ObservedGaps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.state import IterationState
    from throttle.simulation.policies.outlook import Outlook
    from throttle.simulation.policies.policy import PolicyInputs

_BATCHES = np.array([1.0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512])
_FIXED_POINT_STEPS = 12


@dataclass(frozen=True, slots=True)
class GreenllmKnobs:
    """Knobs of `Greenllm`: the source's, and those marked as chosen on the Azure trace.

    Attributes:
        coarse_seconds: Window of the token rate.
        confirmations_count: Windows in a row before another bucket counts.
        bucket_ratio: Width of a bucket of token rates.
        band_steps: Neighbors of the table's clock, in grid steps, that the fine loop may use;
            chosen.
        fine_seconds: Least time between two moves of the fine loop.
        low_ratio: Below this share of the limit the fine loop lowers the clock (the source: 0.65).
        high_ratio: Above this share it raises the clock; chosen.
        shift_seconds: Time after which a band whose edge is hit is moved.
        shift_ratio: Share of moves at the edge that moves it.
        prefill_guard_ratio: Share of TTFT within which prompts are planned; chosen.
        floor_ratio: Lowest clock over the highest.
    """

    coarse_seconds: float = 0.2
    confirmations_count: int = 3
    bucket_ratio: float = 1.25
    band_steps: int = 40
    fine_seconds: float = 0.02
    low_ratio: float = 0.65
    high_ratio: float = 0.8
    shift_seconds: float = 6.0
    shift_ratio: float = 0.8
    prefill_guard_ratio: float = 0.5
    floor_ratio: float = 0.4


class Greenllm:
    """A table by token rate, a band around its clock, and a fine loop on the observed gaps.

    GreenLLM (arXiv 2508.16449), constants from notes on the paper. Decode: each 200 ms the token
    rate picks a bucket; its clock (least energy per token that keeps the limit, from a table) and
    its neighbors are the band after three windows in a row; each 20 ms a step up or down inside
    the band by the observed gaps; a band whose edge is hit most of the time is moved. Prefill:
    `argmin P(f) busy(f) + P_idle (D - busy(f))` with `busy(f) <= D`.

    Adapted: the source controls prefill and decode GPUs apart; here one engine does both, so while
    prompts wait the clock is the higher of the two choices. The profiled table is computed from
    the common predictor at the mean context seen; the gaps are compared as `ObservedGaps` says.

    Args:
        inputs: What it may know.
        knobs: Its knobs.
    """

    name = "greenllm"

    def __init__(self, inputs: PolicyInputs, knobs: GreenllmKnobs) -> None:
        self._knobs = knobs
        self._predictor = inputs.predictor
        self._clocks = inputs.predictor.clocks_mhz
        self._slos = inputs.profile.default_slos
        self._view = EngineView(inputs.profile)
        self._gaps = ObservedGaps(1.0, self._slos)
        self._rate = ObservedGaps(knobs.coarse_seconds, self._slos)
        self._floor = int(np.searchsorted(self._clocks, knobs.floor_ratio * self._clocks[-1]))
        self._fastest = len(self._clocks) - 1
        self._table: dict[int, int] = {}
        self._shift: dict[int, int] = {}
        self._bucket: int | None = None
        self._candidate: int | None = None
        self._confirmations = 0
        self._current = self._fastest
        self._coarse_due = self._fine_due = self._shift_due = 0.0
        self._moves = self._upper_hits = self._lower_hits = 0

    def clock_mhz(self, state: IterationState) -> int:
        """The decode loops' clock, or the prefill's while prompts wait and it is higher."""
        self._view.observe(state)
        self._gaps.add(state)
        self._rate.add(state)
        now = state.engine_time_seconds
        if now >= self._coarse_due:
            self._coarse_due = now + self._knobs.coarse_seconds
            self._coarse(state)
        if now >= self._fine_due:
            self._fine_due = now + self._knobs.fine_seconds
            self._fine()
        if now >= self._shift_due:
            self._shift_due = now + self._knobs.shift_seconds
            self._move_band()
        outlook = self._view.outlook(state)
        chosen = self._current
        if outlook.has_prompts:
            chosen = max(chosen, self._for_prompts(outlook, now))
        elif outlook.waiting_count:
            chosen = self._fastest
        return int(self._clocks[chosen])

    def _coarse(self, state: IterationState) -> None:
        rate = self._rate.tokens_count / self._knobs.coarse_seconds
        if rate <= 0.0:
            return
        bucket = round(math.log(rate) / math.log(self._knobs.bucket_ratio))
        self._confirmations = self._confirmations + 1 if bucket == self._candidate else 1
        self._candidate = bucket
        confirmed = self._confirmations >= self._knobs.confirmations_count
        if bucket != self._bucket and (confirmed or self._bucket is None):
            self._bucket = bucket
            if bucket not in self._table:
                self._table[bucket] = self._profiled(self._knobs.bucket_ratio**bucket, state)

    def _profiled(self, rate: float, state: IterationState) -> int:
        """The clock of least power that carries a token rate within the limit."""
        scheduled = state.scheduled
        context = scheduled.sum_decode_kv_tokens / max(scheduled.num_decode_requests, 1)
        shapes = np.zeros((len(_BATCHES), len(SHAPE_COLUMNS)))
        shapes[:, 3] = shapes[:, 5] = _BATCHES
        shapes[:, 4] = _BATCHES * max(context, 1.0)
        prediction = self._predictor.predict(shapes)
        batch = np.full(len(self._clocks), 1.0)
        columns = range(len(self._clocks))
        latency = batch
        for _ in range(_FIXED_POINT_STEPS):
            latency = np.array(
                [np.interp(batch[c], _BATCHES, prediction.latency_seconds[:, c]) for c in columns]
            )
            batch = np.clip(0.5 * batch + 0.5 * rate * latency, 1.0, _BATCHES[-1])
        power = np.array(
            [np.interp(batch[c], _BATCHES, prediction.power_watts[:, c]) for c in columns]
        )
        allowed = latency <= self._knobs.high_ratio * self._gaps.limit_seconds
        allowed[: self._floor] = False
        if not allowed.any():
            return self._fastest
        return int(np.argmin(np.where(allowed, power, np.inf)))

    def _fine(self) -> None:
        observed = self._gaps.seconds()
        if observed is None or self._bucket is None:
            return
        center = self._table[self._bucket] + self._shift.get(self._bucket, 0)
        low = min(max(center - self._knobs.band_steps, self._floor), self._fastest)
        high = max(min(center + self._knobs.band_steps, self._fastest), self._floor)
        wanted = self._current
        if observed > self._knobs.high_ratio * self._gaps.limit_seconds:
            wanted += 1
        elif observed < self._knobs.low_ratio * self._gaps.limit_seconds:
            wanted -= 1
        if wanted != self._current:
            self._moves += 1
            self._upper_hits += wanted > high
            self._lower_hits += wanted < low
        self._current = min(max(wanted, low), high)

    def _move_band(self) -> None:
        moves = self._moves
        if moves and self._bucket is not None:
            shift = self._shift.get(self._bucket, 0)
            if self._upper_hits >= self._knobs.shift_ratio * moves:
                self._shift[self._bucket] = shift + self._knobs.band_steps
            elif self._lower_hits >= self._knobs.shift_ratio * moves:
                self._shift[self._bucket] = shift - self._knobs.band_steps
        self._moves = self._upper_hits = self._lower_hits = 0

    def _for_prompts(self, outlook: Outlook, now: float) -> int:
        """The clock that computes the waiting prompts in time at the least energy."""
        limit = self._slos.ttft_seconds
        if limit is None:
            return self._floor
        prediction = self._predictor.predict(outlook.shapes)
        time_left = self._knobs.prefill_guard_ratio * limit - outlook.oldest_wait_seconds(now)
        busy: NDArray[np.float64] = prediction.latency_seconds.sum(axis=0)
        energy = (prediction.latency_seconds * prediction.power_watts).sum(axis=0)
        cost = energy + self._predictor.idle_power_watts * (time_left - busy)
        allowed = busy <= time_left
        allowed[: self._floor] = False
        return int(np.argmin(np.where(allowed, cost, np.inf))) if allowed.any() else self._fastest
