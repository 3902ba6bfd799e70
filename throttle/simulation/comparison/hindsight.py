"""Bounds for one cell of a comparison: the schedule in hindsight, and the certificate."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from throttle.simulation.bounds.certificate import Served, least_energy_joules
from throttle.simulation.bounds.schedule import SLOT_SECONDS, Played, ScheduledClocks, improve
from throttle.simulation.comparison.runs import REST_SECONDS, RunRecord, RunSpec, play_run
from throttle.simulation.engine import SimulatedEngine
from throttle.simulation.experiment import play
from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.policies.policy import locking
from throttle.simulation.workload import OpenLoop

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.simulation.experiment import RunResult

HINDSIGHT: Final = "hindsight"
#: Plays of the trace that the descent may take.
PLAYS_LIMIT: Final = 90
#: Clock changes at once: nothing between asking and the change.
_AT_ONCE: Final = (
    ("behavior.switch_median_seconds", 1e-9),
    ("behavior.switch_p99_seconds", 1e-9),
    ("behavior.decision_latency_seconds", 0.0),
)


def hindsight_schedule(
    spec: RunSpec, start: RunRecord, attainment_ratio: float, horizon_seconds: float
) -> RunRecord:
    """The schedule of least energy that coordinate descent finds, with everything known.

    Args:
        spec: Scene, load and seed.
        start: The run that the descent starts from: the best policy's.
        attainment_ratio: What the schedule must attain.
        horizon_seconds: Horizon that energies are compared over.

    Returns:
        Its run, over the horizon.
    """
    began = time.perf_counter()
    scene = dataclasses.replace(spec.scene, overrides=(*spec.scene.overrides, *_AT_ONCE))
    spec = dataclasses.replace(spec, scene=scene, policy=HINDSIGHT)
    player = _Player(spec, horizon_seconds)
    clocks = scene.build_plant().clocks_mhz
    missed_limit = int((1.0 - attainment_ratio) * player.requests_count + 1e-9)
    slots = _slots_of(start, clocks, horizon_seconds)
    best, _ = improve(slots, player, len(clocks) - 1, missed_limit, PLAYS_LIMIT)
    record = play_run(spec, ScheduledClocks(clocks, best))
    return dataclasses.replace(
        record.extended_to(horizon_seconds), wall_seconds=time.perf_counter() - began
    )


def certificate_joules(spec: RunSpec, attainment_ratio: float, horizon_seconds: float) -> float:
    """Energy that no schedule undercuts which attains so much; see `bounds.certificate`.

    Args:
        spec: Scene, load and seed.
        attainment_ratio: What schedules must attain.
        horizon_seconds: Horizon that energies are compared over.
    """
    scene = spec.scene
    chip = scene.build_plant().draw_chip(random.Random(spec.seed))  # noqa: S311 - as the run's
    trace = scene.build_trace()
    missed_limit = int((1.0 - attainment_ratio) * len(trace.requests) + 1e-9)
    served = Served.of(trace.requests, missed_limit, scene.slos.tpot_seconds)
    return least_energy_joules(chip, served, horizon_seconds)


def _slots_of(
    record: RunRecord, clocks: tuple[int, ...], horizon_seconds: float
) -> NDArray[np.int64]:
    """The run's mean clock in each slot, as positions in the grid."""
    count = int(np.ceil(horizon_seconds / SLOT_SECONDS))
    if not record.clock_series:
        mean = np.full(count, float(record.clock_mhz or clocks[-1]))
    else:
        times, seen = np.array(record.clock_series).T
        mean = np.interp((np.arange(count) + 0.5) * SLOT_SECONDS, times, seen)
    return np.clip(np.searchsorted(clocks, mean), 0, len(clocks) - 1).astype(np.int64)


class _Player:
    """Plays schedules in one scene, with one seed."""

    def __init__(self, spec: RunSpec, horizon_seconds: float) -> None:
        self._plant = spec.scene.build_plant()
        trace = spec.scene.build_trace().compressed(spec.compression_ratio)
        self._requests = trace.requests
        self._spec = spec
        self._horizon_seconds = horizon_seconds

    @property
    def requests_count(self) -> int:
        """Requests that arrive."""
        return len(self._requests)

    def play(self, clock_indices: NDArray[np.int64]) -> Played:
        """Play clocks, one per slot."""
        lock = InProcessLock()
        generator = random.Random(self._spec.seed)  # noqa: S311 - simulated
        gpu = SimulatedGpu(self._plant, lock, DiscardedTelemetry(), generator)
        engine = SimulatedEngine(gpu, OpenLoop(self._requests), self._spec.scene.fidelity)
        policy = ScheduledClocks(self._plant.clocks_mhz, clock_indices)
        result = play(engine, gpu, locking(policy, lock), rest_seconds=REST_SECONDS)
        return self._played(result, len(clock_indices))

    def _played(self, result: RunResult, slots: int) -> Played:
        slos = self._spec.scene.slos
        ttft, tpot, e2e = (
            np.inf if each is None else each
            for each in (slos.ttft_seconds, slos.tpot_seconds, slos.e2e_seconds)
        )
        outcomes = result.outcomes
        missed = [
            item.ttft_seconds > ttft
            or (item.tpot_seconds is not None and item.tpot_seconds > tpot)
            or item.e2e_seconds > e2e
            for item in outcomes
        ]
        arrivals = np.array([item.arrival_seconds for item in outcomes])
        ends = arrivals + np.array([item.e2e_seconds for item in outcomes])
        longest = max(self._horizon_seconds, result.horizon_seconds)
        total = result.extended_to(longest).energy_joules
        return Played(_by_slot(result, slots, total), arrivals, ends, np.array(missed))


def _by_slot(result: RunResult, slots: int, total_joules: float) -> NDArray[np.float64]:
    """Energy by slot; what the samples miss, and the time after the last slot, is in the last."""
    series = result.series
    ends = np.array(series.time_seconds)
    spans = np.diff(ends, prepend=0.0)
    slot = np.minimum(((ends - 0.5 * spans) / SLOT_SECONDS).astype(int), slots - 1)
    joules: NDArray[np.float64] = np.bincount(
        slot, weights=spans * np.array(series.power_watts), minlength=slots
    ).astype(np.float64)
    joules[-1] += total_joules - joules.sum()
    return joules
