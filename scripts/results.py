"""Plays the comparisons of docs/results.md and writes its tables; all figures are simulated.

    python scripts/results.py --bundles models            everything that is missing or stale
    python scripts/results.py --quick                     one plant and trace, one seed
    python scripts/results.py --only azure,0.6            cells whose name holds all these words
    python scripts/results.py --tables                    only the tables, from what is there

Each figure is kept in out/results under a hash of all that it depends on: plant, trace, limits,
seed, bundle, and the sources that compute it. What is there is not played again, so the script can
be stopped at any time; what has become stale is.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from results_tables import write_tables

from predictors.bundle import MANIFEST_FILE
from predictors.errors import PredictorsError
from throttle.control.state import Slos
from throttle.simulation.comparison.comparing import Cell, best_kept, on_common_horizon
from throttle.simulation.comparison.execution import InProcess, LocalProcesses, Progress
from throttle.simulation.comparison.hindsight import HINDSIGHT, hindsight_schedule
from throttle.simulation.comparison.runs import CHAT_SLOS, RunRecord, RunSpec, Scene, play_run
from throttle.simulation.comparison.searches import (
    EQUAL_LOSS,
    best_static,
    equal_attainment,
    goodput_compression,
    trained_static,
)
from throttle.simulation.engine import Fidelity
from throttle.simulation.policies.catalogue import ABLATION_NAMES, POLICY_NAMES
from throttle.simulation.policies.disturbed import Outages

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "results"
DOCUMENT = ROOT / "docs" / "results.md"

#: Limits of a reasoning model: answers are long, and read as a whole.
REASONING_SLOS = Slos(ttft_seconds=2.0, tpot_seconds=0.1)
#: Trace -> limits that its requests are judged by.
TRACES = {
    "azure2023_conv_10min": CHAT_SLOS,
    "servegen_mlarge_10min": CHAT_SLOS,
    "servegen_r1_10min": REASONING_SLOS,
}
LOADS = (0.4, 0.6, 0.75)
#: (plant, seed of the draw); draws use the bundle of the plant that they are drawn around.
PLANTS: tuple[tuple[str, int | None], ...] = (
    ("h200-qwen3-30b-a3b", None),
    ("h100-mixtral-8x7b-tp2", None),
    ("h200-qwen3-30b-a3b", 101),
    ("h100-mixtral-8x7b-tp2", 102),
)
POLICIES = ("best-static", "throttllem", "ecofreq", "greenllm", "aimd", "mpc", "throttle")
OTHERS = tuple(name for name in POLICY_NAMES if name not in {"max", *POLICIES})
HEADLINE = ("h200-qwen3-30b-a3b", None, "azure2023_conv_10min", 0.6)
#: Ours with each objective, from nearly idle to nearly full.
ABLATION_LOADS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.75, 0.9)
#: Faults, one cell each: name -> what is changed in the scene.
FAULTS: dict[str, dict[str, Any]] = {
    "predictor 15 % too optimistic": {"predictor_ratio": 0.85},
    "switching 100 ms": {
        "overrides": (
            ("behavior.switch_median_seconds", 0.1),
            ("behavior.switch_p99_seconds", 0.2),
        )
    },
    "1 s of states lost each 30 s": {"outages": Outages(30.0, 1.0)},
    "aggregates only": {"fidelity": Fidelity.AGGREGATE},
}
_SOURCES = {
    "engine": ("throttle/simulation/comparison/runs.py",),  # the engine itself: Scene.digest
    "policies": (
        "throttle/simulation/policies/*.py",
        "throttle/control/scoreboard.py",
        "throttle/control/lengths.py",
        "predictors/*.py",
    ),
    "ours": ("throttle/control/*.py", "predictors/*.py"),
    "searches": ("throttle/simulation/comparison/searches.py",),
    "hindsight": (
        "throttle/simulation/comparison/hindsight.py",
        "throttle/simulation/bounds/schedule.py",
    ),
}


@dataclass(frozen=True, slots=True)
class Unit:
    """One figure: a policy, a search or a bound in one cell.

    Attributes:
        group: Table that it belongs to: main, headline, others, ablation, large, or a fault.
        scene: Where.
        load: Share of the goodput.
        seed: The seed.
        kind: A policy's name, best-static or hindsight.
    """

    group: str
    scene: Scene
    load: float
    seed: int
    kind: str

    @property
    def cell(self) -> tuple[str, Scene, float, int]:
        """What its cell's figures share."""
        return (self.group, self.scene, self.load, self.seed)

    @property
    def name(self) -> str:
        """Words for `--only`."""
        draw = "" if self.scene.draw is None else f"-draw-{self.scene.draw}"
        return (
            f"{self.group} {self.scene.plant}{draw} {self.scene.trace} {self.load:g} "
            f"seed-{self.seed} {self.kind}"
        )

    def path(self) -> Path:
        """Where the figure is kept."""
        sources = ["engine", "searches"]
        bundle = ""
        if self.kind.startswith("throttle") and self.kind != "throttllem":
            sources.append("ours")
        elif self.kind == HINDSIGHT:
            sources.append("hindsight")
        elif self.kind not in {"max", "best-static"}:
            sources.append("policies")
        if sources[-1] in {"ours", "policies"}:
            bundle = _bundle_digest(self.scene)
        parts = (
            self.scene.digest(),
            self.scene.predictor_ratio,
            self.scene.outages,
            self.load,
            self.seed,
            self.kind,
            bundle,
            [_source_digest(name) for name in sources],
        )
        return OUT / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"


@functools.cache
def _source_digest(name: str) -> str:
    digest = hashlib.sha256()
    for pattern in _SOURCES[name]:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _bundle_digest(scene: Scene) -> str:
    return hashlib.sha256((scene.bundle_path() / MANIFEST_FILE).read_bytes()).hexdigest()


def all_units(bundles: str, *, quick: bool) -> list[Unit]:
    """Every figure of the document, maximum clock and hindsight left out: they go with cells."""
    plants = PLANTS[:1] if quick else PLANTS
    traces = dict(list(TRACES.items())[:1]) if quick else TRACES
    seeds = (1,) if quick else (1, 2)
    units = []
    for plant, draw in plants:
        for trace, slos in traces.items():
            scene = Scene(plant, trace, draw=draw, slos=slos, bundle=bundles)
            units += [
                Unit("main", scene, load, seed, policy)
                for load in LOADS
                for seed in seeds
                for policy in POLICIES
            ]
    if quick:
        return units
    plant, draw, trace, load = HEADLINE
    headline = Scene(plant, trace, draw=draw, bundle=bundles)
    units += [Unit("main", headline, load, seed, name) for seed in (3, 4, 5) for name in POLICIES]
    units += [Unit("others", headline, load, 1, name) for name in OTHERS]
    units += [
        Unit("ablation", headline, load, 1, name)
        for load in ABLATION_LOADS
        for name in ("throttle", *ABLATION_NAMES)
    ]
    for fault, changes in FAULTS.items():
        units.append(Unit(fault, replace(headline, **changes), load, 1, "throttle"))
    large = Scene("h200-deepseek-v3-ep8", trace, bundle=bundles)
    units += [Unit("large", large, 0.6, 1, name) for name in POLICIES]
    return units


def _goodput(scene: Scene) -> float:
    """Of the scene as it is without faults: every arm of a cell gets the same load."""
    plain = Scene(scene.plant, scene.trace, scene.draw, slos=scene.slos, bundle=scene.bundle)
    return goodput_compression(plain, OUT)


def _spec(unit: Unit) -> RunSpec:
    compression = unit.load * _goodput(unit.scene)
    return RunSpec(unit.scene, unit.kind, unit.load, compression, unit.seed)


def play_goodput(scene: Scene) -> None:
    """Find and keep the goodput of a scene."""
    _goodput(scene)


def play_unit(unit: Unit) -> None:
    """Play one figure and keep it."""
    maximum = replace(unit, kind="max")
    if unit.kind != "max" and not maximum.path().is_file():
        play_unit(maximum)
    spec = _spec(unit)
    record: RunRecord
    equal: RunRecord | None = None
    if unit.kind == "max":
        record = equal = play_run(spec)
    elif unit.kind == "best-static":
        found = best_static(spec, _read(maximum)[0])
        record, equal = found.allowed, found.equal
    elif unit.kind == "trained-static":
        record = equal = _trained(unit, spec)
    else:
        record = equal = play_run(spec)
        wanted = _read(maximum)[0].attainment_ratio - EQUAL_LOSS
        if record.attainment_ratio < wanted:
            equal = equal_attainment(spec, wanted)
    _write(unit, record, equal)


def _trained(unit: Unit, spec: RunSpec) -> RunRecord:
    others = [name for name in TRACES if name != unit.scene.trace]
    specs = []
    for name in others:
        scene = replace(unit.scene, trace=name, slos=TRACES[name])
        specs.append(RunSpec(scene, "max", unit.load, unit.load * _goodput(scene), 0))
    clock = trained_static(specs, [play_run(each) for each in specs])
    record = play_run(replace(spec, policy=f"fixed-{clock}"))
    return replace(record, policy="trained-static", clock_mhz=clock)


def play_hindsight(task: tuple[Unit, Cell]) -> None:
    """Search the schedule in hindsight from a cell's best run, and keep it."""
    unit, cell = task
    start, horizon = best_kept(cell)
    wanted = cell.records["max"].attainment_ratio - EQUAL_LOSS
    record = hindsight_schedule(_spec(unit), start, wanted, horizon)
    _write(unit, record, record)


def _write(unit: Unit, record: RunRecord, equal: RunRecord | None) -> None:
    document = {
        "unit": unit.name,
        "record": dataclasses.asdict(record),
        "equal": None if equal is None else dataclasses.asdict(equal),
    }
    draft = unit.path().with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(document) + "\n", encoding="utf-8")
    draft.replace(unit.path())


def _read(unit: Unit) -> tuple[RunRecord, RunRecord | None]:
    document = json.loads(unit.path().read_text(encoding="utf-8"))
    return _record(document["record"]), document["equal"] and _record(document["equal"])


def _record(fields: dict[str, Any]) -> RunRecord:
    series = tuple((time, clock) for time, clock in fields.pop("clock_series"))
    return RunRecord(**fields, clock_series=series)


def read_cells(units: list[Unit]) -> dict[tuple[str, Scene, float, int], Cell]:
    """Cells of which everything is there, without their schedule in hindsight."""
    by_cell: dict[tuple[str, Scene, float, int], list[Unit]] = {}
    for unit in units:
        by_cell.setdefault(unit.cell, []).append(unit)
    cells = {}
    for key, others in by_cell.items():
        members = [replace(others[0], kind="max"), *others]
        if not all(unit.path().is_file() for unit in members):
            continue
        records: dict[str, RunRecord] = {}
        equal: dict[str, RunRecord | None] = {}
        for unit in members:
            records[unit.kind], equal[unit.kind] = _read(unit)
        cells[key] = Cell(key[2], key[3], records, equal)
    return cells


def with_hindsight(key: tuple[str, Scene, float, int], cell: Cell) -> Cell:
    """The cell with its schedule in hindsight, where there is one, over one horizon."""
    unit = Unit(*key, HINDSIGHT)
    if not unit.path().is_file():
        return on_common_horizon(cell)
    record, _ = _read(unit)
    return on_common_horizon(
        replace(
            cell,
            records={**cell.records, HINDSIGHT: record},
            equal={**cell.equal, HINDSIGHT: record},
        )
    )


def _needs_hindsight(key: tuple[str, Scene, float, int], cell: Cell) -> bool:
    """Whether the search is missing, or some run has become better than it."""
    group, _, _, seed = key
    if group not in {"main", "large"} or seed != 1:
        return False
    unit = Unit(*key, HINDSIGHT)
    if not unit.path().is_file():
        return True
    best, horizon = best_kept(cell)
    found = _read(unit)[0].extended_to(horizon)
    return best.extended_to(horizon).energy_joules < found.energy_joules


def _available(units: list[Unit]) -> list[Unit]:
    """Units whose plant has a bundle; the others are named and left out."""
    missing: dict[str, str] = {}
    kept = []
    for unit in units:
        try:
            unit.scene.bundle_path()
        except PredictorsError as error:
            missing[unit.scene.plant] = str(error)
        else:
            kept.append(unit)
    for plant, why in missing.items():
        print(f"left out: {plant}: {why}", file=sys.stderr)
    return kept


def play(units: list[Unit], jobs: int) -> None:
    """Play what is missing, stage by stage."""
    missing = [unit for unit in units if not unit.path().is_file()]
    # Ours decides at every iteration and searches play often: the longest first.
    order = {"best-static": 0, "throttle": 1}
    missing.sort(key=lambda unit: order.get(unit.kind, 2))
    with LocalProcesses(jobs) if jobs > 1 else InProcess() as executor:
        scenes = list(
            dict.fromkeys(
                Scene(each.plant, each.trace, each.draw, slos=each.slos, bundle=each.bundle)
                for each in (unit.scene for unit in missing)
            )
        )
        executor.map(play_goodput, scenes, Progress("goodput", len(scenes)).done)
        maxima = list(dict.fromkeys(replace(unit, kind="max") for unit in missing))
        maxima = [unit for unit in maxima if not unit.path().is_file()]
        executor.map(play_unit, maxima, Progress("maximum clock", len(maxima)).done)
        executor.map(play_unit, missing, Progress("policies", len(missing)).done)
        tasks = [
            (Unit(*key, HINDSIGHT), cell)
            for key, cell in read_cells(units).items()
            if _needs_hindsight(key, cell)
        ]
        executor.map(play_hindsight, tasks, Progress("hindsight", len(tasks)).done)


def main() -> None:
    """Play what is asked for and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundles", default=str(ROOT / "models"), metavar="DIR")
    parser.add_argument("--only", default="", metavar="A,B", help="words that a cell's name holds")
    parser.add_argument("--quick", action="store_true", help="one plant and trace, one seed")
    parser.add_argument("--tables", action="store_true", help="write the tables, play nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="docs/results.md")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    units = _available(all_units(arguments.bundles, quick=arguments.quick))
    words = [word for word in arguments.only.split(",") if word]
    chosen = [unit for unit in units if all(word in unit.name for word in words)]
    if not arguments.tables:
        play(chosen, arguments.jobs)
    cells = {key: with_hindsight(key, cell) for key, cell in read_cells(units).items()}
    write_tables(arguments.document, cells)
    print(f"{arguments.document}: {len(cells)} cells")


if __name__ == "__main__":
    main()
