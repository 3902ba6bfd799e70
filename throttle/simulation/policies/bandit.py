"""AGFT-like contextual bandit over clocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.control.state import Phase

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.state import IterationState
    from throttle.simulation.policies.policy import PolicyInputs

_CONTEXT = 8


@dataclass(frozen=True, slots=True)
class LinUcbKnobs:
    """Knobs of `LinUcb`; where the source's are not known, chosen on the Azure trace.

    Attributes:
        window_seconds: Time that an arm is held (the source: 0.8).
        arms_count: Clocks, evenly spaced.
        floor_ratio: Lowest of them over the highest clock.
        alpha: Weight of the confidence bound at first.
        alpha_decay_windows: Windows after which it has fallen to half.
        prune_ratio: An arm whose mean energy-delay product exceeds the best one's by this factor
            is dropped.
        prune_pulls_count: Pulls before an arm may be dropped.
    """

    window_seconds: float = 0.8
    arms_count: int = 12
    floor_ratio: float = 0.4
    alpha: float = 0.4
    alpha_decay_windows: float = 60.0
    prune_ratio: float = 1.3
    prune_pulls_count: int = 4


class LinUcb:
    """LinUCB over clocks; the reward is minus energy times delay.

    AGFT (arXiv 2508.01744; Li et al., WWW 2010 for LinUCB). Context: queue, running requests, KV
    share, age of the queue, mean gap, prompt and output token rates. No deadlines and no
    predictor, as in the source; arms with a poor energy-delay product are pruned. Energy is that of
    one output token over a window, delay the mean gap.

    Args:
        inputs: What it may know.
        knobs: Its knobs.
    """

    name = "linucb"

    def __init__(self, inputs: PolicyInputs, knobs: LinUcbKnobs) -> None:
        self._knobs = knobs
        self._readings = inputs.readings
        self._profile = inputs.profile
        clocks = inputs.predictor.clocks_mhz
        wanted = np.linspace(knobs.floor_ratio, 1.0, knobs.arms_count) * clocks[-1]
        self._clocks = clocks[np.minimum(np.searchsorted(clocks, wanted), len(clocks) - 1)]
        count = len(self._clocks)
        self._designs = np.tile(np.eye(_CONTEXT), (count, 1, 1))
        self._rewards = np.zeros((count, _CONTEXT))
        self._pulls = np.zeros(count)
        self._products = np.zeros(count)
        self._arm = count - 1
        self._context = np.zeros(_CONTEXT)
        self._windows = 0
        self._scale: float | None = None
        self._began_seconds = self._began_joules = 0.0
        self._tokens = self._prompts = self._gap_seconds = 0.0

    def clock_mhz(self, state: IterationState) -> int:
        """Another arm at the end of each window in which tokens came."""
        duration = state.iteration_duration_seconds
        if state.phase is Phase.COMPLETED and duration is not None:
            rows = state.scheduled.num_decode_requests
            self._tokens += rows
            self._gap_seconds += duration * rows
            self._prompts += state.scheduled.sum_prefill_tokens
        span = state.engine_time_seconds - self._began_seconds
        if span >= self._knobs.window_seconds:
            self._end_window(state, span)
        return int(self._clocks[self._arm])

    def _end_window(self, state: IterationState, span: float) -> None:
        joules = self._readings.energy_joules
        if self._tokens:
            gap = self._gap_seconds / self._tokens
            product = (joules - self._began_joules) / self._tokens * gap
            self._learn(product)
            self._context = self._read(state, span, gap)
            self._arm = self._choose()
        self._began_seconds, self._began_joules = state.engine_time_seconds, joules
        self._tokens = self._prompts = self._gap_seconds = 0.0

    def _learn(self, product: float) -> None:
        if self._scale is None:
            self._scale = product  # of the first window, at the highest clock
        arm, reward = self._arm, -product / self._scale
        self._designs[arm] += np.outer(self._context, self._context)
        self._rewards[arm] += reward * self._context
        self._pulls[arm] += 1.0
        self._products[arm] += (product - self._products[arm]) / self._pulls[arm]
        self._windows += 1

    def _read(self, state: IterationState, span: float, gap: float) -> NDArray[np.float64]:
        queued, cache = state.queued, state.kv_cache
        usage = cache.usage_ratio or 0.0
        if cache.used_blocks_count is not None:
            usage = cache.used_blocks_count / self._profile.kv_blocks_count
        return np.array(
            [
                1.0,
                np.log1p(queued.num_prefill_requests),
                np.log1p(state.scheduled.num_decode_requests) / 5.0,
                usage,
                np.log1p(queued.sum_prefill_tokens) / 10.0,
                gap / 0.05,
                np.log1p(self._prompts / span) / 10.0,
                np.log1p(self._tokens / span) / 8.0,
            ]
        )

    def _choose(self) -> int:
        knobs, pulled = self._knobs, self._pulls > 0
        if not pulled.all():  # every arm once, from the highest clock down
            return int(np.flatnonzero(~pulled)[-1])
        best = self._products.min()
        poor = (self._products > knobs.prune_ratio * best) & (
            self._pulls >= knobs.prune_pulls_count
        )
        alpha = knobs.alpha * 0.5 ** (self._windows / knobs.alpha_decay_windows)
        inverse = np.linalg.inv(self._designs)
        expected = np.einsum("aij,aj->ai", inverse, self._rewards) @ self._context
        width = np.sqrt(np.einsum("i,aij,j->a", self._context, inverse, self._context))
        return int(np.argmax(np.where(poor, -np.inf, expected + alpha * width)))
