"""Plays a workload on the simulated engine and sums up what came of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from throttle.errors import InvalidInputError
from throttle.simulation.outcomes import RequestOutcome  # noqa: TC001 - part of RunResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from throttle.control.state import IterationState
    from throttle.simulation.engine import SimulatedEngine
    from throttle.simulation.gpu import SimulatedGpu

_SAMPLE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RunSeries:
    """How a run went, sampled about each half second; sequences of one length.

    Attributes:
        time_seconds: End of each interval.
        clock_mhz: SM clock, mean over the interval.
        power_watts: Mean power of the engine's GPUs together.
        running_count: Running requests at the end of the interval.
        waiting_count: Waiting requests likewise.
        kv_usage_ratio: Share of KV blocks in use likewise.
    """

    time_seconds: tuple[float, ...] = ()
    clock_mhz: tuple[float, ...] = ()
    power_watts: tuple[float, ...] = ()
    running_count: tuple[int, ...] = ()
    waiting_count: tuple[int, ...] = ()
    kv_usage_ratio: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run cost and how its requests fared; simulated.

    Attributes:
        outcomes: Finished requests in order of their end.
        arrived_count: All requests that arrived, finished or not.
        energy_joules: Energy of the engine's GPUs over the horizon.
        idle_energy_joules: The part of it spent without work.
        idle_power_watts: Power of the engine's GPUs when the run ended, if idle from then on.
        horizon_seconds: Time that the energy speaks of.
        finished_seconds: When the last request ended.
        output_tokens_count: Tokens generated.
        clock_changes_count: Clock changes that took effect.
        iterations_count: Iterations run.
        preemptions_count: Preemptions.
        tbt_p50_seconds: Median gap between two tokens, over all tokens.
        tbt_p99_seconds: 99th percentile of the same.
        series: How it went.
    """

    outcomes: tuple[RequestOutcome, ...]
    arrived_count: int
    energy_joules: float
    idle_energy_joules: float
    idle_power_watts: float
    horizon_seconds: float
    finished_seconds: float
    output_tokens_count: int
    clock_changes_count: int
    iterations_count: int
    preemptions_count: int
    tbt_p50_seconds: float
    tbt_p99_seconds: float
    series: RunSeries

    def extended_to(self, horizon_seconds: float) -> RunResult:
        """The same run with idle power added until a later horizon.

        Energies of two runs compare only over one horizon, the later of the two.

        Raises:
            InvalidInputError: The horizon lies before the run's own.
        """
        more = horizon_seconds - self.horizon_seconds
        if more < 0:
            raise InvalidInputError(
                "horizon_seconds", horizon_seconds, f"{self.horizon_seconds:g} or later"
            )
        idle = more * self.idle_power_watts
        return replace(
            self,
            energy_joules=self.energy_joules + idle,
            idle_energy_joules=self.idle_energy_joules + idle,
            horizon_seconds=horizon_seconds,
        )

    def attainment_ratio(self, ttft_seconds: float, tpot_seconds: float) -> float:
        """Share of all arrived requests with TTFT and mean TPOT within the limits.

        Requests that never finished miss; a single-token answer passes the TPOT test.
        """
        if not self.arrived_count:
            return 1.0
        kept = sum(
            item.ttft_seconds <= ttft_seconds
            and (item.tpot_seconds is None or item.tpot_seconds <= tpot_seconds)
            for item in self.outcomes
        )
        return kept / self.arrived_count

    def ttft_quantile_seconds(self, ratio: float) -> float:
        """Quantile of the time to first token over finished requests; 0 without any."""
        return _quantile([item.ttft_seconds for item in self.outcomes], ratio)

    def tpot_quantile_seconds(self, ratio: float) -> float:
        """Quantile of the mean time per output token; single-token answers left out."""
        return _quantile(
            [item.tpot_seconds for item in self.outcomes if item.tpot_seconds is not None], ratio
        )

    def e2e_quantile_seconds(self, ratio: float) -> float:
        """Quantile of the time from arrival to the last token."""
        return _quantile([item.e2e_seconds for item in self.outcomes], ratio)

    def summary(self, ttft_seconds: float, tpot_seconds: float) -> dict[str, float]:
        """The run in a few figures, by stable names.

        Args:
            ttft_seconds: Limit for the time to first token.
            tpot_seconds: Limit for the mean time per output token.
        """
        tokens = self.output_tokens_count
        return {
            "energy_joules": self.energy_joules,
            "energy_per_output_token_joules": self.energy_joules / tokens if tokens else 0.0,
            "attainment_ratio": self.attainment_ratio(ttft_seconds, tpot_seconds),
            "ttft_p50_seconds": self.ttft_quantile_seconds(0.5),
            "ttft_p99_seconds": self.ttft_quantile_seconds(0.99),
            "tpot_p50_seconds": self.tpot_quantile_seconds(0.5),
            "tpot_p99_seconds": self.tpot_quantile_seconds(0.99),
            "tbt_p50_seconds": self.tbt_p50_seconds,
            "tbt_p99_seconds": self.tbt_p99_seconds,
            "e2e_p99_seconds": self.e2e_quantile_seconds(0.99),
            "requests_count": self.arrived_count,
            "output_tokens_count": tokens,
            "iterations_count": self.iterations_count,
            "preemptions_count": self.preemptions_count,
            "clock_changes_count": self.clock_changes_count,
            "idle_energy_joules": self.idle_energy_joules,
            "horizon_seconds": self.horizon_seconds,
        }


def _quantile(values: list[float], ratio: float) -> float:
    return float(np.quantile(values, ratio)) if values else 0.0


def on_common_horizon(results: dict[str, RunResult]) -> dict[str, RunResult]:
    """The runs, each extended with idle power to the latest horizon among them."""
    latest = max(result.horizon_seconds for result in results.values())
    return {name: result.extended_to(latest) for name, result in results.items()}


class _Sampler:
    """Means of clock and power over half seconds of simulated time."""

    def __init__(self, gpu: SimulatedGpu, engine: SimulatedEngine) -> None:
        self._gpu, self._engine = gpu, engine
        self._seen_seconds = self._began_seconds = gpu.time_seconds
        self._began_joules = gpu.energy_joules
        self._clock_seconds = 0.0
        self._rows: list[tuple[float, float, float, int, int, float]] = []

    def observe(self) -> None:
        gpu, engine = self._gpu, self._engine
        now = gpu.time_seconds
        self._clock_seconds += (now - self._seen_seconds) * gpu.clock_mhz
        self._seen_seconds = now
        span = now - self._began_seconds
        if span < _SAMPLE_SECONDS:
            return
        watts = (gpu.energy_joules - self._began_joules) * gpu.plant.gpus_count / span
        usage = engine.used_blocks_count / engine.kv_blocks_count
        self._rows.append(
            (
                now,
                self._clock_seconds / span,
                watts,
                engine.running_count,
                engine.waiting_count,
                usage,
            )
        )
        self._began_seconds, self._began_joules = now, gpu.energy_joules
        self._clock_seconds = 0.0

    def series(self) -> RunSeries:
        if not self._rows:
            return RunSeries()
        times, clocks, watts, running, waiting, usage = zip(*self._rows, strict=True)
        return RunSeries(times, clocks, watts, running, waiting, usage)


def play(
    engine: SimulatedEngine,
    gpu: SimulatedGpu,
    decide: Callable[[IterationState], None],
    progress: Callable[[float], None] | None = None,
    until_seconds: float = 0.0,
    *,
    rest_seconds: float = 0.0,
) -> RunResult:
    """Serve every request, with a controller between the iterations.

    Args:
        engine: The engine, with its requests.
        gpu: Its GPU.
        decide: Called with each state; returns when the decision is made. It may set the lock.
        progress: Called with the simulated time about each half second of it.
        until_seconds: Go on idling, with heartbeats, until this time at least.
        rest_seconds: Go on idling for so long after the last request at least, so that a policy
            that parks idle GPUs has done so when the horizon is extended.

    Returns:
        The run, with the horizon at its end.
    """
    sampler = _Sampler(gpu, engine)
    reported = 0.0
    finished = 0.0
    for resting in (False, True):
        idle_until = max(until_seconds, finished + rest_seconds)
        for state in engine.rest(idle_until) if resting else engine.run():
            decide(state)
            sampler.observe()
            if progress is not None and state.engine_time_seconds - reported >= _SAMPLE_SECONDS:
                reported = state.engine_time_seconds
                progress(reported)
        finished = finished or gpu.time_seconds
    gpus = gpu.plant.gpus_count
    return RunResult(
        outcomes=tuple(engine.outcomes),
        arrived_count=engine.arrived_count,
        energy_joules=gpu.energy_joules * gpus,
        idle_energy_joules=gpu.idle_energy_joules * gpus,
        idle_power_watts=gpu.idle_power_watts * gpus,
        horizon_seconds=gpu.time_seconds,
        finished_seconds=finished,
        output_tokens_count=engine.output_tokens_count,
        clock_changes_count=gpu.clock_changes_count,
        iterations_count=engine.iterations_count,
        preemptions_count=engine.preemptions_count,
        tbt_p50_seconds=engine.gaps.quantile_seconds(0.5),
        tbt_p99_seconds=engine.gaps.quantile_seconds(0.99),
        series=sampler.series(),
    )
