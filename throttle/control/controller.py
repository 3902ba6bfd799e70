"""Drives the way from a state to a decision for one engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.prediction import Prediction
from throttle.control.arrivals import LoadEstimator
from throttle.control.cruise import (
    CarryingLimits,
    Equilibrium,
    Interruptions,
    equilibrium_shapes,
    expect_interruptions,
    refund_watts,
    settle,
)
from throttle.control.feedback import PredictionFeedback
from throttle.control.lateness import (
    EndingShares,
    LateBudget,
    Lateness,
    Newcomers,
    PromptDelay,
    expect_lateness,
)
from throttle.control.lengths import LengthBeliefs, RequestLengths
from throttle.control.projection import (
    Horizon,
    Successors,
    project,
    project_aggregates,
    shape_of,
)
from throttle.control.prompt_work import PromptWork, PromptWorkEstimator
from throttle.control.scoreboard import Column, LiveRequests, Scoreboard
from throttle.control.selection import Binding, Decision, Reason, Selector
from throttle.control.slack import (
    SlackTable,
    Slo,
    measure_aggregate_slack,
    measure_slack,
)
from throttle.control.state import EngineProfile, IterationState, Phase

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from predictors.prediction import Predictor
    from throttle.control.settings import ControlSettings

#: Iterations for which an aggregates-only horizon holds the present shape.
_AGGREGATE_HORIZON_ITERATIONS = 32.0
#: Completed iterations kept for feedback between two decisions; more are dropped, oldest first.
_FEEDBACK_BACKLOG = 8
#: Least share of the time since the state before that an iteration must fill for the power of that
#: time to be its own.
_BUSY_RATIO = 0.9


@dataclass(frozen=True, slots=True)
class ClockRow:
    """One clock of the what-if table; power is that of all GPUs of the engine.

    `late_ratio` is the share of answers whose mean gap would miss its limit because the clock is
    not the fastest; None while that is not known. The slack of TPOT is that of one answer and tells
    a reader only: feasible is what keeps the other slacks and the budget of late answers.
    """

    clock_mhz: int
    iteration_seconds: float
    iteration_upper_seconds: float
    power_watts: float
    long_run_power_watts: float | None
    late_ratio: float | None
    feasible: bool
    slacks: tuple[Binding, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A decision and the table it was taken from."""

    decision: Decision
    rows: tuple[ClockRow, ...]


@dataclass(frozen=True, slots=True)
class _Observation:
    shape: tuple[float, ...]
    seconds: float
    clock_mhz: int
    power_watts: float | None


@dataclass(frozen=True, slots=True)
class _Judgement:
    """Everything a decision about running work is taken from; arrays are over clocks."""

    latency_seconds: NDArray[np.float64]
    latency_upper_seconds: NDArray[np.float64]
    power_watts: NDArray[np.float64]
    horizon_joules: NDArray[np.float64]
    horizon_seconds: NDArray[np.float64]
    slack: SlackTable
    lateness: Lateness | None
    covered: bool
    kv_pressed: bool


class Controller:
    """One engine's brain: takes states in, gives decisions out.

    Args:
        profile: Who the engine is.
        predictor: Predicts its iterations.
        settings: What the operator tuned.
    """

    def __init__(
        self, profile: EngineProfile, predictor: Predictor, settings: ControlSettings
    ) -> None:
        self._profile = profile
        self._predictor = predictor
        self._settings = settings
        self._guards = settings.guards()
        clocks = predictor.clocks_mhz
        ceiling = clocks <= settings.ceiling_clock_ratio * clocks[-1]
        self._ceiling = int(np.flatnonzero(ceiling)[-1]) if ceiling.any() else len(clocks) - 1
        self._allowed = ceiling & (clocks >= settings.floor_clock_ratio * clocks[-1])
        self._allowed[self._ceiling] = True
        self._floor = int(np.flatnonzero(self._allowed)[0])
        self._clocks_mhz = clocks
        self._selector = Selector(clocks, settings.hysteresis())
        self._scoreboard = Scoreboard(profile.default_slos)
        self._lengths = LengthBeliefs()
        self._load = LoadEstimator(
            settings.load_time_constant_seconds, settings.load_settling_seconds
        )
        self._prompt_work = PromptWorkEstimator()
        self._late_budget = LateBudget(settings.late_budget())
        self._feedback = PredictionFeedback(settings.violation_ratio)
        self._observations: list[_Observation] = []
        self._last_clock_mhz = 0
        self._fastest_seconds = 0.0  # what all iterations so far would have taken at the fastest
        self._fastest_ratio = 1.0  # duration at the fastest clock over that at the chosen one
        self._last_state_seconds = -np.inf
        self._cruise: Equilibrium | None = None
        self._interruptions: Interruptions | None = None
        self._refund_watts = 0.0
        self._work: PromptWork | None = None
        self._cruise_due_seconds = -np.inf
        self._idle_since_seconds: float | None = None

    @property
    def latency_bias_ratio(self) -> float:
        """Observed over predicted duration of decode iterations, smoothed."""
        return self._feedback.bias_ratio(mixed=False)

    @property
    def coverage_ratio(self) -> float | None:
        """Share of recent iterations within their upper bound; None before the first."""
        return self._feedback.coverage_ratio

    @property
    def power_bias_ratio(self) -> float:
        """Observed over predicted power, smoothed."""
        return self._feedback.power_ratio

    def observe(
        self,
        state: IterationState,
        observed_clock_mhz: int,
        observed_power_watts: float | None = None,
    ) -> None:
        """Take in one state, in order.

        Args:
            state: What the engine said.
            observed_clock_mhz: Clock read from its GPUs as the state came; 0 when not known.
            observed_power_watts: Mean power of one GPU since the state before; None when not known.
        """
        seconds = state.iteration_duration_seconds
        if seconds is not None:
            self._fastest_seconds += seconds * self._fastest_ratio
        for ended in self._scoreboard.apply(state, self._fastest_seconds):
            self._lengths.add(ended.length_class, ended.generated_tokens, censored=ended.censored)
            if ended.mean_gap_ratio is not None and ended.fastest_gap_ratio is not None:
                late = ended.mean_gap_ratio > 1.0 >= ended.fastest_gap_ratio
                self._late_budget.learn(late=late)
        self._load.add(state)
        self._prompt_work.add(state)
        # Only an iteration that ran at one clock teaches the predictor anything.
        steady = observed_clock_mhz == self._last_clock_mhz and observed_clock_mhz > 0
        self._last_clock_mhz = observed_clock_mhz
        if state.phase is Phase.COMPLETED and seconds is not None and steady:
            shape = shape_of(state.scheduled)
            if any(shape):
                elapsed = state.engine_time_seconds - self._last_state_seconds
                own = observed_power_watts if seconds >= _BUSY_RATIO * elapsed else None
                self._observations.append(_Observation(shape, seconds, observed_clock_mhz, own))
                del self._observations[:-_FEEDBACK_BACKLOG]
        self._last_state_seconds = state.engine_time_seconds

    def decide(self, state: IterationState) -> Decision:
        """Choose the clock for what comes after `state`, which must have been observed."""
        live = self._scoreboard.live()
        now = state.engine_time_seconds
        if self._idle(state, live):
            return self._decide_idle(now)
        self._idle_since_seconds = None
        horizon = self._project(state, live)
        if horizon.empty:
            # Work waits and none of it can be scheduled: it is freed soonest at full speed.
            return self._guarded(Reason.KV_PRESSURE, now)
        return self._decide_busy(state, self._judge(state, horizon, now), now)

    def evaluate(self, state: IterationState) -> Evaluation:
        """Judge every clock for `state`, which must have been observed; changes nothing outside."""
        live = self._scoreboard.live()
        horizon = self._project(state, live)
        now = state.engine_time_seconds
        if self._idle(state, live) or horizon.empty:
            return Evaluation(self.decide(state), ())
        judgement = self._judge(state, horizon, now)
        decision = self._decide_busy(state, judgement, now)
        kept = self._keeps_every_limit(judgement)
        rows = tuple(
            self._row(judgement, index, feasible=bool(kept[index]))
            for index in range(len(self._clocks_mhz))
        )
        return Evaluation(decision, rows)

    def _idle(self, state: IterationState, live: LiveRequests) -> bool:
        if len(live.running) or len(live.waiting):
            return False
        queued = state.queued
        waiting = queued.num_prefill_requests + queued.num_decode_requests
        busy = state.phase is not Phase.HEARTBEAT and not state.scheduled.empty
        if self._scoreboard.knows_requests:
            # The iteration told of may have ended the last request.
            busy = busy and state.phase is Phase.PLANNED
        return waiting == 0 and not busy

    def _decide_idle(self, now: float) -> Decision:
        if self._idle_since_seconds is None:
            self._idle_since_seconds = now
        waited = now - self._idle_since_seconds
        if not self._settings.parking or waited < self._settings.parking_delay_seconds:
            index, reason = self._selector.current, Reason.HELD
        else:
            index, reason = self._selector.jump(0, now), Reason.PARKED
        gpus = len(self._profile.gpu_uuids)
        idle = self._predictor.idle_power_watts
        return Decision(
            target_clock_mhz=int(self._clocks_mhz[index]),
            reason=reason,
            predicted_power_watts=float(idle[index]) * gpus,
            predicted_default_power_watts=float(idle[-1]) * gpus,
            cruise_clock_mhz=self._cruise_clock_mhz(),
        )

    def _project(self, state: IterationState, live: LiveRequests) -> Horizon:
        if not self._scoreboard.knows_requests:
            return project_aggregates(state.scheduled, _AGGREGATE_HORIZON_ITERATIONS)
        running = self._lengths.planned_tokens(self._request_lengths(live.running))
        waiting = self._lengths.planned_tokens(self._request_lengths(live.waiting))
        return project(live, running, waiting, self._profile, self._successors())

    def _successors(self) -> Successors | None:
        load = self._load.load()
        if load is None or self._cruise is None:
            return None
        batch = float(self._cruise.batch_requests[self._selector.current])
        return Successors(self._lengths.everyone, batch, load.context_tokens)

    def _request_lengths(self, rows: NDArray[np.float64], generated: float = 0.0) -> RequestLengths:
        """What is known of these requests' answers, each at least so many tokens long."""
        return RequestLengths(
            self._scoreboard.length_classes,
            rows[:, Column.LENGTH_CLASS],
            np.maximum(rows[:, Column.GENERATED], generated),
            rows[:, Column.MAX_OUTPUT],
            rows[:, Column.PREDICTED_OUTPUT],
        )

    def _judge(self, state: IterationState, horizon: Horizon, now: float) -> _Judgement:
        prediction = self._predict(horizon.shapes, now)
        mixed = horizon.shapes[:, 1] > 0
        latency, upper = self._feedback.correct(prediction, mixed)
        lateness = None
        if self._scoreboard.knows_requests:
            stretch = self._stretch_ratio(horizon)
            slack = measure_slack(horizon, latency, upper, now, self._guards, stretch_ratio=stretch)
            lateness = self._lateness(horizon, latency, upper, now)
        else:
            slack = measure_aggregate_slack(
                horizon, upper, self._profile.default_slos, self._guards
            )
        near = max(horizon.prefill_segments_count, 1)
        capacity = self._profile.kv_blocks_count * self._settings.kv_pressure_ratio
        return _Judgement(
            latency_seconds=latency[0],
            latency_upper_seconds=upper[0],
            power_watts=prediction.power_watts[0] * self._power_factor(),
            horizon_joules=horizon.iterations
            @ (latency * prediction.power_watts)
            * self._feedback.power_ratio,
            horizon_seconds=horizon.iterations @ latency,
            slack=slack,
            lateness=lateness,
            covered=bool(self._predictor.covers(horizon.shapes[:near]).all()),
            kv_pressed=horizon.blocked_requests_count > 0
            or bool(horizon.kv_blocks.max() > capacity)
            or self._kv_usage_ratio(state) > self._settings.kv_pressure_ratio,
        )

    def _lateness(
        self,
        horizon: Horizon,
        latency: NDArray[np.float64],
        upper: NDArray[np.float64],
        now: float,
    ) -> Lateness | None:
        ends = np.cumsum(horizon.iterations)
        decodes = self._request_lengths(horizon.decodes)
        prompts = self._request_lengths(horizon.prompts, generated=1.0)
        after_first = ends - horizon.iterations_at(horizon.first_tokens)[:, None]
        ending = EndingShares(
            self._lengths.ending_shares(
                decodes, np.broadcast_to(ends, (len(horizon.decodes), len(ends)))
            ),
            self._lengths.ending_shares(prompts, np.maximum(after_first, 0.0)),
        )
        return expect_lateness(
            horizon,
            latency,
            upper,
            now_seconds=now,
            ending=ending,
            delay=self._prompt_delay(horizon),
            newcomers=self._newcomers(),
            clocks=(self._floor, self._ceiling),
        )

    def _prompt_delay(self, horizon: Horizon) -> PromptDelay:
        batch = horizon.shapes[:, 3]
        if self._interruptions is None:
            return PromptDelay(None, np.zeros((len(batch), len(self._clocks_mhz))))
        return PromptDelay(self._work, self._interruptions.prompt_token_seconds(batch))

    def _newcomers(self) -> Newcomers | None:
        load, tpot = self._load.load(), self._profile.default_slos.tpot_seconds
        if load is None or tpot is None:
            return None
        return Newcomers(
            self._lengths.everyone,
            tpot,
            load.prefill_iterations_per_second * load.prefill_requests_per_iteration,
            load.prefill_tokens_per_second,
        )

    def _kv_usage_ratio(self, state: IterationState) -> float:
        cache = state.kv_cache
        if cache.used_blocks_count is not None:
            return cache.used_blocks_count / (
                cache.total_blocks_count or self._profile.kv_blocks_count
            )
        return cache.usage_ratio or 0.0

    def _stretch_ratio(self, horizon: Horizon) -> NDArray[np.float64] | None:
        """Prompts to come stretch decode segments; those that are here have their own segments."""
        if self._interruptions is None:
            return None
        stretch = self._interruptions.stretch_ratio(horizon.shapes[:, 3])
        stretch[: horizon.prefill_segments_count] = 1.0
        return stretch

    def _predict(self, shapes: NDArray[np.float64], now: float) -> Prediction:
        """Predict the horizon, and in the same call what feedback and cruise ask for."""
        observed = self._observations
        load = self._load.load() if now >= self._cruise_due_seconds else None
        blocks = [shapes]
        if observed:
            blocks.append(np.array([each.shape for each in observed]))
        if load is not None:
            limits = self._carrying_limits()
            blocks.append(equilibrium_shapes(load, limits))
        if len(blocks) == 1:
            return self._predictor.predict(shapes)
        prediction = self._predictor.predict(np.vstack(blocks))
        first = len(shapes)
        for row, each in enumerate(observed, start=first):
            self._learn(each, prediction, row)
        self._observations = []
        if load is not None:
            settled = _slice(prediction, first + len(observed), None)
            mixed = blocks[-1][:, 1] > 0
            latency, upper = self._feedback.correct(settled, mixed)
            power = settled.power_watts * self._feedback.power_ratio
            corrected = Prediction(latency, upper, power)
            equilibrium = settle(
                load,
                limits,
                corrected,
                self._resting_power_watts(),
            )
            self._refund_watts = refund_watts(
                load, limits, corrected, equilibrium, self._resting_power_watts()
            )
            self._work = self._prompt_work.estimate()
            self._cruise = equilibrium
            self._interruptions = expect_interruptions(
                load, limits, corrected, self._settings.burst_deviations
            )
            self._cruise_due_seconds = now + self._settings.cruise_period_seconds
        return _slice(prediction, 0, first)

    def _learn(self, observation: _Observation, prediction: Prediction, row: int) -> None:
        index = int(np.searchsorted(self._clocks_mhz, observation.clock_mhz))
        if index == len(self._clocks_mhz) or self._clocks_mhz[index] != observation.clock_mhz:
            return  # not a candidate clock: a power cap or another agent holds it
        self._feedback.learn(
            observation.seconds,
            float(prediction.latency_seconds[row, index]),
            float(prediction.latency_upper_seconds[row, index]),
            mixed=observation.shape[1] > 0,
        )
        if observation.power_watts is not None:
            predicted_watts = float(prediction.power_watts[row, index])
            self._feedback.learn_power(
                observation.power_watts, predicted_watts, observation.seconds
            )

    def _power_factor(self) -> float:
        """From predicted power of one GPU to corrected power of all."""
        return len(self._profile.gpu_uuids) * self._feedback.power_ratio

    def _carrying_limits(self) -> CarryingLimits:
        slos = self._profile.default_slos
        guards = self._guards
        tpot = slos.tpot_seconds or np.inf
        tbt = slos.tbt_seconds * guards.tbt_ratio if slos.tbt_seconds else np.inf
        ttft = slos.ttft_seconds * guards.ttft_ratio if slos.ttft_seconds else np.inf
        kv_tokens = self._profile.kv_blocks_count * self._profile.kv_block_tokens
        return CarryingLimits(
            batch_requests=float(self._profile.running_requests_limit),
            kv_tokens=kv_tokens * self._settings.kv_pressure_ratio,
            tpot_seconds=min(tpot, tbt),
            ttft_seconds=ttft,
        )

    def _resting_power_watts(self) -> NDArray[np.float64]:
        idle = self._predictor.idle_power_watts
        return np.full_like(idle, idle[0]) if self._settings.parking else idle

    def _decide_busy(self, state: IterationState, judgement: _Judgement, now: float) -> Decision:
        if judgement.kv_pressed:
            index, reason = self._selector.jump(self._ceiling, now), Reason.KV_PRESSURE
        elif not judgement.covered:
            index, reason = self._selector.jump(self._ceiling, now), Reason.OUT_OF_ENVELOPE
        elif self._blind(state):
            index, reason = self._selector.jump(self._ceiling, now), Reason.POOR_INFORMATION
        else:
            feasible = self._keeps_every_limit(judgement) & self._allowed
            index, reason = self._selector.choose(feasible, self._cost(judgement), now)
            # Where none is feasible the fastest is chosen; the operator's ceiling holds there too.
            index = self._selector.jump(min(index, self._ceiling), now)
        latency = judgement.latency_seconds
        self._fastest_ratio = float(latency[-1] / latency[index])
        return Decision(
            target_clock_mhz=int(self._clocks_mhz[index]),
            reason=reason,
            binding=self._binding(judgement, index),
            predicted_iteration_seconds=float(judgement.latency_seconds[index]),
            predicted_iteration_upper_seconds=float(judgement.latency_upper_seconds[index]),
            predicted_power_watts=float(judgement.power_watts[index]),
            predicted_default_iteration_seconds=float(judgement.latency_seconds[-1]),
            predicted_default_power_watts=float(judgement.power_watts[-1]),
            cruise_clock_mhz=self._cruise_clock_mhz(),
            lost_requests_count=judgement.slack.lost_requests_count,
        )

    def _keeps_every_limit(self, judgement: _Judgement) -> NDArray[np.bool_]:
        """Clocks that keep every slack and the budget of late answers, (C,)."""
        kept = judgement.slack.least() >= 0.0
        if judgement.lateness is None:
            return kept
        excess, budget = judgement.lateness.excess_ratio, self._late_budget.ratio
        enough = excess <= budget
        current = self._selector.current
        if excess[current] <= budget * self._settings.late_band_ratio:
            enough[current:] = True  # not worth a change
        return kept & enough

    def _blind(self, state: IterationState) -> bool:
        """Whether prompts wait under a TTFT limit and nothing tells for how long."""
        return (
            not self._scoreboard.knows_requests
            and self._profile.default_slos.ttft_seconds is not None
            and state.queued.num_prefill_requests > 0
        )

    def _guarded(self, reason: Reason, now: float) -> Decision:
        index = self._selector.jump(self._ceiling, now)
        return Decision(int(self._clocks_mhz[index]), reason)

    def _binding(self, judgement: _Judgement, index: int) -> Binding | None:
        """What forbids the next lower clock; where nothing does, what has the least slack."""
        slack, lateness = judgement.slack, judgement.lateness
        lower = max(index - 1, 0)
        least = None
        if len(slack.slos):
            row = int(np.argmin(slack.slack_seconds[:, index]))
            least = Binding(
                Slo(int(slack.slos[row])),
                int(slack.request_numbers[row]),
                float(slack.slack_seconds[row, index]),
            )
        if lateness is None or (least is not None and slack.slack_seconds[:, lower].min() < 0.0):
            return least
        if least is None or lateness.excess_ratio[lower] > self._late_budget.ratio:
            left = float(lateness.request_slack_seconds[index])
            return Binding(Slo.TPOT, lateness.request_number, left)
        return least

    def _long_run_power_watts(self) -> NDArray[np.float64] | None:
        if self._cruise is None:
            return None
        return np.where(self._allowed, self._cruise.power_watts, np.inf)

    def _cost(self, judgement: _Judgement) -> NDArray[np.float64] | None:
        """What the least is chosen of, positive, (C,); None while the load is not known.

        By default the power of computing the horizon, per second of the present clock, with time
        refunded at the rate that it is worth at this load. Where the batch is the one that the load
        settles at, the least of it is the cruise clock; on the way there, and when work runs out,
        it is not.
        """
        power = self._long_run_power_watts()
        if power is None:
            return None
        objective = self._settings.objective
        if objective == "lowest-clock":
            return self._clocks_mhz.astype(np.float64)
        if objective == "energy":
            return judgement.horizon_joules
        refund = self._refund_watts
        if objective == "energy-above-idle":
            refund = float(self._resting_power_watts().min())
        seconds = judgement.horizon_seconds
        joules = judgement.horizon_joules - refund * seconds
        cost = refund + joules / seconds[self._selector.current]
        return cost if objective != "long-run" else np.where(np.isfinite(power), cost, np.inf)

    def _cruise_clock_mhz(self) -> int:
        power = self._long_run_power_watts()
        if power is None:
            return 0
        best = int(np.argmin(power))
        return int(self._clocks_mhz[best]) if np.isfinite(power[best]) else 0

    def _row(self, judgement: _Judgement, index: int, *, feasible: bool) -> ClockRow:
        slack = judgement.slack
        slacks = []
        for slo in Slo:
            rows = np.flatnonzero(slack.slos == slo)
            if len(rows):
                row = rows[np.argmin(slack.slack_seconds[rows, index])]
                number = int(slack.request_numbers[row])
                slacks.append(Binding(slo, number, float(slack.slack_seconds[row, index])))
        late_ratio = None
        if judgement.lateness is not None:
            lateness = judgement.lateness
            late_ratio = float(lateness.excess_ratio[index])
            left = float(lateness.request_slack_seconds[index])
            if lateness.request_number:
                slacks.append(Binding(Slo.TPOT, lateness.request_number, left))
        long_run = None
        if self._cruise is not None and np.isfinite(self._cruise.power_watts[index]):
            long_run = float(self._cruise.power_watts[index]) * len(self._profile.gpu_uuids)
        return ClockRow(
            clock_mhz=int(self._clocks_mhz[index]),
            iteration_seconds=float(judgement.latency_seconds[index]),
            iteration_upper_seconds=float(judgement.latency_upper_seconds[index]),
            power_watts=float(judgement.power_watts[index]),
            long_run_power_watts=long_run,
            late_ratio=late_ratio,
            feasible=feasible,
            slacks=tuple(slacks),
        )


def _slice(prediction: Prediction, start: int, stop: int | None) -> Prediction:
    return Prediction(
        prediction.latency_seconds[start:stop],
        prediction.latency_upper_seconds[start:stop],
        prediction.power_watts[start:stop],
    )
