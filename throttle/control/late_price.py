"""What a late answer is worth: the price at which lateness and energy are traded.

A limit on lateness at every single moment would raise the clock where that costs much and helps
little, and leave the quiet moments unused. So lateness has a price instead, the same at every
moment, and what is kept is the share of late answers over time: least energy for a given share is
least energy plus price times lateness (Lagrange), and the price is what makes the share come out.

The price is in answers: one late answer weighs as much as the energy of so many. It does not depend
on load, GPU or model, and in simulation it moves by a factor of four between the lightest and the
heaviest load.
"""

from __future__ import annotations

import math

#: Price at the start, and how far it may move: what was met over traces, loads and plants.
_FIRST_PRICE = 80.0
_LEAST_PRICE = 10.0
_MOST_PRICE = 400.0
#: Memory of the price: long against a burst, short against a change of load.
_PRICE_SECONDS = 60.0
#: One decision moves the price as if it had expected at most so many times the target.
_SURPRISE_LIMIT = 10.0
#: A pause between decisions counts for at most so long.
_LONGEST_PAUSE_SECONDS = 0.5


class LatePrice:
    """Moves the price so that the expected share keeps to a target, and the target by what is seen.

    The price follows a dual ascent: up while more is expected late than the target, down while
    less. Expectations err, so the target itself follows what ended late: adaptive conformal
    inference (Gibbs and Candes 2021, equation 2) on the logarithm. An answer that is late although
    it need not be lowers it at once, the others raise it slowly.

    Args:
        target_ratio: Share of answers that may be late because of lower clocks.
    """

    _TARGET_STEP = 0.15
    _TARGET_LIMITS = (math.log(1.0 / 8.0), math.log(2.0))

    def __init__(self, target_ratio: float) -> None:
        self._target_ratio = target_ratio
        self._log_scale = 0.0
        self._log_price = math.log(_FIRST_PRICE)
        self._last_seconds: float | None = None

    @property
    def answers(self) -> float:
        """Energy of how many answers a late one weighs as much as."""
        return math.exp(self._log_price)

    @property
    def target_ratio(self) -> float:
        """Share of late answers to plan with now."""
        return self._target_ratio * math.exp(self._log_scale)

    def learn(self, *, late: bool) -> None:
        """Take in one answer that ended, late for want of a faster clock or not."""
        surplus = float(late) - self._target_ratio
        scale = self._log_scale - self._TARGET_STEP * surplus
        self._log_scale = min(max(scale, self._TARGET_LIMITS[0]), self._TARGET_LIMITS[1])

    def expect(self, late_ratio: float, now_seconds: float) -> None:
        """Take in the share expected late at the chosen clock, at an engine time."""
        last, self._last_seconds = self._last_seconds, now_seconds
        if last is None or now_seconds <= last:
            return
        elapsed = min(now_seconds - last, _LONGEST_PAUSE_SECONDS)
        surplus = min(late_ratio / self.target_ratio, _SURPRISE_LIMIT) - 1.0
        moved = self._log_price + surplus * elapsed / _PRICE_SECONDS
        self._log_price = min(max(moved, math.log(_LEAST_PRICE)), math.log(_MOST_PRICE))
