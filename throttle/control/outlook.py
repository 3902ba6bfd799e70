"""What the load will bring: estimated as it comes, settled once a second.

The slow half of a decision. Batch, prompts between tokens and the price of time change with the
load, not with the iteration, so they are computed once per period from one prediction that rides on
that of a horizon, and read from here in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    from numpy.typing import NDArray

    from throttle.control.arrivals import OfferedLoad
    from throttle.control.compilation import CompiledSteps
    from throttle.control.lengths import LengthCurve
    from throttle.control.projection import Horizon
    from throttle.control.settings import ControlSettings
    from throttle.control.state import EngineProfile, IterationState


#: Generating requests beside a prompt while no equilibrium is known.
_UNKNOWN_BATCH = 16.0


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
        self._works: tuple[PromptWork, PromptWork] | None = None
        self._interruptions: Interruptions | None = None
        self._equilibrium: Equilibrium | None = None
        self._settled_load: OfferedLoad | None = None
        self._load_headroom_ratio: float | None = None
        self._refund_watts = 0.0
        self._due_seconds = -np.inf

    @property
    def equilibrium(self) -> Equilibrium | None:
        """What each clock settles at; None while the load is not known."""
        return self._equilibrium

    @property
    def interruptions(self) -> Interruptions | None:
        """What prompts to come add to iterations; None while the load is not known."""
        return self._interruptions

    @property
    def refund_watts(self) -> float:
        """What a second less of computing is worth at this load, of one GPU."""
        return self._refund_watts

    @property
    def load_headroom_ratio(self) -> float | None:
        """Share by which the load may grow before the fastest allowed clock carries it no more.

        Below 0 it is too much already; None while the load is not known.
        """
        return self._load_headroom_ratio

    @property
    def load(self) -> OfferedLoad | None:
        """The load that was settled last."""
        return self._settled_load

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
        self, now_seconds: float, lengths: LengthCurve, generated_tokens: NDArray[np.float64]
    ) -> NDArray[np.float64] | None:
        """Shapes whose prediction `settle` wants now, (S, 7); None while nothing is due.

        Args:
            now_seconds: Engine time.
            lengths: How long answers are.
            generated_tokens: Output so far of those that go on, (n,).
        """
        load = self._load.load()
        if load is None or now_seconds < self._due_seconds:
            return None
        self._settled_load = load.with_answers_of(lengths.mean_tokens(generated_tokens))
        sizes = prompt_size_shapes(
            load.prefill_kv_tokens_per_iteration,
            self._usual_batch(),
            load.context_tokens,
            float(self._profile.batched_tokens_limit),
        )
        return np.vstack([equilibrium_shapes(self._settled_load, self._limits), sizes])

    def settle(self, prediction: Prediction, now_seconds: float) -> None:
        """Compute everything anew.

        Args:
            prediction: Of the last `due_shapes`, corrected by what was observed.
            now_seconds: Engine time.

        Raises:
            RuntimeError: No shapes were due.
        """
        load = self._settled_load
        if load is None:
            raise RuntimeError("no load is known; settle() takes the prediction of due_shapes()")
        resting = self._resting_power_watts
        prediction, cost = self._split(prediction, load)
        equilibrium = settle(load, self._limits, prediction, resting, balanced=self._balance)
        self._refund_watts = refund_watts(
            load, self._limits, prediction, equilibrium, resting, balanced=self._balance
        )
        self._works = self._prompt_work.estimate(cost)
        self._equilibrium = equilibrium
        self._interruptions = expect_interruptions(
            load, self._limits, prediction, self._settings.burst_deviations
        )
        fastest = prediction.latency_seconds[:, self._ceiling]
        self._load_headroom_ratio = growth_limit_ratio(load, self._limits, fastest) - 1.0
        self._due_seconds = now_seconds + self._settings.cruise_period_seconds

    def _usual_batch(self) -> float:
        """The batch that the present load settles at, at the cheapest clock that carries it."""
        equilibrium = self._equilibrium
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
        load = self._load.load()
        if load is None or self._equilibrium is None:
            return None
        batch = float(self._equilibrium.batch_requests[clock_index])
        return Successors(lengths, batch, load.context_tokens)

    def newcomers(self, lengths: LengthCurve) -> Newcomers | None:
        """Answers that will begin within the horizon; None while that is not known."""
        load, tpot = self._load.load(), self._profile.default_slos.tpot_seconds
        if load is None or tpot is None:
            return None
        return Newcomers(
            lengths,
            tpot,
            load.prefill_iterations_per_second * load.prefill_requests_per_iteration,
        )

    def work(self, horizon: Horizon) -> PromptWork | None:
        """How many prompt tokens come after what is planned; None while hardly any do."""
        if self._works is None:
            return None
        after_prompts, after_decodes = self._works
        return after_prompts if horizon.prefill_segments_count else after_decodes

    def prompt_delay(self, horizon: Horizon) -> PromptDelay:
        """What prompts to come cost the answers between them."""
        batch = horizon.shapes[:, 3]
        if self._interruptions is None:
            return PromptDelay(None, np.zeros((len(batch), len(self._resting_power_watts))))
        return PromptDelay(self.work(horizon), self._interruptions.prompt_token_seconds(batch))

    def stretch_ratio(self, horizon: Horizon) -> NDArray[np.float64] | None:
        """Prompts to come stretch decode segments; those that are here have their own segments."""
        if self._interruptions is None:
            return None
        stretch = self._interruptions.stretch_ratio(horizon.shapes[:, 3])
        stretch[: horizon.prefill_segments_count] = 1.0
        return stretch


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
