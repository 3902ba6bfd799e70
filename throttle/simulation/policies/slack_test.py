"""Which clocks keep every limit through the next iterations, with slack banked per request.

The test of the notes' baselines: the mean gap that a request may still have over the next tokens
follows from the gaps it has had, b = (T2 (g + H) - elapsed) / H, and every prompt must be through
within its TTFT. What not even the fastest clock can save is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.control.scoreboard import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.state import Slos
    from throttle.simulation.policies.outlook import Outlook

#: Over so many tokens a request that is behind may still catch up at the fastest clock.
_RESCUE_TOKENS = 200.0


@dataclass(frozen=True, slots=True)
class SlackTest:
    """Shares of the limits that are planned with.

    Attributes:
        tpot_guard_ratio: Of the limit on the mean gap, and of a limit on single gaps.
        ttft_guard_ratio: Of the time left to a first token.
        lookahead_tokens: Tokens over which a request's banked slack is spent.
    """

    tpot_guard_ratio: float = 0.95
    ttft_guard_ratio: float = 0.6
    lookahead_tokens: float = 20.0

    def gap_seconds(self, decodes: NDArray[np.float64], now: float, fastest: float) -> float:
        """Longest next gap that every generating request allows; infinite without limits.

        Args:
            decodes: Scoreboard rows.
            now: Engine time.
            fastest: Duration of the next iteration at the fastest clock.
        """
        if not len(decodes):
            return float(np.inf)
        allowed = self._mean_gap(decodes, now, self.tpot_guard_ratio, self.lookahead_tokens)
        rescue = self._mean_gap(decodes, now, 1.0, _RESCUE_TOKENS)
        kept = allowed[rescue >= fastest]
        least = float(kept.min(initial=np.inf))
        single = float(decodes[:, Column.TBT].min()) * self.tpot_guard_ratio
        return min(least, single) if fastest <= single else least

    def clocks(
        self, outlook: Outlook, latency_seconds: NDArray[np.float64], now: float, slos: Slos
    ) -> NDArray[np.bool_]:
        """Which clocks keep every limit, (C,).

        Args:
            outlook: The next iterations.
            latency_seconds: Predicted duration of each of them at each clock, (K, C).
            now: Engine time.
            slos: Limits of the engine, used where single requests are not known.
        """
        first = latency_seconds[0]
        if not len(outlook.decodes) and not len(outlook.prompts):
            return self._of_aggregates(outlook, first, slos)
        gap = self.gap_seconds(outlook.decodes, now, float(first[-1]))
        kept: NDArray[np.bool_] = first <= gap
        return kept & self.in_time(outlook, latency_seconds, now)

    def in_time(
        self, outlook: Outlook, latency_seconds: NDArray[np.float64], now: float
    ) -> NDArray[np.bool_]:
        """Which clocks finish every prompt within its TTFT, (C,)."""
        prompts = outlook.prompts
        granted = prompts[:, Column.TTFT] - (now - prompts[:, Column.ARRIVAL])
        judged = np.isfinite(granted) & np.isnan(prompts[:, Column.FIRST_TOKEN])
        if not judged.any():
            return np.ones(latency_seconds.shape[1], dtype=bool)
        ends = np.cumsum(latency_seconds, axis=0)
        at = np.minimum(outlook.prompts_at[judged], len(ends)) - 1  # -1: beyond the plan's end
        needed, granted = ends[at], granted[judged]
        saved = needed[:, -1] <= granted
        kept: NDArray[np.bool_] = (
            needed[saved] <= (granted[saved] * self.ttft_guard_ratio)[:, None]
        ).all(axis=0)
        return kept

    def _of_aggregates(
        self, outlook: Outlook, first: NDArray[np.float64], slos: Slos
    ) -> NDArray[np.bool_]:
        limits = [each for each in (slos.tpot_seconds, slos.tbt_seconds) if each is not None]
        kept = np.ones(len(first), dtype=bool)
        if limits and outlook.shapes[0, 3] > 0:
            kept = first <= min(limits) * self.tpot_guard_ratio
        if outlook.waiting_count and slos.ttft_seconds is not None:
            kept = np.zeros(len(first), dtype=bool)
        return kept

    def _mean_gap(
        self, decodes: NDArray[np.float64], now: float, guard: float, tokens: float
    ) -> NDArray[np.float64]:
        gaps = decodes[:, Column.GENERATED] - decodes[:, Column.FIRST_GENERATED]
        elapsed = now - decodes[:, Column.FIRST_TOKEN]
        mean: NDArray[np.float64] = (
            decodes[:, Column.TPOT] * guard * (gaps + tokens) - elapsed
        ) / tokens
        return np.where(np.isnan(mean), np.inf, mean)
