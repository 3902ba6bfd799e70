"""Speculative decoding: how many drafted tokens the model accepts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from throttle.simulation.parameters import EngineParameters


class Speculation:
    """Each draft is accepted with one chance, if all drafts before it were.

    So j or more are accepted with probability `ratio^j` (Leviathan et al., ICML 2023, section 3.1).
    What drafting itself costs is left out: a small head or an n-gram lookup.

    Args:
        engine: Options of the engine: drafts for each generating request and iteration, and the
            chance of one draft.
        generator: Source of randomness.
    """

    def __init__(self, engine: EngineParameters, generator: random.Random) -> None:
        self.draft_tokens_count = engine.draft_tokens_count
        ratio = engine.draft_acceptance_ratio
        self._generator = generator
        self._all = ratio >= 1.0
        # A draw's logarithm over minus infinity is 0: nothing is accepted.
        self._log_ratio = math.log(ratio) if 0.0 < ratio < 1.0 else -math.inf

    def accepted(self, drafts_count: int) -> int:
        """How many of so many drafts are accepted, 0 to all of them."""
        draw = 1.0 - self._generator.random()  # above 0, at most 1
        if self._all:
            return drafts_count
        return min(drafts_count, int(math.log(draw) / self._log_ratio))
