"""How much work arrives: slow estimates of the offered load, on engine time.

In an open loop the work that flows through an engine is the work that arrives, whatever the clock,
so what the iterations have computed over the last minute estimates it at every fidelity, also where
the engine tells only aggregates. Where answers take minutes, work flows long after it has arrived:
there, requests times the mean length of an answer tell it sooner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from throttle.control.state import EventKind, Phase

if TYPE_CHECKING:
    from throttle.control.state import IterationState


@dataclass(frozen=True, slots=True)
class OfferedLoad:
    """What arrives per second, and how it comes.

    Attributes:
        prefill_tokens_per_second: Prompt tokens to compute.
        prefill_iterations_per_second: Iterations that compute prompts.
        prefill_requests_per_iteration: Prompts in one of those.
        prefill_kv_tokens_per_iteration: Tokens of those prompts already in KV.
        decode_tokens_per_second: Output tokens.
        context_tokens: Mean context of a generating request.
        dispersion_ratio: Variance over mean of the prompts that start per second, at least 1: 1 for
            Poisson arrivals, more for bursts (index of dispersion for counts).
        requests_per_second: Requests; 0 where the engine does not tell of them one by one.
    """

    prefill_tokens_per_second: float
    prefill_iterations_per_second: float
    prefill_requests_per_iteration: float
    prefill_kv_tokens_per_iteration: float
    decode_tokens_per_second: float
    context_tokens: float
    dispersion_ratio: float = 1.0
    requests_per_second: float = 0.0

    def with_answers_of(self, mean_tokens: float) -> OfferedLoad:
        """The load when the answers that arrive, of this mean length, need more than what flows.

        While a batch of long answers builds up, fewer tokens flow than arrive. The other way round
        it is what flows that has to be carried.
        """
        arriving = self.requests_per_second * mean_tokens
        flowing = self.decode_tokens_per_second
        most = max(flowing, min(arriving, _GROWTH_LIMIT_RATIO * flowing))
        return replace(self, decode_tokens_per_second=most)


#: Lengths are beliefs: tokens to come are not believed to be more than this many times what flows.
_GROWTH_LIMIT_RATIO = 1.5
#: Length of the intervals in which prompts are counted, and the weight of the assumption that they
#: arrive as a Poisson process, in intervals.
_COUNT_SECONDS = 1.0
_POISSON_WEIGHT = 10.0


class LoadEstimator:
    """Exponentially weighted sums over engine time.

    Args:
        time_constant_seconds: Age at which an observation weighs 1/e.
        settling_seconds: Engine time that must be seen before the load is called known.
    """

    def __init__(self, time_constant_seconds: float, settling_seconds: float) -> None:
        self._time_constant_seconds = time_constant_seconds
        self._settling_seconds = settling_seconds
        self._known: OfferedLoad | None = None  # since the last state
        self._last_seconds: float | None = None
        self._seen_seconds = 0.0
        self._weight_seconds = 0.0
        self._prefill_tokens = 0.0
        self._prefill_iterations = 0.0
        self._prefill_requests = 0.0
        self._prefill_kv_tokens = 0.0
        self._requests = 0.0
        self._decode_tokens = 0.0
        self._decode_kv_tokens = 0.0
        self._dispersion = _Dispersion(time_constant_seconds / _COUNT_SECONDS)

    def add(self, state: IterationState) -> None:
        """Take in a completed iteration or a heartbeat; a planned state is not yet work done."""
        if state.phase is Phase.PLANNED:
            return
        self._known = None
        now = state.engine_time_seconds
        if self._last_seconds is not None:
            self._age(now - self._last_seconds)
        self._last_seconds = now
        arrived = [event for event in state.request_events if event.kind is EventKind.ARRIVED]
        self._requests += len(arrived)
        prompts = state.scheduled.num_prefill_requests if state.phase is Phase.COMPLETED else 0
        self._dispersion.add(now, prompts)
        if state.phase is not Phase.COMPLETED:
            return
        work = state.scheduled
        self._decode_tokens += work.num_decode_requests
        self._decode_kv_tokens += work.sum_decode_kv_tokens
        if work.sum_prefill_tokens:
            self._prefill_tokens += work.sum_prefill_tokens
            self._prefill_iterations += 1.0
            self._prefill_requests += work.num_prefill_requests
            self._prefill_kv_tokens += work.sum_prefill_kv_tokens

    @property
    def known(self) -> bool:
        """Whether enough engine time was seen, and something came."""
        return self._seen_seconds >= self._settling_seconds and self._decode_tokens >= 1e-6

    @property
    def context_tokens(self) -> float:
        """As in the load, which must be known."""
        return self._decode_kv_tokens / self._decode_tokens

    @property
    def prompts_per_second(self) -> float:
        """Prompts that are computed, of the load, which must be known."""
        iterations = max(self._prefill_iterations, 1e-9)
        return (self._prefill_iterations / self._weight_seconds) * (
            self._prefill_requests / iterations
        )

    def load(self) -> OfferedLoad | None:
        """The present estimate; None while it is not known."""
        if self._known is None and self.known:
            self._known = self._estimate()
        return self._known

    def _estimate(self) -> OfferedLoad:
        iterations = max(self._prefill_iterations, 1e-9)
        return OfferedLoad(
            prefill_tokens_per_second=self._prefill_tokens / self._weight_seconds,
            prefill_iterations_per_second=self._prefill_iterations / self._weight_seconds,
            prefill_requests_per_iteration=self._prefill_requests / iterations,
            prefill_kv_tokens_per_iteration=self._prefill_kv_tokens / iterations,
            decode_tokens_per_second=self._decode_tokens / self._weight_seconds,
            context_tokens=self.context_tokens,
            dispersion_ratio=self._dispersion.ratio(),
            requests_per_second=self._requests / self._weight_seconds,
        )

    def _age(self, elapsed_seconds: float) -> None:
        decay = math.exp(-elapsed_seconds / self._time_constant_seconds)
        self._seen_seconds += elapsed_seconds
        self._weight_seconds = self._weight_seconds * decay + elapsed_seconds
        self._requests *= decay
        self._prefill_tokens *= decay
        self._prefill_iterations *= decay
        self._prefill_requests *= decay
        self._prefill_kv_tokens *= decay
        self._decode_tokens *= decay
        self._decode_kv_tokens *= decay


#: Silence of this many memories leaves nothing of what was counted before.
_FORGOTTEN_MEMORIES = 50.0


class _Dispersion:
    """Variance over mean of counts per interval, exponentially weighted.

    Args:
        memory_intervals: Age, in intervals, at which a count weighs 1/e.
    """

    def __init__(self, memory_intervals: float) -> None:
        self._decay = math.exp(-1.0 / memory_intervals)
        self._forgotten_seconds = _FORGOTTEN_MEMORIES * memory_intervals * _COUNT_SECONDS
        self._ends_seconds: float | None = None
        self._count = 0.0
        self._weight = self._sum = self._squares = 0.0

    def add(self, now_seconds: float, count: int) -> None:
        """Count prompts at a time that does not fall."""
        if self._ends_seconds is None:
            self._ends_seconds = now_seconds + _COUNT_SECONDS
        if now_seconds - self._ends_seconds > self._forgotten_seconds:
            # as the loop would end, without its steps: an engine's clock may leap by any amount
            self._weight, self._sum, self._squares = 1.0 / (1.0 - self._decay), 0.0, 0.0
            self._count, self._ends_seconds = 0.0, now_seconds + _COUNT_SECONDS
        while now_seconds >= self._ends_seconds:
            self._weight = self._weight * self._decay + 1.0
            self._sum = self._sum * self._decay + self._count
            self._squares = self._squares * self._decay + self._count**2
            self._count = 0.0
            # far from zero, adding an interval may change nothing
            beyond = math.nextafter(self._ends_seconds, math.inf)
            self._ends_seconds = max(self._ends_seconds + _COUNT_SECONDS, beyond)
        self._count += count

    def ratio(self) -> float:
        """At least 1; drawn towards 1 while few intervals were seen."""
        if self._sum <= 0.0:
            return 1.0
        mean = self._sum / self._weight
        variance = max(self._squares / self._weight - mean * mean, 0.0)
        observed = variance / mean
        shrunk = (observed * self._weight + _POISSON_WEIGHT) / (self._weight + _POISSON_WEIGHT)
        return max(shrunk, 1.0)
