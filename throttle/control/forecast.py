"""From a state to what every clock would do: projection, prediction, slack, lateness.

Nothing is decided here. The forecaster keeps what was learned (lengths of answers, biases of the
predictor, the load) and lays it over the live requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.prediction import SHAPE_COLUMNS, Prediction
from throttle.control.advice import AdmissionAdvice, advise_admissions
from throttle.control.feedback import Observed, PredictionFeedback
from throttle.control.lateness import EndingShares, Lateness, expect_lateness, judged_clocks
from throttle.control.lengths import LengthBeliefs, RequestLengths
from throttle.control.outlook import Outlook
from throttle.control.projection import Horizon, project, project_aggregates, shape_of
from throttle.control.scoreboard import Column, LiveRequests, Scoreboard
from throttle.control.slack import SlackTable, measure_aggregate_slack, measure_slack
from throttle.control.state import EngineProfile, IterationState, Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from predictors.prediction import Predictor
    from throttle.control.compilation import CompiledSteps
    from throttle.control.scoreboard import EndedRequest
    from throttle.control.settings import ControlSettings

#: Iterations for which an aggregates-only horizon holds the present shape.
_AGGREGATE_HORIZON_ITERATIONS = 32.0
#: Completed iterations kept for feedback between two decisions; more are dropped, oldest first.
_FEEDBACK_BACKLOG = 8
#: Least share of the time since the state before that an iteration must fill for the power of that
#: time to be its own.
_BUSY_RATIO = 0.9
_NO_SHAPES = np.empty((0, len(SHAPE_COLUMNS)))


@dataclass(frozen=True, slots=True)
class Forecast:
    """Everything a decision about running work is taken from; arrays are over clocks, (C,).

    Attributes:
        latency_seconds: Expected duration of the next iteration.
        latency_upper_seconds: Its calibrated upper bound.
        power_watts: Expected power of the next iteration, of all GPUs of the engine.
        horizon_joules: Energy of one GPU over the horizon.
        horizon_seconds: Duration of the horizon.
        slack: What every limit leaves.
        lateness: Answers that each clock makes late; None where none has a limit on its mean gap.
        covered: Whether the near future is of a kind that the predictor has learned.
        kv_pressed: Whether the KV cache is, or will be, as good as full.
        admissions: Advice on queued requests, where the engine asked for it.
    """

    latency_seconds: NDArray[np.float64]
    latency_upper_seconds: NDArray[np.float64]
    power_watts: NDArray[np.float64]
    horizon_joules: NDArray[np.float64]
    horizon_seconds: NDArray[np.float64]
    slack: SlackTable
    lateness: Lateness | None
    covered: bool
    kv_pressed: bool
    admissions: tuple[AdmissionAdvice, ...] = ()


class Forecaster:
    """One engine's future at every clock.

    Args:
        profile: Who the engine is.
        predictor: Predicts its iterations.
        settings: What the operator tuned.
        scoreboard: The engine's requests; its owner keeps it true.
        clocks: First and last index of the clocks that may be chosen.
        steps: Compiled code to use; None for the definitions.
    """

    def __init__(
        self,
        profile: EngineProfile,
        predictor: Predictor,
        settings: ControlSettings,
        scoreboard: Scoreboard,
        clocks: tuple[int, int],
        *,
        steps: CompiledSteps | None = None,
    ) -> None:
        self._steps = steps
        self._profile = profile
        self._predictor = predictor
        self._settings = settings
        self._guards = settings.guards()
        self._scoreboard = scoreboard
        self._clocks = clocks
        self._lengths = LengthBeliefs()
        self._outlook = Outlook(profile, settings, predictor.idle_power_watts, clocks[1], steps)
        self._feedback = PredictionFeedback(settings.violation_ratio)
        self._clock_places = {int(mhz): place for place, mhz in enumerate(predictor.clocks_mhz)}
        self._observed = np.empty((_FEEDBACK_BACKLOG, Observed.WATTS + 1))
        self._observed_count = 0
        self._model = None if steps is None else steps.model_of(predictor)
        self._due: NDArray[np.float64] | None = None  # asked of the outlook, not yet predicted
        self._engine = self._engine_arguments()
        self._last_clock_mhz = 0
        self._last_state_seconds = -np.inf

    @property
    def decide_at_once(self) -> Callable[..., NDArray[np.float64]] | None:
        """Decides from `materials`; None where the steps have to be taken one by one."""
        return None if self._steps is None or self._model is None else self._steps.decide

    @property
    def outlook(self) -> Outlook:
        """What the load will bring."""
        return self._outlook

    @property
    def feedback(self) -> PredictionFeedback:
        """What observation has taught about the predictor."""
        return self._feedback

    def observe(
        self, state: IterationState, clock_mhz: int, gpu_power_watts: float | None = None
    ) -> None:
        """Take in one state, in order.

        Args:
            state: What the engine said.
            clock_mhz: Clock read from its GPUs as the state came; 0 when not known.
            gpu_power_watts: Mean power of one GPU since the state before; None when not known.
        """
        self._outlook.add(state)
        # Only an iteration that ran at one clock, and a candidate, teaches the predictor anything:
        # at others a power cap or another agent holds the GPU.
        steady = clock_mhz == self._last_clock_mhz
        self._last_clock_mhz = clock_mhz
        now, seconds = state.engine_time_seconds, state.iteration_duration_seconds
        if state.phase is Phase.COMPLETED and seconds is not None and steady:
            clock = self._clock_places.get(clock_mhz)
            shape = shape_of(state.scheduled)
            if clock is not None and any(shape):
                own = gpu_power_watts is not None and (
                    seconds >= _BUSY_RATIO * (now - self._last_state_seconds)
                )
                self._remember((*shape, seconds, clock, gpu_power_watts if own else math.nan))
        self._last_state_seconds = now

    def _remember(self, observed: tuple[float | None, ...]) -> None:
        if self._observed_count == _FEEDBACK_BACKLOG:
            self._observed[:-1] = self._observed[1:].copy()
            self._observed_count -= 1
        self._observed[self._observed_count] = observed
        self._observed_count += 1

    def learn_length(self, ended: EndedRequest) -> None:
        """Take in one answer's length."""
        self._lengths.add(ended.length_class, ended.generated_tokens, censored=ended.censored)

    def project(self, state: IterationState, live: LiveRequests, clock_index: int) -> Horizon:
        """What comes after `state`, if the clock stays as it is."""
        if not self._scoreboard.knows_requests:
            return project_aggregates(state.scheduled, _AGGREGATE_HORIZON_ITERATIONS)
        successors = self._outlook.successors(self._lengths.everyone, clock_index)
        if self._steps is not None:
            lengths = self._lengths.table(self._scoreboard.length_classes)
            return self._steps.project(live, lengths, self._profile, successors)
        running = self._lengths.planned_tokens(self._request_lengths(live.running))
        waiting = self._lengths.planned_tokens(self._request_lengths(live.waiting))
        return project(live, running, waiting, self._profile, successors)

    def forecast(self, state: IterationState, horizon: Horizon, live: LiveRequests) -> Forecast:
        """What every clock would do with a horizon of `live`, which is not empty."""
        now = state.engine_time_seconds
        prediction = self._predict(horizon, now)
        latency, upper, joules, seconds = self._correct(prediction, horizon)
        lateness = None
        if self._scoreboard.knows_requests:
            slack = self._slack(horizon, latency, upper, now)
            lateness = self._lateness(horizon, latency, upper, now)
        else:
            slack = measure_aggregate_slack(
                horizon, upper, self._profile.default_slos, self._guards
            )
        near = max(horizon.prefill_segments_count, 1)
        power_ratio = self._feedback.power_ratio
        return Forecast(
            latency_seconds=latency[0],
            latency_upper_seconds=upper[0],
            power_watts=prediction.power_watts[0] * (len(self._profile.gpu_uuids) * power_ratio),
            horizon_joules=joules,
            horizon_seconds=seconds,
            slack=slack,
            lateness=lateness,
            covered=bool(self._predictor.covers(horizon.shapes[:near]).all()),
            kv_pressed=self._kv_pressed(state, horizon),
            admissions=(
                advise_admissions(horizon, live, upper[:, self._clocks[1]], now)
                if self._profile.wants_advice
                else ()
            ),
        )

    def _correct(
        self, prediction: Prediction, horizon: Horizon
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Latency and bound by what was observed, (K, C); the horizon's energy and time, (C,)."""
        if self._steps is not None:
            return self._steps.correct(prediction, horizon, self._feedback)
        latency, upper = self._feedback.correct(prediction, horizon.shapes[:, 1] > 0)
        joules = horizon.iterations @ (latency * prediction.power_watts)
        return latency, upper, joules * self._feedback.power_ratio, horizon.iterations @ latency

    def _slack(
        self,
        horizon: Horizon,
        latency: NDArray[np.float64],
        upper: NDArray[np.float64],
        now: float,
    ) -> SlackTable:
        if self._steps is not None:
            return self._steps.measure_slack(
                horizon, latency, upper, now, self._guards, self._outlook.interruptions
            )
        stretch = self._outlook.stretch_ratio(horizon)
        return measure_slack(horizon, latency, upper, now, self._guards, stretch_ratio=stretch)

    def _kv_pressed(self, state: IterationState, horizon: Horizon) -> bool:
        ratio, blocks_count = self._settings.kv_pressure_ratio, self._profile.kv_blocks_count
        return (
            horizon.blocked_requests_count > 0
            or bool(horizon.kv_blocks.max() > blocks_count * ratio)
            or self._kv_said_full(state)
        )

    def _kv_said_full(self, state: IterationState) -> bool:
        """Whether the engine itself says that its KV cache is as good as full."""
        cache = state.kv_cache
        usage = cache.usage_ratio or 0.0
        if cache.used_blocks_count is not None:
            total = cache.total_blocks_count or self._profile.kv_blocks_count
            usage = cache.used_blocks_count / total
        return usage > self._settings.kv_pressure_ratio

    def _request_lengths(self, rows: NDArray[np.float64], generated: float = 0.0) -> RequestLengths:
        """What is known of these requests' answers, each at least so many tokens long."""
        return RequestLengths(
            self._scoreboard.length_classes,
            rows[:, Column.LENGTH_CLASS],
            np.maximum(rows[:, Column.GENERATED], generated),
            rows[:, Column.MAX_OUTPUT],
            rows[:, Column.PREDICTED_OUTPUT],
        )

    def _lateness(
        self,
        horizon: Horizon,
        latency: NDArray[np.float64],
        upper: NDArray[np.float64],
        now: float,
    ) -> Lateness | None:
        if self._steps is not None:
            return self._steps.expect_lateness(
                horizon,
                latency,
                upper,
                now_seconds=now,
                lengths=self._lengths.table(self._scoreboard.length_classes),
                interruptions=self._outlook.interruptions,
                work=self._outlook.work(horizon),
                newcomers=self._outlook.newcomers(self._lengths.everyone),
                clocks=self._clocks,
            )
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
            delay=self._outlook.prompt_delay(horizon),
            newcomers=self._outlook.newcomers(self._lengths.everyone),
            clocks=self._clocks,
        )

    def _predict(self, horizon: Horizon, now: float) -> Prediction:
        """Predict the horizon, and in the same call what feedback and outlook ask for."""
        shapes, observed = horizon.shapes, self._observed[: self._observed_count]
        due = self._due_shapes(now)
        if not len(observed) and due is None:
            return self._predictor.predict(shapes)
        blocks = [shapes, observed[:, : len(SHAPE_COLUMNS)]]
        prediction = self._predictor.predict(np.vstack(blocks if due is None else [*blocks, due]))
        first = len(shapes)
        for row, each in enumerate(observed, start=first):
            self._learn(each, prediction, row)
        if due is not None:
            self._settle(due, _rows(prediction, first + len(observed), None))
        self._observed_count, self._due = 0, None
        return _rows(prediction, 0, first)

    def _due_shapes(self, now: float) -> NDArray[np.float64] | None:
        if self._due is None:
            self._due = self._outlook.due_shapes(
                now, self._lengths.everyone, self._scoreboard.generated_tokens
            )
        return self._due

    def _settle(self, due: NDArray[np.float64], prediction: Prediction) -> None:
        latency, upper = self._feedback.correct(prediction, due[:, 1] > 0)
        power = prediction.power_watts * self._feedback.power_ratio
        self._outlook.settle(Prediction(latency, upper, power))

    def _learn(self, observed: NDArray[np.float64], prediction: Prediction, row: int) -> None:
        clock = int(observed[Observed.CLOCK])
        seconds, watts = float(observed[Observed.SECONDS]), float(observed[Observed.WATTS])
        self._feedback.learn(
            seconds,
            float(prediction.latency_seconds[row, clock]),
            float(prediction.latency_upper_seconds[row, clock]),
            mixed=bool(observed[1] > 0),
        )
        if not math.isnan(watts):
            predicted_watts = float(prediction.power_watts[row, clock])
            self._feedback.learn_power(watts, predicted_watts, seconds)

    def _engine_arguments(self) -> tuple[Any, ...]:
        """What never changes of what compiled code takes; see `compiled.decision.decide`."""
        profile, guards = self._profile, self._guards
        return (
            float(profile.batched_tokens_limit),
            profile.running_requests_limit,
            profile.kv_blocks_count,
            profile.kv_block_tokens,
            len(profile.gpu_uuids),
            float(self._settings.kv_pressure_ratio),
            float(guards.ttft_ratio),
            float(guards.tbt_ratio),
            float(guards.e2e_ratio),
            float(guards.reserve_seconds),
            judged_clocks(self._clocks),
        )

    def materials(self, state: IterationState, clock_index: int) -> tuple[Any, ...] | None:
        """What a decision in one compiled call takes; see `compiled.decision.decide`.

        None where what is due has to be settled before anything else is computed.
        """
        now = state.engine_time_seconds
        successors = self._outlook.successors_arguments(clock_index)
        due = self._due_shapes(now)
        if due is not None and self._outlook.at_once:
            return None
        feedback = self._feedback
        return (
            self._scoreboard.places(),
            self._lengths.table(self._scoreboard.length_classes).arguments,
            self._engine,
            self._model,
            (feedback.learned, feedback.violation_ratio, self._observed[: self._observed_count]),
            _NO_SHAPES if due is None else due,
            self._outlook.arguments,
            self._outlook.newcomers_arguments,
            successors,
            now,
            self._kv_said_full(state),
        )

    def take_in(self, predicted: NDArray[np.float64]) -> None:
        """What a decision made of its materials has predicted beside, (3, S, C)."""
        due, self._observed_count, self._due = self._due, 0, None
        if due is not None:
            self._settle(due, Prediction(predicted[0], predicted[1], predicted[2]))


def _rows(prediction: Prediction, start: int, stop: int | None) -> Prediction:
    return Prediction(
        prediction.latency_seconds[start:stop],
        prediction.latency_upper_seconds[start:stop],
        prediction.power_watts[start:stop],
    )
