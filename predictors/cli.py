"""`throttle-predictors`: train, evaluate and inspect bundles."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from predictors.analytic import gpu_by_name
from predictors.bundle import load_bundle
from predictors.errors import PredictorsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from predictors.training import Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 1 after an error that was printed to stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except PredictorsError as error:
        print(f"throttle-predictors: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"throttle-predictors: {error.filename or 'file'}: {error.strerror or error}; "
            "check the path and its permissions",
            file=sys.stderr,
        )
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="throttle-predictors",
        description="Train, evaluate and inspect latency and power predictors.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a bundle from iteration records")
    train.add_argument(
        "--data",
        nargs="+",
        required=True,
        type=Path,
        metavar="PATH",
        help="record files (.parquet, .csv) or directories of them",
    )
    train.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="directory that bundles stand in"
    )
    train.add_argument("--config", type=Path, metavar="TOML", help="training settings")
    train.set_defaults(run=_train)
    evaluate = commands.add_parser("evaluate", help="judge a bundle on iteration records")
    evaluate.add_argument("--bundle", required=True, type=Path, metavar="DIR")
    evaluate.add_argument("--data", nargs="+", required=True, type=Path, metavar="PATH")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    evaluate.set_defaults(run=_evaluate)
    inspect = commands.add_parser("inspect", help="show what a bundle is")
    inspect.add_argument("bundle", type=Path, metavar="DIR")
    inspect.set_defaults(run=_inspect)
    return parser


def _train(options: argparse.Namespace) -> None:
    # the training half is imported here: inspecting a bundle needs none of it
    from predictors.dataset import read_records  # noqa: PLC0415
    from predictors.training import save, train  # noqa: PLC0415
    from predictors.training_settings import TrainingSettings  # noqa: PLC0415

    settings = TrainingSettings()
    if options.config:
        settings = TrainingSettings.from_toml(options.config.read_text("utf-8"))
    records = read_records(options.data)
    with _progress() as progress:
        bundle = train(records, settings, progress)
    path = save(bundle, options.out)
    data = bundle.manifest.data
    print(f"bundle      {path}")
    print(f"rows        {data['rows_count']} iterations, {data['idle_rows_count']} idle")
    for reason, count in data["dropped_rows_counts"].items():
        if count:
            print(f"left out    {count}: {reason}")
    _print_figures(bundle.manifest.metrics, "test part, " + bundle.manifest.provenance)


def _evaluate(options: argparse.Namespace) -> None:
    from predictors.dataset import read_records  # noqa: PLC0415
    from predictors.evaluation import evaluate  # noqa: PLC0415
    from predictors.predictor import load_predictor  # noqa: PLC0415
    from predictors.subject import describe  # noqa: PLC0415
    from predictors.training_rows import training_frame  # noqa: PLC0415

    predictor = load_predictor(options.bundle)
    manifest = predictor.manifest
    records = read_records(options.data)
    subject = describe(records)
    seen = (subject.gpu.name, subject.architecture.name, subject.parallelism)
    made = (manifest.gpu, manifest.architecture.name, manifest.parallelism)
    if seen != made:
        raise PredictorsError(f"the records are of {seen}; the bundle allows only {made}")
    gpu = gpu_by_name(manifest.gpu)
    frame = training_frame(records, gpu.power_limit_watts)
    document = evaluate(predictor, frame, gpu.maximum_clock_mhz)
    document |= {"bundle": manifest.name, "provenance": subject.provenance}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
    _print_figures(document, f"all rows, {subject.provenance}")


def _inspect(options: argparse.Namespace) -> None:
    bundle = load_bundle(options.bundle)
    manifest = bundle.manifest
    size = len(bundle.latency_model) + len(bundle.power_model)
    clocks = manifest.clocks_mhz
    print(f"bundle      {manifest.name}")
    print(f"provenance  {manifest.provenance}")
    print(f"clocks      {len(clocks)} from {clocks[0]} to {clocks[-1]} MHz")
    print(f"rows        {manifest.data['rows_count']}, split by {manifest.data['split_by']}")
    print(
        f"idle power  {manifest.idle_watts[0]:.0f} to {manifest.idle_watts[-1]:.0f} W, "
        f"{manifest.idle_source}"
    )
    print(f"models      {size / 1e6:.2f} MB")
    for name, (low, high) in manifest.envelope.items():
        print(f"covers      {name} {low:g} to {high:g}")
    _print_figures(manifest.metrics, "test part")


def _print_figures(document: dict[str, Any] | Any, where: str) -> None:  # noqa: ANN401 (JSON)
    power = document["power_mape_ratio"]
    r2 = document["latency_r2_ratio"]
    print(f"latency     {document['latency_mape_ratio']:.2%} mean absolute error ({where})")
    print(f"power       {'unknown' if power is None else f'{power:.2%}'} mean absolute error")
    print(f"R2          {'unknown' if r2 is None else f'{r2:.4f}'} of latency")
    print(
        f"bound       holds for {document['coverage_ratio']:.2%} of {document['rows_count']} rows"
    )


@contextlib.contextmanager
def _progress() -> Iterator[Progress | None]:
    """Bars on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 (only for people who watch)
    from rich.progress import Progress as Bars  # noqa: PLC0415

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks = {what: bars.add_task(what, total=1.0) for what in ("latency", "power")}
        yield lambda what, share: bars.update(tasks[what], completed=share)
