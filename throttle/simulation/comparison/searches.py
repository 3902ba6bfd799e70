"""What is found by playing a trace many times: goodput, static clocks, equal attainment."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from throttle.errors import InvalidInputError
from throttle.simulation.comparison.runs import RunRecord, RunSpec, play_run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from throttle.simulation.comparison.runs import Scene

#: Attainment that defines goodput, and the least that a static clock may have.
GOODPUT_ATTAINMENT: Final = 0.99
#: What a static clock may lose against maximum clock, and what counts as equal attainment.
STATIC_LOSS: Final = 0.005
EQUAL_LOSS: Final = 0.001
_GOODPUT_SEED = 0
_GOODPUT_PRECISION = 0.01
_LEAST_COMPRESSION, _MOST_COMPRESSION = 1 / 64, 64.0
#: Grid steps of the coarse search for a static clock; 120 MHz on Hopper.
_COARSE_STEPS = 8
#: Factors on the limits that a policy is told, tried to bring it to equal attainment.
TIGHTER: Final = (0.98, 0.96, 0.93, 0.9, 0.86, 0.82, 0.78, 0.7, 0.6)
LOOSER: Final = (1.03, 1.06, 1.1, 1.15, 1.2, 1.3)


def goodput_compression(scene: Scene, cache: Path | None = None) -> float:
    """The highest time compression at which maximum clock attains 99 %, to 1 %.

    Found by bisection on a logarithmic scale, with one seed; load 1 is this compression.

    Args:
        scene: Plant, trace and limits.
        cache: Directory where results are kept by a hash of the scene; None for nowhere.

    Raises:
        InvalidInputError: Maximum clock does not attain 99 % however slowly requests arrive.
    """
    path = None if cache is None else cache / f"goodput-{scene.digest()}.json"
    if path is not None and path.is_file():
        return float(json.loads(path.read_text(encoding="utf-8"))["compression_ratio"])
    found = _bisect_goodput(lambda ratio: _attained(scene, ratio))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"compression_ratio": found, "plant": scene.plant, "trace": scene.trace}
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return found


def _attained(scene: Scene, compression_ratio: float) -> bool:
    record = play_run(RunSpec(scene, "max", 1.0, compression_ratio, _GOODPUT_SEED))
    return record.attainment_ratio >= GOODPUT_ATTAINMENT


def _bisect_goodput(attained: Callable[[float], bool]) -> float:
    low = high = 1.0
    if attained(1.0):
        while high < _MOST_COMPRESSION and attained(high * 2.0):
            high *= 2.0
        low, high = high, high * 2.0
    else:
        while not attained(low / 2.0):
            low /= 2.0
            if low <= _LEAST_COMPRESSION:
                raise InvalidInputError(
                    "trace",
                    f"below {GOODPUT_ATTAINMENT:.0%} at maximum clock, {1 / low:g} times slower",
                    "a trace whose requests, one by one, keep the limits on the plant",
                )
        low, high = low / 2.0, low
    while high / low > 1.0 + _GOODPUT_PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if attained(middle) else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class StaticClocks:
    """The best static clocks of one trace, in hindsight.

    Attributes:
        allowed: Least energy with at most 0.5 points less attainment than maximum clock, and 99 %.
        equal: Least energy with attainment within 0.1 points of maximum clock.
    """

    allowed: RunRecord
    equal: RunRecord


def best_static(spec: RunSpec, maximum: RunRecord) -> StaticClocks:
    """Play clocks of a coarse grid, then refine around the best, for two rules of attainment.

    Args:
        spec: Scene, load and seed; its policy is not read.
        maximum: The same at maximum clock.
    """
    clocks = spec.scene.build_plant().clocks_mhz
    played: dict[int, RunRecord] = {}

    def run(index: int) -> RunRecord:
        if index not in played:
            clock = clocks[index]
            record = play_run(replace(spec, policy=f"fixed-{clock}"))
            played[index] = replace(record, policy="best-static", clock_mhz=clock)
        return played[index]

    attained = maximum.attainment_ratio
    floors = (max(GOODPUT_ATTAINMENT, attained - STATIC_LOSS), attained - EQUAL_LOSS)
    for index in range(len(clocks) - 1, -1, -_COARSE_STEPS):
        if run(index).attainment_ratio < min(floors):
            break
    for floor in floors:
        _refine(run, played, floor, len(clocks))
    allowed, equal = (
        replace(maximum, clock_mhz=clocks[-1]) if index is None else played[index]
        for index in (_least(played, floor) for floor in floors)
    )
    return StaticClocks(
        replace(allowed, policy="best-static"), replace(equal, policy="best-static-equal")
    )


def _refine(
    run: Callable[[int], RunRecord], played: dict[int, RunRecord], floor: float, count: int
) -> None:
    step = _COARSE_STEPS // 2
    while step:
        best = _least(played, floor)
        if best is None:
            return
        for index in (best - step, best + step):
            if 0 <= index < count:
                run(index)
        if _least(played, floor) == best:
            step //= 2


def _least(played: dict[int, RunRecord], floor: float) -> int | None:
    """The clock of least energy, over one horizon, among those that attain enough."""
    horizon = max(record.horizon_seconds for record in played.values())
    energies = {
        index: record.extended_to(horizon).energy_joules
        for index, record in played.items()
        if record.attainment_ratio >= floor
    }
    return min(energies, key=energies.__getitem__, default=None)


def trained_static(specs: Sequence[RunSpec], maxima: Sequence[RunRecord]) -> int:
    """The lowest clock that is good enough on every training trace: what an operator can find.

    Args:
        specs: The training traces, each at its load.
        maxima: The same at maximum clock.
    """
    clocks = [
        best_static(spec, maximum).allowed.clock_mhz or 0
        for spec, maximum in zip(specs, maxima, strict=True)
    ]
    return max(clocks)


def equal_attainment(spec: RunSpec, attainment_ratio: float) -> RunRecord | None:
    """A policy run told tighter limits, step by step until it attains enough.

    Args:
        spec: The run.
        attainment_ratio: What it must attain.

    Returns:
        The first such run; None if no factor of `TIGHTER` attains enough.
    """
    for ratio in TIGHTER:
        record = play_run(replace(spec, limit_ratio=ratio))
        if record.attainment_ratio >= attainment_ratio:
            return record
    return None


def loosened(record: RunRecord, spec: RunSpec, attainment_ratio: float) -> RunRecord:
    """A policy that attains enough, told looser limits step by step while it still does.

    Args:
        record: The run with the true limits.
        spec: That run.
        attainment_ratio: What it must attain.

    Returns:
        The run of least energy among those that attain enough.
    """
    best = record
    for ratio in LOOSER:
        tried = play_run(replace(spec, limit_ratio=ratio))
        if tried.attainment_ratio < attainment_ratio:
            break
        horizon = max(tried.horizon_seconds, best.horizon_seconds)
        if tried.extended_to(horizon).energy_joules < best.extended_to(horizon).energy_joules:
            best = tried
    return best
