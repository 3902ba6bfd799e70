"""`throttle plant calibrate`: the plant's errors against measured and published figures."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from throttle.errors import InvalidInputError
from throttle.simulation.anchors import clock_comparisons, iteration_comparisons
from throttle.simulation.benchmark import GPUS
from throttle.simulation.calibration import (
    OperatorError,
    operator_errors,
    skewed_errors,
    verdicts,
)

if TYPE_CHECKING:
    import argparse

    from throttle.simulation.anchors import Comparison


_START = "<!-- calibrate: start -->"
_END = "<!-- calibrate: end -->"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "calibrate",
        help="recompute the plant's errors against measured operators and published figures",
        description="Hold out one measured shape after the other, predict it from the rest, and "
        "print the errors; then compare whole iterations and clock sweeps with published figures. "
        "Takes about two minutes.",
    )
    parser.add_argument(
        "--measured", type=Path, required=True, help="folder with the measured operator tables"
    )
    parser.add_argument("--json", type=Path, help="file for all figures as JSON")
    parser.add_argument(
        "--markdown", type=Path, metavar="F", help="Markdown file whose block of tables is renewed"
    )
    parser.add_argument(
        "--gpu", action="append", choices=sorted(GPUS), help="only this GPU; may be repeated"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Recompute and print; 0 when every bar and tolerance is kept, else 1."""
    gpus = arguments.gpu or list(GPUS)
    errors = [error for gpu in gpus for error in operator_errors(arguments.measured, gpu)]
    skewed = [error for gpu in gpus for error in skewed_errors(arguments.measured, gpu)]
    iterations, clocks = list(iteration_comparisons()), list(clock_comparisons())
    bars = verdicts(errors)
    text = "\n\n".join(
        [
            _table(
                ["bar", "GPU", "allowed", "reached", "kept"],
                [
                    [b.name, b.gpu, _percent(b.allowed), _percent(b.reached), _yes(b.is_kept)]
                    for b in bars
                ],
            ),
            _operators(errors),
            _table(
                ["GPU", "MoE", "routing", "error"],
                [[e.gpu, e.weight_dtype, e.distribution, _percent(e.error)] for e in skewed],
            ),
            _comparisons(iterations),
            f"Mean absolute error: {_percent(_mean(iterations))}.",
            _comparisons(clocks),
            f"Mean absolute error: {_percent(_mean(clocks))}.",
        ]
    )
    print(text)
    if arguments.markdown:
        _renew(arguments.markdown, text)
    if arguments.json:
        document = {
            "provenance": "simulated against measured (operators) and published (anchors)",
            "bars": [dataclasses.asdict(bar) | {"is_kept": bar.is_kept} for bar in bars],
            "operators": [_numbers(dataclasses.asdict(error)) for error in errors],
            "skewed_moe": [dataclasses.asdict(error) for error in skewed],
            "iterations": [_comparison(item) for item in iterations],
            "iterations_mean_absolute_error": _mean(iterations),
            "clocks": [_comparison(item) for item in clocks],
            "clocks_mean_absolute_error": _mean(clocks),
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    kept = [bar.is_kept for bar in bars] + [item.is_kept for item in (*iterations, *clocks)]
    return 0 if all(kept) else 1


def _renew(path: Path, text: str) -> None:
    """Replace what stands between the two marks of a file; a new file holds nothing else."""
    block = f"{_START}\n\n{text}\n\n{_END}"
    held = path.read_text(encoding="utf-8") if path.is_file() else f"{_START}{_END}\n"
    before, found, rest = held.partition(_START)
    after = rest.partition(_END)[2]
    if not found or _END not in rest:
        raise InvalidInputError(
            "--markdown", path.name, f"a new file, or one with the lines {_START} and {_END}"
        )
    path.write_text(before + block + after, encoding="utf-8")


def _operators(errors: list[OperatorError]) -> str:
    header = [
        "GPU", "operator", "rows", "held out", "equation alone", "in table", "between points",
        "worst shape", "capped",
    ]  # fmt: skip
    return _table(
        header,
        [
            [
                e.gpu, e.operator, str(e.rows_count), _percent(e.held_out_error),
                _percent(e.equation_error), _percent(e.in_table_error),
                _percent(e.between_points_error),
                f"{e.worst_group} {_percent(e.worst_group_error)}" if e.worst_group else "-",
                _percent(e.capped_share),
            ]
            for e in errors
        ],
    )  # fmt: skip


def _comparisons(items: list[Comparison]) -> str:
    return _table(
        ["subject", "quantity", "published", "simulated", "error", "tolerance", "status", "kept"],
        [
            [
                i.subject, i.quantity, f"{i.published:.4g}", f"{i.simulated:.4g}",
                f"{i.error * 100:+.1f} %", _percent(i.tolerance), i.status, _yes(i.is_kept),
            ]
            for i in items
        ],
    )  # fmt: skip


def _comparison(item: Comparison) -> dict[str, Any]:
    return dataclasses.asdict(item) | {"is_kept": item.is_kept}


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what could not be held out is null."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in values.items()
    }


def _mean(items: list[Comparison]) -> float:
    return sum(abs(item.error) for item in items) / len(items)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value * 100:.1f} %"


def _yes(kept: bool) -> str:  # noqa: FBT001 - a cell of a table
    return "yes" if kept else "NO"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
