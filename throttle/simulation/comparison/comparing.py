"""Policies over loads and seeds in one scene: which runs it takes, and what they come to."""

from __future__ import annotations

import enum
import math
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from throttle.errors import InvalidInputError
from throttle.simulation.comparison.execution import Progress
from throttle.simulation.comparison.hindsight import (
    HINDSIGHT,
    certificate_joules,
    hindsight_schedule,
)
from throttle.simulation.comparison.runs import RunRecord, RunSpec, Scene, play_run
from throttle.simulation.comparison.searches import (
    EQUAL_LOSS,
    STATIC_LOSS,
    best_static,
    equal_attainment,
    goodput_compression,
    loosened,
    trained_static,
)
from throttle.simulation.policies.catalogue import SEARCHED, is_policy_name
from throttle.simulation.workload import trace_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from throttle.simulation.comparison.execution import Executor

BEST_STATIC_EQUAL: Final = "best-static-equal"
_OURS = "throttle"
_CONFIDENCE = 0.95


class Equalize(enum.StrEnum):
    """Which policies are run again for equal attainment."""

    NONE = "none"
    TIGHTEN = "tighten"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared.

    Attributes:
        scene: Plant, trace, limits, knowledge.
        policies: Their names; `max` is always played.
        loads: Shares of the maximum-clock goodput.
        seeds: One run each.
        with_hindsight: Whether the hindsight-achievable schedule is searched.
        with_certificate: Whether the certificate is computed.
        equalize: Whether policies are run again, told other limits, until they attain what
            maximum clock does: those that attain too little ("tighten"), also those that attain
            it with room to spare ("both"), or none.
        cache: Directory where goodput is kept; None for nowhere.
    """

    scene: Scene
    policies: tuple[str, ...]
    loads: tuple[float, ...] = (0.6,)
    seeds: tuple[int, ...] = (1,)
    with_hindsight: bool = False
    with_certificate: bool = False
    equalize: Equalize = Equalize.TIGHTEN
    cache: Path | None = None

    def check(self) -> None:
        """Refuse what cannot be played.

        Raises:
            InvalidInputError: Names the first such value.
        """
        for name in self.policies:
            if not is_policy_name(name):
                raise InvalidInputError("policies", name, "a policy's name or fixed-<MHz>")
        for load in self.loads:
            if not 0.0 < load <= 1.5:
                raise InvalidInputError("load", load, "above 0, up to 1.5")


@dataclass(frozen=True, slots=True)
class Cell:
    """Every run at one load and seed, over one horizon.

    Attributes:
        load: Share of the goodput.
        seed: The seed.
        records: By policy, in order.
        equal: By policy, the run at equal attainment; None where none was reached.
        certificate_joules: Lower bound of any schedule's energy; None if not computed.
    """

    load: float
    seed: int
    records: dict[str, RunRecord]
    equal: dict[str, RunRecord | None]
    certificate_joules: float | None = None


def compare(plan: Plan, executor: Executor) -> dict[str, Any]:
    """Play everything and sum it up.

    Returns:
        The JSON document: what was compared, `runs` and `summary`.

    Raises:
        InvalidInputError: Something in the plan cannot be played.
        ThrottleError: A run failed.
    """
    plan.check()
    cells = play_cells(plan, executor)
    return document(plan, cells)


def play_cells(plan: Plan, executor: Executor) -> list[Cell]:
    """All runs, stage by stage, each stage over the executor."""
    goodput = goodput_compression(plan.scene, plan.cache)
    specs = [
        RunSpec(plan.scene, "max", load, load * goodput, seed)
        for load in plan.loads
        for seed in plan.seeds
    ]
    maxima = _stage("maximum clock", executor, play_run, specs)
    pairs = list(zip(specs, maxima, strict=True))
    trained = _trained_clocks(plan, executor)
    tasks = [_Task(spec, maximum, name, trained) for spec, maximum in pairs for name in _rest(plan)]
    results = _stage("policies", executor, _play_task, tasks)
    per_cell = len(_rest(plan))
    cells = []
    for index, (spec, maximum) in enumerate(pairs):
        records: dict[str, RunRecord] = {"max": maximum}
        for found in results[index * per_cell : (index + 1) * per_cell]:
            records |= {record.policy: record for record in found}
        cells.append(Cell(spec.load, spec.seed, records, {}))
    cells = _with_equal(plan, executor, cells)
    if plan.with_hindsight:
        cells = _with_hindsight(plan, executor, cells)
    cells = [on_common_horizon(cell) for cell in cells]
    if plan.with_certificate:
        wanted = [_certificate_task(plan, cell) for cell in cells]
        found = _stage("certificate", executor, _play_certificate, wanted)
        cells = [
            replace(cell, certificate_joules=joules)
            for cell, joules in zip(cells, found, strict=True)
        ]
    return cells


@dataclass(frozen=True, slots=True)
class _Task:
    spec: RunSpec
    maximum: RunRecord
    policy: str
    trained: dict[float, int]


def _play_task(task: _Task) -> list[RunRecord]:
    if task.policy == "best-static":
        found = best_static(task.spec, task.maximum)
        return [found.allowed, found.equal]
    if task.policy == "trained-static":
        clock = task.trained[task.spec.load]
        record = play_run(replace(task.spec, policy=f"fixed-{clock}"))
        return [replace(record, policy="trained-static", clock_mhz=clock)]
    return [play_run(replace(task.spec, policy=task.policy))]


def _stage(what: str, executor: Executor, function: Any, tasks: Sequence[Any]) -> list[Any]:  # noqa: ANN401 - any task
    progress = Progress(what, len(tasks))
    return executor.map(function, tasks, progress.done)


def _rest(plan: Plan) -> tuple[str, ...]:
    """Policies beside maximum clock; slow ones first, so that none is left for the end."""
    names = [name for name in dict.fromkeys(plan.policies) if name != "max"]
    return tuple(sorted(names, key=lambda name: (name not in SEARCHED, name != _OURS)))


def _trained_clocks(plan: Plan, executor: Executor) -> dict[float, int]:
    """For each load the clock that other shipped traces teach."""
    if "trained-static" not in plan.policies:
        return {}
    others = [name for name in trace_names() if not plan.scene.trace.startswith(name)]
    if not others:
        raise InvalidInputError("policies", "trained-static", "a plan with other shipped traces")
    tasks = [_Training(plan, name, load) for load in plan.loads for name in others]
    clocks = _stage("training traces", executor, _train, tasks)
    return {
        load: max(clock for task, clock in zip(tasks, clocks, strict=True) if task.load == load)
        for load in plan.loads
    }


@dataclass(frozen=True, slots=True)
class _Training:
    plan: Plan
    trace: str
    load: float


def _train(task: _Training) -> int:
    scene = replace(task.plan.scene, trace=task.trace, start_seconds=0.0)
    goodput = goodput_compression(scene, task.plan.cache)
    spec = RunSpec(scene, "max", task.load, task.load * goodput, 0)
    return trained_static([spec], [play_run(spec)])


def _with_equal(plan: Plan, executor: Executor, cells: list[Cell]) -> list[Cell]:
    tasks: list[tuple[RunSpec, RunRecord, float]] = []
    owners: list[tuple[int, str]] = []
    for index, cell in enumerate(cells):
        wanted = cell.records["max"].attainment_ratio - EQUAL_LOSS
        for name, record in cell.records.items():
            tighten = record.attainment_ratio < wanted
            wanted_at_all = plan.equalize is Equalize.BOTH or (
                tighten and plan.equalize is Equalize.TIGHTEN
            )
            if _is_static(name) or not wanted_at_all:
                continue
            spec = RunSpec(plan.scene, name, cell.load, record.compression_ratio, cell.seed)
            tasks.append((spec, record, wanted))
            owners.append((index, name))
    found = _stage("equal attainment", executor, _play_equal, tasks) if tasks else []
    equal = [_already_equal(cell) for cell in cells]
    for (index, name), record in zip(owners, found, strict=True):
        if record is not None:
            equal[index][name] = record
    return [replace(cell, equal=each) for cell, each in zip(cells, equal, strict=True)]


def _already_equal(cell: Cell) -> dict[str, RunRecord | None]:
    wanted = cell.records["max"].attainment_ratio - EQUAL_LOSS
    equal: dict[str, RunRecord | None] = {
        name: record if record.attainment_ratio >= wanted else None
        for name, record in cell.records.items()
    }
    if BEST_STATIC_EQUAL in cell.records:
        equal["best-static"] = cell.records[BEST_STATIC_EQUAL]
    return equal


def _is_static(name: str) -> bool:
    return name in {"max", *SEARCHED, BEST_STATIC_EQUAL} or name.startswith("fixed-")


def _play_equal(task: tuple[RunSpec, RunRecord, float]) -> RunRecord | None:
    spec, record, wanted = task
    if record.attainment_ratio < wanted:
        return equal_attainment(spec, wanted)
    return loosened(record, spec, wanted)


def _with_hindsight(plan: Plan, executor: Executor, cells: list[Cell]) -> list[Cell]:
    tasks = [_hindsight_task(plan, cell) for cell in cells]
    found = _stage("hindsight", executor, _play_hindsight, tasks)
    return [
        replace(
            cell,
            records={**cell.records, HINDSIGHT: record},
            equal={**cell.equal, HINDSIGHT: record},
        )
        for cell, record in zip(cells, found, strict=True)
    ]


def _hindsight_task(plan: Plan, cell: Cell) -> tuple[RunSpec, RunRecord, float, float]:
    start, horizon = best_kept(cell)
    spec = RunSpec(plan.scene, HINDSIGHT, cell.load, start.compression_ratio, cell.seed)
    return spec, start, cell.records["max"].attainment_ratio - EQUAL_LOSS, horizon


def best_kept(cell: Cell) -> tuple[RunRecord, float]:
    """The run of least energy at equal attainment, and the latest horizon of all such runs."""
    wanted = cell.records["max"].attainment_ratio - EQUAL_LOSS
    kept = [
        record
        for record in [*cell.records.values(), *cell.equal.values()]
        if record is not None and record.attainment_ratio >= wanted
    ]
    horizon = max(record.horizon_seconds for record in kept)
    return min(kept, key=lambda record: record.extended_to(horizon).energy_joules), horizon


def _play_hindsight(task: tuple[RunSpec, RunRecord, float, float]) -> RunRecord:
    return hindsight_schedule(*task)


def _certificate_task(plan: Plan, cell: Cell) -> tuple[RunSpec, float, float]:
    maximum = cell.records["max"]
    spec = RunSpec(plan.scene, "max", cell.load, maximum.compression_ratio, cell.seed)
    return spec, maximum.attainment_ratio - EQUAL_LOSS, maximum.horizon_seconds


def _play_certificate(task: tuple[RunSpec, float, float]) -> float:
    return certificate_joules(*task)


def on_common_horizon(cell: Cell) -> Cell:
    """Energies of one cell over the latest horizon among its runs."""
    runs = [*cell.records.values(), *(each for each in cell.equal.values() if each is not None)]
    latest = max(record.horizon_seconds for record in runs)
    return replace(
        cell,
        records={name: record.extended_to(latest) for name, record in cell.records.items()},
        equal={
            name: None if record is None else record.extended_to(latest)
            for name, record in cell.equal.items()
        },
    )


# -- what they come to ---------------------------------------------------------------------------


def document(plan: Plan, cells: Sequence[Cell]) -> dict[str, Any]:
    """The JSON document of a comparison."""
    scene = plan.scene
    slos = scene.slos
    runs = [_run_document(cell, name) for cell in cells for name in cell.records]
    return {
        "simulated": True,
        "plant": cells[0].records["max"].plant,
        "trace": cells[0].records["max"].trace,
        "fidelity": scene.fidelity.value,
        "limits": {
            "ttft_seconds": slos.ttft_seconds,
            "tbt_seconds": slos.tbt_seconds,
            "tpot_seconds": slos.tpot_seconds,
            "e2e_seconds": slos.e2e_seconds,
        },
        "goodput_compression_ratio": cells[0].records["max"].compression_ratio / cells[0].load,
        "runs": runs,
        "summary": summarize(cells),
    }


def _run_document(cell: Cell, name: str) -> dict[str, Any]:
    record, maximum = cell.records[name], cell.records["max"]
    loss = maximum.attainment_ratio - record.attainment_ratio
    equal = cell.equal.get(name)
    return {
        **record.document(),
        "energy_ratio": record.energy_joules / maximum.energy_joules,
        "attainment_loss": loss,
        "comparable": loss <= STATIC_LOSS,
        "equal_attainment_energy_joules": None if equal is None else equal.energy_joules,
        "equal_attainment_limit_ratio": None if equal is None else equal.limit_ratio,
        "certificate_joules": cell.certificate_joules,
    }


def summarize(cells: Sequence[Cell]) -> dict[str, Any]:
    """Ratios per load and policy, mean over seeds with Student's t intervals of 95 %.

    Energy ratios are formed inside each seed's cell, then averaged.
    """
    loads = sorted({cell.load for cell in cells})
    return {
        f"{load:g}": _summarize_load([cell for cell in cells if cell.load == load])
        for load in loads
    }


def _summarize_load(cells: Sequence[Cell]) -> dict[str, Any]:
    return {name: _summarize_policy(cells, name) for name in cells[0].records}


def _summarize_policy(cells: Sequence[Cell], name: str) -> dict[str, Any]:
    records = [cell.records[name] for cell in cells]
    return {
        "energy_ratio": interval(
            record.energy_joules / cell.records["max"].energy_joules
            for record, cell in zip(records, cells, strict=True)
        ),
        "equal_attainment_energy_ratio": interval(_ratios(cells, name, "max")),
        "energy_over_best_static": interval(_ratios(cells, name, BEST_STATIC_EQUAL)),
        "energy_over_best_other": interval(_over_best_other(cells, name)),
        "energy_over_hindsight": interval(_ratios(cells, name, HINDSIGHT)),
        "energy_over_certificate": interval(
            record.energy_joules / cell.certificate_joules
            for record, cell in zip(records, cells, strict=True)
            if cell.certificate_joules
        ),
        "attainment_ratio": interval(record.attainment_ratio for record in records),
        "attainment_loss": interval(
            cell.records["max"].attainment_ratio - record.attainment_ratio
            for record, cell in zip(records, cells, strict=True)
        ),
        "clock_changes_per_second": interval(each.clock_changes_per_second for each in records),
        "comparable": all(
            cell.records["max"].attainment_ratio - record.attainment_ratio <= STATIC_LOSS
            for record, cell in zip(records, cells, strict=True)
        ),
    }


def _ratios(cells: Sequence[Cell], name: str, other: str) -> list[float]:
    """Energy over another policy's, both at equal attainment, per cell where both exist."""
    found = []
    for cell in cells:
        mine, reference = cell.equal.get(name), cell.equal.get(other)
        if mine is not None and reference is not None:
            found.append(mine.energy_joules / reference.energy_joules)
    return found


def _over_best_other(cells: Sequence[Cell], name: str) -> list[float]:
    """Energy over the least of the other policies', all at equal attainment."""
    found = []
    left_out = {name, HINDSIGHT, _OURS}
    if name in {"best-static", BEST_STATIC_EQUAL}:
        left_out |= {"best-static", BEST_STATIC_EQUAL}
    for cell in cells:
        mine = cell.equal.get(name)
        others = [
            record.energy_joules
            for other, record in cell.equal.items()
            if record is not None and other not in left_out
        ]
        if mine is not None and others:
            found.append(mine.energy_joules / min(others))
    return found


def interval(values: Iterable[float]) -> dict[str, float | int | None] | None:
    """Mean, half width of the 95 % confidence interval (None for one value) and count.

    Student's t: the values are few and their spread is estimated. None without values.
    """
    found = list(values)
    if not found:
        return None
    mean = statistics.fmean(found)
    half: float | None = None
    if len(found) > 1:
        from scipy import stats  # type: ignore[import-untyped]  # noqa: PLC0415 - slow to load

        quantile = float(stats.t.ppf(0.5 + _CONFIDENCE / 2.0, len(found) - 1))
        half = quantile * statistics.stdev(found) / math.sqrt(len(found))
    return {"mean": mean, "half_width": half, "count": len(found)}
