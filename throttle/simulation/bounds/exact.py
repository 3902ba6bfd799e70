"""The least energy of a tiny case, exactly: dynamic programming over iterations and clocks.

A test oracle for the other bounds. Which requests an iteration holds depends on the time of day,
since arrivals join by the clock on the wall; so states are keyed on what each request has done,
and while requests are still to come, two ways to one state are compared only if they reach it in
the same bucket of time. Afterwards earlier is better. Among comparable ways those are kept that
no other beats in time, energy, misses and every running request's deadline (Pareto labels).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from throttle.errors import InvalidInputError
from throttle.simulation.operators import IterationWork

if TYPE_CHECKING:
    from collections.abc import Sequence

    from throttle.simulation.plant import Plant
    from throttle.simulation.requests import Request

_LONGEST = 100_000  # labels; beyond, the case is not tiny


@dataclass(frozen=True, slots=True)
class TinyCase:
    """What is to be served, and how well.

    Attributes:
        requests: In order of arrival; all must fit the KV cache at once.
        clocks_mhz: Clocks to choose from before each iteration; changes take no time.
        ttft_seconds: Limit on the first token.
        tpot_seconds: Limit on the mean gap.
        missed_limit: Requests that may miss a limit.
        horizon_seconds: Horizon of the energy; idle time is charged the lowest idle power.
        bucket_seconds: Times this close count as one while requests are still to come; 0 compares
            only equal times and is exact.
    """

    requests: Sequence[Request]
    clocks_mhz: tuple[int, ...]
    ttft_seconds: float
    tpot_seconds: float
    missed_limit: int
    horizon_seconds: float
    bucket_seconds: float = 0.0


class Optimum(NamedTuple):
    """The least energy.

    Attributes:
        energy_joules: Of all GPUs of the engine, over the horizon.
        clocks_mhz: The clock of each iteration.
    """

    energy_joules: float
    clocks_mhz: tuple[int, ...]


#: What one request has done: tokens in KV and output tokens.
_Progress = tuple[tuple[int, int], ...]


class _Label(NamedTuple):
    seconds: float
    excess_joules: float  # above the lowest idle power, of one GPU
    missed: int
    due_seconds: tuple[float, ...]  # latest end of each generating request; infinite for others
    clocks_mhz: tuple[int, ...]


class _Step(NamedTuple):
    work: IterationWork
    progress: _Progress
    first_tokens: tuple[int, ...]  # positions of requests that get their first token
    finished: tuple[int, ...]


def optimum(plant: Plant, case: TinyCase) -> Optimum:
    """The least energy with which at most `missed_limit` requests miss a limit.

    Args:
        plant: What iterations cost; without noise.
        case: What is to be served.

    Raises:
        InvalidInputError: The case is not tiny, or no choice of clocks keeps the limits.
    """
    return _Programme(plant, case).solve()


class _Programme:
    def __init__(self, plant: Plant, case: TinyCase) -> None:
        self._plant = plant
        self._case = case
        self._idle_watts = plant.idle_power_watts(plant.clocks_mhz[0])
        self._budget = plant.parameters.engine.batched_tokens_limit
        self._arrivals = [item.arrival_seconds for item in case.requests]
        self._costs: dict[tuple[IterationWork, int], tuple[float, float]] = {}
        self._states: dict[_Progress, list[_Label]] = {}
        self._heap: list[tuple[int, _Progress]] = []

    def solve(self) -> Optimum:
        count = len(self._case.requests)
        endless = (float("inf"),) * count
        self._add(((0, 0),) * count, _Label(0.0, 0.0, 0, endless, ()))
        labels_count = 0
        best: _Label | None = None
        while self._heap:
            _, progress = heapq.heappop(self._heap)
            labels = self._states.pop(progress)
            labels_count += len(labels)
            if labels_count > _LONGEST:
                raise InvalidInputError("requests", count, "a case tiny enough to solve exactly")
            for label in labels:
                if self._done(progress):
                    if best is None or label.excess_joules < best.excess_joules:
                        best = label
                else:
                    self._expand(progress, label)
        if best is None:
            raise InvalidInputError(
                "missed_limit", self._case.missed_limit, "a case that some clocks can serve"
            )
        idle = self._idle_watts * self._case.horizon_seconds
        return Optimum((best.excess_joules + idle) * self._plant.gpus_count, best.clocks_mhz)

    def _done(self, progress: _Progress) -> bool:
        return all(
            done[1] == item.output_tokens
            for done, item in zip(progress, self._case.requests, strict=True)
        )

    def _expand(self, progress: _Progress, label: _Label) -> None:
        now = label.seconds
        if not self._has_work(progress, now):  # idle until the next arrival
            now = min(
                arrival
                for arrival, done in zip(self._arrivals, progress, strict=True)
                if arrival > now and done == (0, 0)
            )
        step = self._step(progress, now)
        for clock in self._case.clocks_mhz:
            seconds, watts = self._cost(step.work, clock)
            ended = now + seconds
            due = list(label.due_seconds)
            missed = label.missed
            for position in step.first_tokens:
                request = self._case.requests[position]
                late = ended - request.arrival_seconds > self._case.ttft_seconds
                gaps = request.output_tokens - 1
                # A request that is late already has no deadline any more; it counts once.
                missed += late
                due[position] = float("inf") if late else ended + self._case.tpot_seconds * gaps
            for position in step.finished:
                missed += ended > due[position] + 1e-12
                due[position] = float("inf")
            if missed <= self._case.missed_limit:
                excess = label.excess_joules + (watts - self._idle_watts) * seconds
                clocks = (*label.clocks_mhz, clock)
                self._add(step.progress, _Label(ended, excess, missed, tuple(due), clocks))

    def _has_work(self, progress: _Progress, now: float) -> bool:
        return any(
            item.arrival_seconds <= now and done[1] < item.output_tokens
            for done, item in zip(progress, self._case.requests, strict=True)
        )

    def _step(self, progress: _Progress, now: float) -> _Step:
        """What the engine does next: generating requests first, then prompts in order."""
        after = list(progress)
        chunks: list[tuple[int, int]] = []
        first: list[int] = []
        finished: list[int] = []
        decodes = context = 0
        requests = self._case.requests
        for position, ((computed, generated), request) in enumerate(
            zip(progress, requests, strict=True)
        ):
            if 0 < generated < request.output_tokens:
                decodes += 1
                context += computed
                after[position] = (computed + 1, generated + 1)
                if generated + 1 == request.output_tokens:
                    finished.append(position)
        budget = self._budget - decodes
        for position, ((computed, generated), request) in enumerate(
            zip(progress, requests, strict=True)
        ):
            if generated or request.arrival_seconds > now or budget <= 0:
                continue
            tokens = min(request.prompt_tokens - computed, budget)
            budget -= tokens
            chunks.append((tokens, computed))
            through = computed + tokens == request.prompt_tokens
            after[position] = (computed + tokens, int(through))
            if through:
                first.append(position)
                if request.output_tokens == 1:
                    finished.append(position)
        work = IterationWork(
            prefill_chunks=tuple(chunks),
            decode_requests_count=decodes,
            decode_context_tokens=context,
            sampled_requests_count=decodes + len(first),
            decode_tokens_count=decodes,
        )
        return _Step(work, tuple(after), tuple(first), tuple(finished))

    def _cost(self, work: IterationWork, clock_mhz: int) -> tuple[float, float]:
        key = (work, clock_mhz)
        if key not in self._costs:
            cost = self._plant.iteration(work, clock_mhz)
            self._costs[key] = (cost.latency_seconds, cost.power_watts)
        return self._costs[key]

    def _add(self, progress: _Progress, label: _Label) -> None:
        labels = self._states.get(progress)
        if labels is None:
            labels = self._states[progress] = []
            rank = sum(computed + generated for computed, generated in progress)
            heapq.heappush(self._heap, (rank, progress))
        all_here = label.seconds >= self._arrivals[-1]
        if any(self._beats(other, label, all_here) for other in labels):
            return
        labels[:] = [
            other
            for other in labels
            if not self._beats(label, other, other.seconds >= self._arrivals[-1])
        ]
        labels.append(label)

    def _beats(self, one: _Label, other: _Label, all_here: bool) -> bool:  # noqa: FBT001 - private
        """Whether `one` is as good as `other` in everything that still matters."""
        if all_here:
            if one.seconds > other.seconds or one.seconds < self._arrivals[-1]:
                return False
        elif self._case.bucket_seconds:
            width = self._case.bucket_seconds
            if one.seconds // width != other.seconds // width:
                return False
        elif one.seconds != other.seconds:
            return False
        return (
            one.excess_joules <= other.excess_joules
            and one.missed <= other.missed
            and all(a >= b for a, b in zip(one.due_seconds, other.due_seconds, strict=True))
        )
