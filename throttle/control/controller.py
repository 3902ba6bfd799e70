"""Drives the way from a state to a decision for one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from throttle.control.advice import Advice, ParallelSize, ScalingAdvisor
from throttle.control.compilation import compiled_steps
from throttle.control.evaluation import Evaluation, judge_clocks
from throttle.control.forecast import Forecast, Forecaster
from throttle.control.late_price import LatePrice
from throttle.control.long_run import LongRun
from throttle.control.outcome import Outcome
from throttle.control.scoreboard import Scoreboard
from throttle.control.selection import (
    OBJECTIVES,
    Binding,
    Decision,
    Reason,
    Selector,
    binding_limit,
    clock_costs,
)
from throttle.control.slack import Slo
from throttle.control.state import EngineProfile, IterationState, Phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from predictors.prediction import Predictor
    from throttle.control.settings import ControlSettings


#: By value: an enumeration that is called takes longer than a dictionary.
_REASONS = {int(reason): reason for reason in Reason}
_SLOS = {int(slo): slo for slo in Slo}


class Controller:
    """One engine's brain: takes states in, gives decisions out.

    Args:
        profile: Who the engine is.
        predictor: Predicts its iterations.
        settings: What the operator tuned.
        compiled: Use compiled code where numba is there; the decisions are the same.
        at_once: Decide in one compiled call where that can be; the decisions are the same.
        sizes: Numbers of GPUs to advise on, for engines that want advice.
    """

    def __init__(
        self,
        profile: EngineProfile,
        predictor: Predictor,
        settings: ControlSettings,
        *,
        compiled: bool = True,
        at_once: bool = True,
        sizes: Sequence[ParallelSize] = (),
    ) -> None:
        steps = compiled_steps() if compiled else None
        self._profile = profile
        self._settings = settings
        clocks = predictor.clocks_mhz
        ceiling = clocks <= settings.ceiling_clock_ratio * clocks[-1]
        self._ceiling = int(np.flatnonzero(ceiling)[-1]) if ceiling.any() else len(clocks) - 1
        self._allowed = ceiling & (clocks >= settings.floor_clock_ratio * clocks[-1])
        self._allowed[self._ceiling] = True
        self._clocks_mhz = clocks
        self._clock_numbers: list[int] = clocks.tolist()
        self._idle_power_watts = predictor.idle_power_watts
        self._selector = Selector(clocks, settings.hysteresis())
        self._scoreboard = Scoreboard(profile.default_slos, steps)
        floor = int(np.flatnonzero(self._allowed)[0])
        self._forecaster = Forecaster(
            profile, predictor, settings, self._scoreboard, (floor, self._ceiling), steps=steps
        )
        self._late_price = LatePrice(settings.late_budget())
        self._objective = OBJECTIVES.index(settings.objective)
        can = at_once and not profile.wants_advice  # advice is taken from between the steps
        self._at_once = self._forecaster.decide_at_once if can else None
        self._outcome = np.zeros(len(Outcome))
        self._scaling = ScalingAdvisor(sizes, self._forecaster.outlook.limits)
        self._fastest_seconds = 0.0  # what all iterations so far would have taken at the fastest
        self._fastest_ratio = 1.0  # duration at the fastest clock over that at the chosen one
        self._idle_since_seconds: float | None = None
        self._known_long_run: LongRun | None = None
        self._working_index = self._ceiling  # clock of the last decision about work

    @property
    def latency_bias_ratio(self) -> float:
        """Observed over predicted duration of decode iterations, smoothed."""
        return self._forecaster.feedback.bias_ratio(mixed=False)

    @property
    def coverage_ratio(self) -> float | None:
        """Share of recent iterations within their upper bound; None before the first."""
        return self._forecaster.feedback.coverage_ratio

    @property
    def power_bias_ratio(self) -> float:
        """Observed over predicted power, smoothed."""
        return self._forecaster.feedback.power_ratio

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
            self._forecaster.learn_length(ended)
            if ended.mean_gap_ratio is not None and ended.fastest_gap_ratio is not None:
                late = ended.mean_gap_ratio > 1.0 >= ended.fastest_gap_ratio
                self._late_price.learn(late=late)
        self._forecaster.observe(state, observed_clock_mhz, observed_power_watts)

    def decide(self, state: IterationState) -> Decision:
        """Choose the clock for what comes after `state`, which must have been observed."""
        now = state.engine_time_seconds
        if self._idle(state):
            return self._decide_idle(now)
        self._idle_since_seconds = None
        if self._at_once is not None and self._scoreboard.running_count:
            decision = self._decide_at_once(state, now)
            if decision is not None:
                return decision
        live = self._scoreboard.live()
        horizon = self._forecaster.project(state, live, self._selector.current)
        if horizon.empty:
            # Work waits and none of it can be scheduled: it is freed soonest at full speed.
            return self._guarded(Reason.KV_PRESSURE, now)
        return self._decide_busy(state, self._forecaster.forecast(state, horizon, live), now)

    def evaluate(self, state: IterationState) -> Evaluation:
        """Judge every clock for `state`, which must have been observed; changes nothing outside."""
        live = self._scoreboard.live()
        horizon = self._forecaster.project(state, live, self._selector.current)
        now = state.engine_time_seconds
        if self._idle(state) or horizon.empty:
            return Evaluation(self.decide(state), ())
        forecast = self._forecaster.forecast(state, horizon, live)
        decision = self._decide_busy(state, forecast, now)
        rows = judge_clocks(
            forecast,
            self._clocks_mhz,
            self._keeps_every_limit(forecast),
            self._forecaster.outlook.equilibrium,
            len(self._profile.gpu_uuids),
        )
        return Evaluation(decision, rows)

    def judge(self, state: IterationState) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Which clocks keep every limit and what each costs, (C,), for a state that was decided on.

        Both are what `decide` chooses by, before any hysteresis; nothing is chosen or changed.

        Raises:
            RuntimeError: The engine is idle, or its load not known yet.
        """
        live = self._scoreboard.live()
        horizon = self._forecaster.project(state, live, self._selector.current)
        if horizon.empty:
            raise RuntimeError("nothing is computed; judge() follows decide() of a busy engine")
        forecast = self._forecaster.forecast(state, horizon, live)
        power = self._power(forecast)
        if power is None:
            raise RuntimeError("the load is not known yet; decide() on more states first")
        return self._keeps_every_limit(forecast) & self._allowed, power * self._weight(forecast)

    def _idle(self, state: IterationState) -> bool:
        if self._scoreboard.running_count or self._scoreboard.waiting_count:
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
        idle = self._idle_power_watts
        average, default = self._average_power_watts()
        return Decision(
            target_clock_mhz=int(self._clocks_mhz[index]),
            reason=reason,
            predicted_power_watts=float(idle[index]) * gpus,
            predicted_default_power_watts=float(idle[-1]) * gpus,
            cruise_clock_mhz=self._cruise_clock_mhz(),
            long_run_power_watts=average,
            default_long_run_power_watts=default,
        )

    def _decide_at_once(self, state: IterationState, now: float) -> Decision | None:
        """The decision of the steps below, in one compiled call; None where they are needed."""
        materials = self._forecaster.materials(state, self._selector.current)
        if materials is None or self._at_once is None:
            return None
        long_run, late_price = self._long_run(), self._late_price
        predicted = self._at_once(
            *materials,
            (
                self._objective,
                self._allowed,
                self._allowed if long_run is None else long_run.carried,
                self._refund_watts(),
                long_run is not None,
                self._ceiling,
                self._settings.hurry_lost,
            ),
            self._selector.standing(now),
            (self._settings.late_limit_ratio, late_price.answers, late_price.target_ratio),
            self._outcome,
        )
        (
            decided,
            index,
            reason,
            binding,
            binding_request,
            binding_seconds,
            seconds,
            upper_seconds,
            watts,
            fastest_seconds,
            fastest_watts,
            lost_count,
            late_known,
            late_ratio,
        ) = self._outcome.tolist()
        if not decided:
            return None
        self._forecaster.take_in(predicted)
        self._selector.jump(int(index), now)
        # Where no clock is feasible the fastest is chosen; the operator's ceiling holds there too.
        place = self._selector.jump(min(int(index), self._ceiling), now)
        if late_known:
            late_price.expect(late_ratio, now)
        self._fastest_ratio = fastest_seconds / seconds
        self._working_index = place
        average, default = self._average_power_watts()
        return Decision(
            self._clock_numbers[place],
            _REASONS[int(reason)],
            Binding(_SLOS[int(binding)], int(binding_request), binding_seconds)
            if binding
            else None,
            seconds,
            upper_seconds,
            watts,
            fastest_seconds,
            fastest_watts,
            0 if long_run is None else long_run.cruise_clock_mhz,
            int(lost_count),
            average,
            default,
        )

    def _decide_busy(self, state: IterationState, forecast: Forecast, now: float) -> Decision:
        if forecast.kv_pressed:
            index, reason = self._selector.jump(self._ceiling, now), Reason.KV_PRESSURE
        elif not forecast.covered:
            index, reason = self._selector.jump(self._ceiling, now), Reason.OUT_OF_ENVELOPE
        elif self._blind(state):
            index, reason = self._selector.jump(self._ceiling, now), Reason.POOR_INFORMATION
        elif self._settings.hurry_lost and forecast.slack.lost_requests_count:
            index, reason = self._selector.jump(self._ceiling, now), Reason.INFEASIBLE
        else:
            feasible = self._keeps_every_limit(forecast) & self._allowed
            index, reason = self._selector.choose(
                feasible, self._power(forecast), now, self._weight(forecast)
            )
            # Where none is feasible the fastest is chosen; the operator's ceiling holds there too.
            index = self._selector.jump(min(index, self._ceiling), now)
        if forecast.lateness is not None:
            self._late_price.expect(float(forecast.lateness.excess_ratio[index]), now)
        latency = forecast.latency_seconds
        self._fastest_ratio = float(latency[-1] / latency[index])
        self._working_index = index
        average, default = self._average_power_watts()
        return Decision(
            target_clock_mhz=int(self._clocks_mhz[index]),
            reason=reason,
            binding=self._binding(forecast, index),
            predicted_iteration_seconds=float(forecast.latency_seconds[index]),
            predicted_iteration_upper_seconds=float(forecast.latency_upper_seconds[index]),
            predicted_power_watts=float(forecast.power_watts[index]),
            predicted_default_iteration_seconds=float(forecast.latency_seconds[-1]),
            predicted_default_power_watts=float(forecast.power_watts[-1]),
            cruise_clock_mhz=self._cruise_clock_mhz(),
            lost_requests_count=forecast.slack.lost_requests_count,
            long_run_power_watts=average,
            default_long_run_power_watts=default,
            advice=self._advice(forecast, now) if self._profile.wants_advice else None,
        )

    def _advice(self, forecast: Forecast, now: float) -> Advice:
        outlook = self._forecaster.outlook
        return Advice(
            forecast.admissions,
            outlook.load_headroom_ratio,
            self._scaling.least_gpus_count(outlook.load, now),
        )

    def _keeps_every_limit(self, forecast: Forecast) -> NDArray[np.bool_]:
        """Clocks that keep every slack and make no more answers late than is ever allowed, (C,)."""
        kept = forecast.slack.least() >= 0.0
        if forecast.lateness is not None:
            kept &= forecast.lateness.excess_ratio <= self._settings.late_limit_ratio
        return kept

    def _weight(self, forecast: Forecast) -> NDArray[np.float64]:
        """What the answers that each clock makes late multiply its cost with, (C,)."""
        if forecast.lateness is None:
            return np.ones(len(self._clocks_mhz))
        return 1.0 + self._late_price.answers * forecast.lateness.excess_ratio

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

    def _binding(self, forecast: Forecast, index: int) -> Binding | None:
        """What forbids the next lower clock; where nothing does, what has the least slack."""
        slack, late = forecast.slack, forecast.lateness
        nothing = np.empty(0)
        kind, number, left = binding_limit(
            index,
            slack.slack_seconds,
            slack.slos,
            slack.request_numbers,
            late is not None,
            nothing if late is None else late.excess_ratio,
            self._late_price.target_ratio,
            0 if late is None else late.request_number,
            nothing if late is None else late.request_slack_seconds,
        )
        return Binding(Slo(kind), int(number), float(left)) if kind else None

    def _long_run(self) -> LongRun | None:
        """Of the present equilibrium; computed anew once there is another."""
        equilibrium = self._forecaster.outlook.equilibrium
        if equilibrium is None:
            return None
        if self._known_long_run is None or self._known_long_run.equilibrium is not equilibrium:
            self._known_long_run = LongRun.of(
                equilibrium,
                self._clocks_mhz,
                self._allowed,
                self._idle_power_watts,
                len(self._profile.gpu_uuids),
                parking=self._settings.parking,
            )
        return self._known_long_run

    def _power(self, forecast: Forecast) -> NDArray[np.float64] | None:
        """What a clock costs but for lateness, (C,); None while the load is not known."""
        long_run = self._long_run()
        if long_run is None:
            return None
        return clock_costs(
            self._objective,
            self._clocks_mhz,
            forecast.horizon_joules,
            forecast.horizon_seconds,
            self._refund_watts(),
            self._selector.current,
            long_run.carried,
        )

    def _refund_watts(self) -> float:
        """What a second less of computing is worth, by the objective."""
        outlook = self._forecaster.outlook
        if self._settings.objective == "energy-above-idle":
            return outlook.least_resting_watts
        return outlook.refund_watts

    def _cruise_clock_mhz(self) -> int:
        long_run = self._long_run()
        return 0 if long_run is None else long_run.cruise_clock_mhz

    def _average_power_watts(self) -> tuple[float, float]:
        """Of all GPUs at this load: working as decided, and never throttled; 0 if unknown."""
        long_run = self._long_run()
        if long_run is None:
            return 0.0, 0.0
        return long_run.average_power_watts(self._working_index)
