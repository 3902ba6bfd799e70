"""What the load will bring: estimated as it comes, settled once a second.

The slow half of a decision. Batch, prompts between tokens and the price of time change with the
load, not with the iteration, so they are computed once per period and read from here in between.
They would take several times as long as a decision, so they are computed piece by piece over some
ten decisions, and what each piece wants predicted rides on the prediction of that decision's
horizon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.prediction import Prediction
from throttle.control.arrivals import LoadEstimator
from throttle.control.cruise import (
    CarryingLimits,
    Equilibrium,
    Interruptions,
    balance,
    equilibrium_shapes,
    expect_interruptions,
    growth_limit_ratio,
    refund_watts,
    settle,
)
from throttle.control.lateness import Newcomers, PromptDelay
from throttle.control.projection import Successors
from throttle.control.prompt_work import (
    PromptCost,
    PromptWork,
    PromptWorkEstimator,
    prompt_cost,
    prompt_size_shapes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from numpy.typing import NDArray

    from throttle.control.arrivals import OfferedLoad
    from throttle.control.compilation import CompiledSteps
    from throttle.control.lengths import LengthCurve
    from throttle.control.projection import Horizon
    from throttle.control.settings import ControlSettings
    from throttle.control.state import EngineProfile, IterationState

    #: Asks for the prediction of shapes, or with None to go on at the next decision.
    _Pieces = Generator[NDArray[np.float64] | None, Prediction | None, None]


#: Shapes that ride on one horizon's prediction, and pieces that a settling has at most, about.
_SHAPES_AT_ONCE = 8
_PIECES_COUNT = 16
#: Share of the period after which a settling should be done: where decisions come too seldom for
#: that, everything is computed at once.
_SETTLING_RATIO = 0.5
_NONE, _NO_TABLE = np.empty(0), np.empty((0, 0))
_NO_WORK = (_NONE, _NONE, _NONE, _NONE)
#: Generating requests beside a prompt while no equilibrium is known.
_UNKNOWN_BATCH = 16.0


@dataclass(frozen=True, slots=True)
class _Settled:
    """What was computed together.

    Attributes:
        load: Of which load; None before the first.
        equilibrium: What each clock settles at.
        interruptions: What prompts to come add.
        work_after_prompts: Prompt tokens that follow iterations with prompts.
        work_after_decodes: Those that follow iterations without.
        refund_watts: What a second less of computing is worth.
        load_headroom_ratio: By how much the load may grow.
    """

    load: OfferedLoad | None = None
    equilibrium: Equilibrium | None = None
    interruptions: Interruptions | None = None
    work_after_prompts: PromptWork | None = None
    work_after_decodes: PromptWork | None = None
    refund_watts: float = 0.0
    load_headroom_ratio: float | None = None


class Outlook:
    """One engine's load, and what each clock settles at under it.

    Args:
        profile: Who the engine is.
        settings: What the operator tuned.
        idle_power_watts: Power of one GPU while nothing runs, at every clock, (C,).
        ceiling: Index of the fastest clock that may be chosen.
        steps: Compiled code to use; None for the definitions.
    """

    def __init__(
        self,
        profile: EngineProfile,
        settings: ControlSettings,
        idle_power_watts: NDArray[np.float64],
        ceiling: int,
        steps: CompiledSteps | None = None,
    ) -> None:
        self._balance = balance if steps is None else steps.balance
        self._profile = profile
        self._ceiling = ceiling
        self._settings = settings
        # Where idle engines are parked, they rest at the lowest clock whatever the cruise clock is.
        resting = np.full_like(idle_power_watts, idle_power_watts[0])
        self._resting_power_watts = resting if settings.parking else idle_power_watts
        self._limits = _carrying_limits(profile, settings)
        self._load = LoadEstimator(
            settings.load_time_constant_seconds, settings.load_settling_seconds
        )
        self._prompt_work = PromptWorkEstimator(None if steps is None else steps.measure_work)
        self._settled = _Settled()
        self._arguments_of: _Settled | None = None
        self._arguments: tuple[Any, ...] = ()
        self._pieces: _Pieces | None = None
        self._at_once = True
        self._started_seconds = self._advanced_seconds = self._due_seconds = -np.inf

    @property
    def at_once(self) -> bool:
        """Whether what was due last is settled with it: what follows then differs."""
        return self._at_once

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What compiled code takes of what was settled last.

        Batches, stretches and seconds of a prompt token (`Interruptions`); `PromptWork.arguments`
        after iterations with prompts, and after those without.
        """
        settled = self._settled
        if self._arguments_of is not settled:
            self._arguments_of, self._arguments = settled, _arguments(settled)
        return self._arguments

    @property
    def newcomers_arguments(self) -> tuple[float, float, bool]:
        """Limit and number per second of answers that will begin, and whether they are known."""
        tpot = self._profile.default_slos.tpot_seconds
        if tpot is None or not self._load.known:
            return 0.0, 0.0, False
        return tpot, self._load.prompts_per_second, True

    def successors_arguments(self, clock_index: int) -> tuple[float, float]:
        """Batch at a clock that takes the place of those that end, and its mean context in tokens.

        The batch is below 0 while it is not known.
        """
        equilibrium = self._settled.equilibrium
        if equilibrium is None or not self._load.known:
            return -1.0, 0.0
        return float(equilibrium.batch_requests[clock_index]), self._load.context_tokens

    @property
    def equilibrium(self) -> Equilibrium | None:
        """What each clock settles at; None while the load is not known."""
        return self._settled.equilibrium

    @property
    def interruptions(self) -> Interruptions | None:
        """What prompts to come add to iterations; None while the load is not known."""
        return self._settled.interruptions

    @property
    def refund_watts(self) -> float:
        """What a second less of computing is worth at this load, of one GPU."""
        return self._settled.refund_watts

    @property
    def load_headroom_ratio(self) -> float | None:
        """Share by which the load may grow before the fastest allowed clock carries it no more.

        Below 0 it is too much already; None while the load is not known.
        """
        return self._settled.load_headroom_ratio

    @property
    def load(self) -> OfferedLoad | None:
        """The load that was settled last."""
        return self._settled.load

    @property
    def limits(self) -> CarryingLimits:
        """What no equilibrium may exceed."""
        return self._limits

    @property
    def least_resting_watts(self) -> float:
        """Power of one GPU at rest."""
        return float(self._resting_power_watts.min())

    def add(self, state: IterationState) -> None:
        """Take in one state, in order."""
        self._load.add(state)
        self._prompt_work.add(state)

    def due_shapes(
        self,
        now_seconds: float,
        lengths: LengthCurve,
        generated_tokens: Callable[[], NDArray[np.float64]],
    ) -> NDArray[np.float64] | None:
        """Go on with what is due; shapes whose prediction `settle` wants, (S, 7), or None.

        Args:
            now_seconds: Engine time.
            lengths: How long answers are.
            generated_tokens: Gives the output so far of those that go on, (n,).
        """
        if now_seconds <= self._advanced_seconds:
            return None
        elapsed, self._advanced_seconds = now_seconds - self._advanced_seconds, now_seconds
        spread_seconds = _SETTLING_RATIO * self._settings.cruise_period_seconds
        if self._pieces is not None and now_seconds > self._started_seconds + spread_seconds:
            self._pieces = None  # of a load that was: begun anew
        if self._pieces is None:
            if now_seconds < self._due_seconds:
                return None
            load = self._load.load()
            if load is None:
                return None
            self._at_once = (
                self._settled.equilibrium is None or elapsed * _PIECES_COUNT > spread_seconds
            )
            self._started_seconds = now_seconds
            self._pieces = self._settle_by_pieces(load, lengths, generated_tokens())
        wanted = next(self._pieces, None)
        while self._at_once and wanted is None:
            wanted = next(self._pieces)
        return wanted

    def settle(self, prediction: Prediction) -> None:
        """Take in what was predicted.

        Args:
            prediction: Of the last `due_shapes`, corrected by what was observed.

        Raises:
            RuntimeError: No shapes were due.
        """
        if self._pieces is None:
            raise RuntimeError("nothing is due; settle() takes the prediction of due_shapes()")
        self._pieces.send(prediction)
        if self._at_once:
            for _ in self._pieces:
                pass

    def _settle_by_pieces(
        self, load: OfferedLoad, lengths: LengthCurve, generated_tokens: NDArray[np.float64]
    ) -> _Pieces:
        """Compute everything anew; each piece takes half as long as a decision, or less."""
        load = load.with_answers_of(lengths.mean_tokens(generated_tokens))
        limits, resting = self._limits, self._resting_power_watts
        yield None
        shapes = self._shapes(load)
        predictions = []
        at_once = len(shapes) if self._at_once else _SHAPES_AT_ONCE
        for first in range(0, len(shapes), at_once):
            yield None
            wanted = shapes[first : first + at_once]
            while (prediction := (yield wanted)) is None:
                pass  # a decision failed before it had one
            predictions.append(prediction)
        yield None
        prediction, cost = self._split(_joined(predictions), load)
        yield None
        fastest = prediction.latency_seconds[:, self._ceiling]
        headroom = growth_limit_ratio(load, limits, fastest) - 1.0
        yield None
        equilibrium = settle(load, limits, prediction, resting, balanced=self._balance)
        yield None
        refund = refund_watts(
            load, limits, prediction, equilibrium, resting, balanced=self._balance
        )
        yield None
        after_prompts = self._prompt_work.after_prompts(cost)
        yield None
        after_decodes = self._prompt_work.after_decodes(cost)
        yield None
        deviations = self._settings.burst_deviations
        interruptions = expect_interruptions(load, limits, prediction, deviations)
        self._settled = _Settled(
            load, equilibrium, interruptions, after_prompts, after_decodes, refund, headroom
        )
        self._due_seconds = self._started_seconds + self._settings.cruise_period_seconds
        self._pieces = None

    def _shapes(self, load: OfferedLoad) -> NDArray[np.float64]:
        """Those of `equilibrium_shapes`, then those of `prompt_size_shapes`."""
        sizes = prompt_size_shapes(
            load.prefill_kv_tokens_per_iteration,
            self._usual_batch(),
            load.context_tokens,
            float(self._profile.batched_tokens_limit),
        )
        return np.vstack([equilibrium_shapes(load, self._limits), sizes])

    def _usual_batch(self) -> float:
        """The batch that the present load settles at, at the cheapest clock that carries it."""
        equilibrium = self._settled.equilibrium
        if equilibrium is None:
            return _UNKNOWN_BATCH
        cheapest = int(np.argmin(equilibrium.power_watts))
        return max(float(equilibrium.batch_requests[cheapest]), 1.0)

    def _split(self, prediction: Prediction, load: OfferedLoad) -> tuple[Prediction, PromptCost]:
        """The prediction of `equilibrium_shapes`, and the cost of prompts by size from the rest."""
        limit = float(self._profile.batched_tokens_limit)
        sizes_count = len(prompt_size_shapes(0.0, 1.0, 1.0, limit))
        latency = prediction.latency_seconds
        iterations = max(load.prefill_iterations_per_second, 1e-9)
        mean = min(max(load.prefill_tokens_per_second / iterations, 1.0), limit)
        clock = latency.shape[1] // 2
        cost = prompt_cost(latency[-sizes_count:, clock], mean, limit)
        kept = Prediction(
            latency[:-sizes_count],
            prediction.latency_upper_seconds[:-sizes_count],
            prediction.power_watts[:-sizes_count],
        )
        return kept, cost

    def successors(self, lengths: LengthCurve, clock_index: int) -> Successors | None:
        """Who will take the place of those that end, at a clock; None while that is not known."""
        batch, context_tokens = self.successors_arguments(clock_index)
        return None if batch < 0.0 else Successors(lengths, batch, context_tokens)

    def newcomers(self, lengths: LengthCurve) -> Newcomers | None:
        """Answers that will begin within the horizon; None while that is not known."""
        tpot, per_second, known = self.newcomers_arguments
        return Newcomers(lengths, tpot, per_second) if known else None

    def work(self, horizon: Horizon) -> PromptWork | None:
        """How many prompt tokens come after what is planned; None while hardly any do."""
        settled = self._settled
        if horizon.prefill_segments_count:
            return settled.work_after_prompts
        return settled.work_after_decodes

    def prompt_delay(self, horizon: Horizon) -> PromptDelay:
        """What prompts to come cost the answers between them."""
        batch = horizon.shapes[:, 3]
        interruptions = self._settled.interruptions
        if interruptions is None:
            return PromptDelay(None, np.zeros((len(batch), len(self._resting_power_watts))))
        return PromptDelay(self.work(horizon), interruptions.prompt_token_seconds(batch))

    def stretch_ratio(self, horizon: Horizon) -> NDArray[np.float64] | None:
        """Prompts to come stretch decode segments; those that are here have their own segments."""
        interruptions = self._settled.interruptions
        if interruptions is None:
            return None
        stretch = interruptions.stretch_ratio(horizon.shapes[:, 3])
        stretch[: horizon.prefill_segments_count] = 1.0
        return stretch


def _arguments(settled: _Settled) -> tuple[Any, ...]:
    known = settled.interruptions
    if known is None:
        return _NONE, _NO_TABLE, _NO_TABLE, _NO_WORK, _NO_WORK
    prompts, decodes = (
        _NO_WORK if work is None else work.arguments
        for work in (settled.work_after_prompts, settled.work_after_decodes)
    )
    return known.batches, known.ratios, known.token_seconds, prompts, decodes


def _joined(predictions: list[Prediction]) -> Prediction:
    return Prediction(
        np.vstack([each.latency_seconds for each in predictions]),
        np.vstack([each.latency_upper_seconds for each in predictions]),
        np.vstack([each.power_watts for each in predictions]),
    )


def _carrying_limits(profile: EngineProfile, settings: ControlSettings) -> CarryingLimits:
    slos, guards = profile.default_slos, settings.guards()
    tpot = slos.tpot_seconds or np.inf
    tbt = slos.tbt_seconds * guards.tbt_ratio if slos.tbt_seconds else np.inf
    ttft = slos.ttft_seconds * guards.ttft_ratio if slos.ttft_seconds else np.inf
    kv_tokens = profile.kv_blocks_count * profile.kv_block_tokens
    return CarryingLimits(
        batch_requests=float(profile.running_requests_limit),
        kv_tokens=kv_tokens * settings.kv_pressure_ratio,
        tpot_seconds=min(tpot, tbt),
        ttft_seconds=ttft,
    )
