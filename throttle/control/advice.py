"""Advice on what the controller does not decide: which requests to admit, and how many GPUs.

In the manner of throttLL'eM's scheduler and autoscaler (Kakolyris et al., HPCA 2025, sections IV-D
and IV-E), which admit a request if every limit still holds at the highest clock, and choose the
least engine that carries the load. Here it is told and never enforced.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from throttle.control.cruise import equilibrium_shapes, growth_limit_ratio
from throttle.control.scoreboard import Column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from predictors.prediction import Predictor
    from throttle.control.arrivals import OfferedLoad
    from throttle.control.cruise import CarryingLimits
    from throttle.control.projection import Horizon
    from throttle.control.scoreboard import LiveRequests

#: Sizes are judged again after so much engine time: engines are not resized by the second.
_SIZES_PERIOD_SECONDS = 10.0


class Verdict(enum.IntEnum):
    """What to do with a queued request (values as in the protocol)."""

    ADMIT = 1
    HOLD = 2
    LOST = 3


class AdmissionReason(enum.IntEnum):
    """Why (values and meanings as in the protocol)."""

    FITS = 1
    NO_ROOM = 2
    DELAYS_OTHERS = 3
    TOO_LATE = 4


@dataclass(frozen=True, slots=True)
class AdmissionAdvice:
    """Advice on one queued request.

    Attributes:
        request_number: The engine's number.
        verdict: What to do.
        reason: Why.
        first_token_seconds: From now to its first token at the fastest clock, by the upper bound;
            None while no iteration has room for it.
    """

    request_number: int
    verdict: Verdict
    reason: AdmissionReason
    first_token_seconds: float | None


def advise_admissions(
    horizon: Horizon,
    live: LiveRequests,
    latency_upper_seconds: NDArray[np.float64],
    now_seconds: float,
) -> tuple[AdmissionAdvice, ...]:
    """Judge every queued request at the fastest clock, in the order of the queue.

    Args:
        horizon: The projected segments, which admit the queue in its order as room allows.
        live: The requests that the horizon was projected from.
        latency_upper_seconds: Upper bound of an iteration of each segment at that clock, (K,).
        now_seconds: Engine time.
    """
    spent = np.cumsum(latency_upper_seconds * horizon.iterations)
    tightest_gap_seconds = float(horizon.decodes[:, Column.TBT].min(initial=np.inf))
    planned = {
        int(number): position for position, number in enumerate(horizon.prompts[:, Column.NUMBER])
    }
    advice = []
    for row in live.waiting:
        number = int(row[Column.NUMBER])
        left = float(row[Column.TTFT] - (now_seconds - row[Column.ARRIVAL]))
        position = planned.get(number)
        if position is None:
            late = left <= 0.0
            verdict = Verdict.LOST if late else Verdict.HOLD
            reason = AdmissionReason.TOO_LATE if late else AdmissionReason.NO_ROOM
            advice.append(AdmissionAdvice(number, verdict, reason, None))
            continue
        segment = int(horizon.first_tokens.segments[position])
        iterations = float(horizon.first_tokens.iterations[position])
        lasts = float(latency_upper_seconds[segment])
        first = float(spent[segment]) - (float(horizon.iterations[segment]) - iterations) * lasts
        if first > left:  # False where no limit applies or the arrival was not seen
            verdict, reason = Verdict.LOST, AdmissionReason.TOO_LATE
        elif lasts > tightest_gap_seconds:
            verdict, reason = Verdict.HOLD, AdmissionReason.DELAYS_OTHERS
        else:
            verdict, reason = Verdict.ADMIT, AdmissionReason.FITS
        advice.append(AdmissionAdvice(number, verdict, reason, first))
    return tuple(advice)


@dataclass(frozen=True, slots=True)
class Advice:
    """What comes with a decision.

    Attributes:
        admissions: One per queued request, in the order of the queue.
        load_headroom_ratio: Share by which the load may grow before the fastest allowed clock
            carries it no more; None while the load is not known.
        least_gpus_count: GPUs of the least size that carries the load; None where none is known.
    """

    admissions: tuple[AdmissionAdvice, ...]
    load_headroom_ratio: float | None
    least_gpus_count: int | None


@dataclass(frozen=True, slots=True)
class ParallelSize:
    """The same engine on another number of GPUs.

    Attributes:
        gpus_count: How many.
        predictor: Predicts it.
        kv_tokens: Tokens that its KV cache would hold.
    """

    gpus_count: int
    predictor: Predictor
    kv_tokens: float


class ScalingAdvisor:
    """Which is the least of some sizes that carries the load.

    Args:
        sizes: Sizes there are predictors for.
        limits: Of the engine as it is; each size has its own KV cache.
    """

    def __init__(self, sizes: Sequence[ParallelSize], limits: CarryingLimits) -> None:
        self._sizes = sorted(sizes, key=lambda size: size.gpus_count)
        self._limits = limits
        self._least_gpus_count: int | None = None
        self._due_seconds = -np.inf

    def least_gpus_count(self, load: OfferedLoad | None, now_seconds: float) -> int | None:
        """GPUs of the least size that carries the load at its highest clock.

        None while the load is not known, and where no size carries it or none has a predictor.
        """
        if load is None or not self._sizes:
            return None
        if now_seconds >= self._due_seconds:
            carrying = (size for size in self._sizes if self._carries(size, load))
            found = next(carrying, None)
            self._least_gpus_count = None if found is None else found.gpus_count
            self._due_seconds = now_seconds + _SIZES_PERIOD_SECONDS
        return self._least_gpus_count

    def _carries(self, size: ParallelSize, load: OfferedLoad) -> bool:
        limits = replace(self._limits, kv_tokens=size.kv_tokens)
        latency = size.predictor.predict(equilibrium_shapes(load, limits)).latency_seconds
        return growth_limit_ratio(load, limits, latency[:, -1]) >= 1.0
