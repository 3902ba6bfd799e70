"""EcoFreq, the clock policy of VoltanaLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.simulation.policies.outlook import EngineView
from throttle.simulation.policies.slack_test import SlackTest

if TYPE_CHECKING:
    from throttle.control.state import IterationState
    from throttle.simulation.policies.policy import PolicyInputs


@dataclass(frozen=True, slots=True)
class EcoFreqKnobs:
    """Knobs of `EcoFreq`.

    Attributes:
        margin_ratio: The limit is loosened by this share (the source's demo: 0.35) or, below 0,
            tightened; chosen on the Azure trace so that attainment holds.
        floor_ratio: Lowest clock over the highest. The source profiles 0.71 to 1 on A100.
        silence_seconds: Without work for so long, the lowest clock.
    """

    margin_ratio: float = -0.2
    floor_ratio: float = 0.4
    silence_seconds: float = 5.0


class EcoFreq:
    """The lowest clock at which the next iteration keeps the limit; a queue means full speed.

    VoltanaLLM (arXiv 2509.04827; freq_manager.py at f7789ac). Adapted: the source controls prefill
    and decode servers apart, here one engine does both, so the limit on the gap is put to the
    mixed iteration, prompts in progress must be through within TTFT less the oldest wait, and the
    queue that means full speed is what the next iteration leaves waiting (in the source's decode
    servers, too, a request queues only when it finds no room). Its
    latency model (linear per clock and batch bucket) gives way to the common predictor. Its rate
    thresholds are off, as in its demo.

    Args:
        inputs: What it may know.
        knobs: Its knobs.
    """

    name = "ecofreq"

    def __init__(self, inputs: PolicyInputs, knobs: EcoFreqKnobs) -> None:
        self._knobs = knobs
        self._predictor = inputs.predictor
        self._view = EngineView(inputs.profile)
        clocks = inputs.predictor.clocks_mhz
        self._floor = int(np.searchsorted(clocks, knobs.floor_ratio * clocks[-1]))
        slos = inputs.profile.default_slos
        gaps = [each for each in (slos.tpot_seconds, slos.tbt_seconds) if each is not None]
        self._limit_seconds = min(gaps, default=np.inf) * (1.0 + knobs.margin_ratio)
        self._ttft = SlackTest(ttft_guard_ratio=min(1.0 + knobs.margin_ratio, 1.0))
        self._current = self._floor
        self._worked_seconds = 0.0

    def clock_mhz(self, state: IterationState) -> int:
        """The source's steps, in its order."""
        self._view.observe(state)
        self._current = self._choose(state)
        return int(self._predictor.clocks_mhz[self._current])

    def _choose(self, state: IterationState) -> int:
        fastest = len(self._predictor.clocks_mhz) - 1
        outlook = self._view.outlook(state)
        now = state.engine_time_seconds
        if outlook.idle and not outlook.waiting_count:
            silent = now - self._worked_seconds >= self._knobs.silence_seconds
            return self._floor if silent else self._current
        self._worked_seconds = now
        # A queue is what the next iteration leaves waiting; every arrival waits for that long.
        if outlook.idle or (outlook.prompts_at != 1).any():
            return fastest
        if not len(outlook.prompts) and outlook.waiting_count:  # only aggregates are known
            return fastest
        latency = self._predictor.predict(outlook.shapes).latency_seconds
        kept = self._ttft.in_time(outlook, latency, now)
        if outlook.shapes[0, 3] > 0:
            kept &= latency[0] <= self._limit_seconds
        kept[: self._floor] = False
        kept[fastest] = True
        return int(np.argmax(kept))
