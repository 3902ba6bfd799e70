"""The tables of docs/results.md, written between its markers."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from throttle.simulation.comparison.comparing import interval
from throttle.simulation.comparison.hindsight import HINDSIGHT
from throttle.simulation.policies.catalogue import ABLATION_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from throttle.simulation.comparison.comparing import Cell
    from throttle.simulation.comparison.runs import Scene

    Key = tuple[str, Scene, float, int]
    Cells = Mapping[Key, Cell]

_OURS = "throttle"
_TABLED = ("best-static", "throttllem", "ecofreq", "greenllm", "aimd", "mpc", _OURS, HINDSIGHT)
_NONE = "&ndash;"


def write_tables(path: Path, cells: Cells) -> None:
    """Replace what stands between each pair of markers.

    A table stands between `<!-- table: <name> -->` and `<!-- end -->`.
    """
    text = path.read_text(encoding="utf-8")
    for name, build in _TABLES.items():
        marker = f"<!-- table: {name} -->"
        if marker not in text:
            continue
        before, rest = text.split(marker, 1)
        _, after = rest.split("<!-- end -->", 1)
        text = f"{before}{marker}\n{build(cells)}<!-- end -->{after}"
    path.write_text(text, encoding="utf-8")


def _group(cells: Cells, name: str) -> dict[Key, Cell]:
    return {key: cell for key, cell in cells.items() if key[0] == name}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    if len(lines) == 2:
        return "Not played yet.\n"
    return "\n".join(lines) + "\n"


def _plant(scene: Scene) -> str:
    return scene.plant if scene.draw is None else f"{scene.plant}, draw {scene.draw}"


def _trace(scene: Scene) -> str:
    return scene.trace.removesuffix("_10min").replace("_", " ")


def _figure(value: float | None, digits: int = 3) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _energy(cell: Cell, name: str) -> float | None:
    """Energy over maximum clock as played."""
    record = cell.records.get(name)
    return None if record is None else record.energy_joules / cell.records["max"].energy_joules


def _equal(cell: Cell, name: str) -> float | None:
    """Energy over maximum clock at equal attainment."""
    record = cell.equal.get(name)
    return None if record is None else record.energy_joules / cell.records["max"].energy_joules


def _loss(cell: Cell, name: str) -> float | None:
    record = cell.records.get(name)
    if record is None:
        return None
    return 100.0 * (cell.records["max"].attainment_ratio - record.attainment_ratio)


def _over(cell: Cell, other: str) -> float | None:
    """Ours over another at equal attainment."""
    mine, reference = _equal(cell, _OURS), _equal(cell, other)
    return None if mine is None or reference is None else mine / reference


def _best_other(cell: Cell) -> tuple[str, float] | None:
    found = {
        name: ratio
        for name in cell.equal
        if name not in {_OURS, HINDSIGHT, "max"} and (ratio := _equal(cell, name)) is not None
    }
    if not found:
        return None
    name = min(found, key=found.__getitem__)
    return name, found[name]


def _over_best_other(cell: Cell) -> float | None:
    best, mine = _best_other(cell), _equal(cell, _OURS)
    return None if best is None or mine is None else mine / best[1]


def _by_place(cells: Mapping[Key, Cell]) -> dict[tuple[Scene, float], list[Cell]]:
    """Cells of one scene and load, one per seed."""
    found: dict[tuple[Scene, float], list[Cell]] = {}
    for (_, scene, load, _), cell in cells.items():
        found.setdefault((scene, load), []).append(cell)
    return found


def _cells_table(cells: Mapping[Key, Cell]) -> str:
    head = (
        "plant",
        "trace",
        "load",
        "max within %",
        "throttle / max",
        "loss, points",
        "changes/s",
        "at equal attainment",
        "best other (which)",
        "/ best other",
        "/ best static",
        "/ hindsight",
        "hindsight / max",
    )
    rows = []
    for (scene, load), group in _by_place(cells).items():
        best = [each for each in map(_best_other, group) if each is not None]
        names = "/".join(dict.fromkeys(name for name, _ in best))
        rows.append(
            (
                _plant(scene),
                _trace(scene),
                f"{load:g}",
                _figure(_mean(100.0 * c.records["max"].attainment_ratio for c in group), 2),
                _figure(_mean(_energy(cell, _OURS) for cell in group)),
                _figure(_mean(_loss(cell, _OURS) for cell in group), 2),
                _figure(_mean(c.records[_OURS].clock_changes_per_second for c in group), 2),
                _figure(_mean(_equal(cell, _OURS) for cell in group)),
                f"{_figure(_mean(ratio for _, ratio in best))} ({names})" if best else _NONE,
                _figure(_mean(_over_best_other(cell) for cell in group)),
                _figure(_mean(_over(cell, "best-static") for cell in group)),
                _figure(_mean(_over(cell, HINDSIGHT) for cell in group)),
                _figure(_mean(_equal(cell, HINDSIGHT) for cell in group)),
            )
        )
    return _table(head, rows)


def _policies_table(cells: Cells) -> str:
    """Means over plants, traces and seeds, per load and policy."""
    main = _group(cells, "main")
    rows = []
    for load in sorted({key[2] for key in main}):
        group = [cell for key, cell in main.items() if key[2] == load]
        for name in _TABLED:
            played = [cell for cell in group if name in cell.records]
            if not played:
                continue
            losses = [loss for cell in played if (loss := _loss(cell, name)) is not None]
            reached = [each for cell in played if (each := _equal(cell, name)) is not None]
            changes = [cell.records[name].clock_changes_per_second for cell in played]
            rows.append(
                (
                    f"{load:g}",
                    name,
                    _figure(_mean(_energy(cell, name) for cell in played)),
                    _figure(_mean(losses), 2),
                    _figure(max(losses), 2),
                    f"{sum(loss > 0.5 for loss in losses)} of {len(losses)}",
                    _figure(_mean(reached)),
                    f"{len(reached)} of {len(played)}",
                    _figure(_mean(changes), 2),
                )
            )
    return _table(
        (
            "load",
            "policy",
            "energy / max",
            "loss, points",
            "worst loss",
            "not comparable",
            "at equal attainment",
            "reached in",
            "changes/s",
        ),
        rows,
    )


def _goals_table(cells: Cells) -> str:
    main = list(_group(cells, "main").items())
    if not main:
        return _table(("goal",), [])
    places = _by_place(dict(main))
    at = {load: [seeds for key, seeds in places.items() if key[1] == load] for _, load in places}
    light = [seeds for load, group in at.items() if load <= 0.6 for seeds in group]
    everything = list(places.values())
    rows: list[tuple[str, str, str, str, str]] = []

    def row(
        goal: str,
        group: Sequence[Sequence[Cell]],
        figure: Callable[[Cell], float | None],
        bar: tuple[float | None, float | None],
        digits: int = 3,
    ) -> None:
        """Means over seeds first, so that a cell with more of them weighs no more."""
        each = [[value for cell in seeds if (value := figure(cell)) is not None] for seeds in group]
        values = [statistics.fmean(found) for found in each if found]
        if not values:
            rows.append((goal, _NONE, _NONE, "0", "not played"))
            return
        mean, worst = statistics.fmean(values), max(max(found) for found in each if found)
        met = (bar[0] is None or mean <= bar[0]) and (bar[1] is None or worst <= bar[1])
        reached = (_figure(mean, digits), _figure(worst, digits), str(len(values)))
        rows.append((goal, *reached, "yes" if met else "**no**"))

    row("loss <= 0.1 points", everything, lambda c: _loss(c, _OURS), (None, 0.1), 2)
    row(
        "missed <= 0.5 % at load <= 0.6",
        light,
        lambda c: 100.0 * (1.0 - c.records[_OURS].attainment_ratio),
        (None, 0.5),
        2,
    )
    for load, most in ((0.6, 0.62), (0.4, 0.55)):
        goal = f"energy / max, mean <= {most} at {load}"
        row(goal, at.get(load, []), lambda c: _energy(c, _OURS), (most, None))
    row(
        "/ best static, equal attainment, mean <= 0.90, never > 1",
        everything,
        lambda c: _over(c, "best-static"),
        (0.90, 1.0),
    )
    row("/ best other, mean <= 0.95, never > 1", everything, _over_best_other, (0.95, 1.0))
    row("/ hindsight <= 1.08", everything, lambda c: _over(c, HINDSIGHT), (1.08, 1.08))
    row(
        "clock changes per second, mean <= 2",
        everything,
        lambda c: c.records[_OURS].clock_changes_per_second,
        (2.0, None),
        2,
    )
    return _table(("goal", "mean", "worst", "cells", "met"), rows)


def _headline_table(cells: Cells) -> str:
    """The cell with five seeds, with intervals."""
    places = _by_place(_group(cells, "main"))
    group = max(places.values(), key=len, default=[])
    rows = []
    for name in ("max", *_TABLED):
        played = [cell for cell in group if name in cell.records]
        if not played:
            continue
        rows.append(
            (
                name,
                _interval(_energy(cell, name) for cell in played),
                _interval(_equal(cell, name) for cell in played),
                _interval((_loss(cell, name) for cell in played), 2),
                _interval((c.records[name].ttft_p99_seconds * 1e3 for c in played), 0),
                _interval((c.records[name].tpot_p99_seconds * 1e3 for c in played), 1),
                _interval((c.records[name].tbt_p99_seconds * 1e3 for c in played), 1),
                _interval((c.records[name].clock_changes_per_second for c in played), 2),
                str(len(played)),
            )
        )
    head = (
        "policy",
        "energy / max",
        "at equal attainment",
        "loss, points",
        "TTFT p99, ms",
        "TPOT p99, ms",
        "gap p99, ms",
        "changes/s",
        "seeds",
    )
    return _table(head, rows)


def _interval(values: Iterable[float | None], digits: int = 3) -> str:
    found = interval(value for value in values if value is not None)
    if found is None:
        return _NONE
    half = found["half_width"]
    text = _figure(found["mean"], digits)
    return text if half is None else f"{text} &plusmn; {half:.{digits}f}"


def _others_table(cells: Cells) -> str:
    """Every other baseline, in the headline cell."""
    rows = [
        (
            name,
            _figure(_energy(cell, name)),
            _figure(_loss(cell, name), 2),
            _figure(_equal(cell, name)),
            _figure(cell.records[name].clock_changes_per_second, 2),
        )
        for cell in _group(cells, "others").values()
        for name in cell.records
    ]
    return _table(
        ("policy", "energy / max", "loss, points", "at equal attainment", "changes/s"), rows
    )


def _faults_table(cells: Cells) -> str:
    plain = [
        cell
        for key, cell in _group(cells, "main").items()
        for fault in cells
        if fault[0] not in _GROUPS
        and (key[1].plant, key[1].trace, key[1].draw, key[2], key[3])
        == (fault[1].plant, fault[1].trace, fault[1].draw, fault[2], fault[3])
    ]
    usual = _loss(plain[0], _OURS) if plain else None
    rows = []
    for key, cell in cells.items():
        if key[0] in _GROUPS:
            continue
        loss = _loss(cell, _OURS)
        more = None if loss is None or usual is None else loss - usual
        met = _NONE if more is None else ("yes" if more <= 0.3 else "**no**")
        rows.append(
            (key[0], _figure(_energy(cell, _OURS)), _figure(loss, 2), _figure(more, 2), met)
        )
    return _table(
        ("fault", "energy / max", "loss, points", "more than without", "<= 0.3 points"), rows
    )


def _ablation_table(cells: Cells) -> str:
    """Ours with each objective, over loads."""
    found = _group(cells, "ablation")
    names = (_OURS, *ABLATION_NAMES)
    rows = []
    for key, cell in sorted(found.items(), key=lambda item: item[0][2]):
        ratios = {name: _energy(cell, name) for name in names}
        least = min(value for value in ratios.values() if value is not None)
        ours = ratios[_OURS]
        rows.append(
            (
                f"{key[2]:g}",
                *(f"{_figure(ratios[name])} ({_figure(_loss(cell, name), 2)})" for name in names),
                _NONE if ours is None else _figure(ours / least),
            )
        )
    titles = (name.removeprefix(f"{_OURS}-") if name != _OURS else "long-run" for name in names)
    return _table(("load", *titles, "long-run / best"), rows)


#: Groups that are no faults.
_GROUPS = {"main", "others", "ablation", "large"}
_TABLES: dict[str, Callable[[Cells], str]] = {
    "goals": _goals_table,
    "policies": _policies_table,
    "cells": lambda cells: _cells_table(_group(cells, "main")),
    "headline": _headline_table,
    "others": _others_table,
    "faults": _faults_table,
    "ablation": _ablation_table,
    "large": lambda cells: _cells_table(_group(cells, "large")),
}
