"""`throttle-predictors`: train, evaluate and inspect bundles."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from predictors import routed_experts
from predictors.bundle import load_bundle, resolve_bundle
from predictors.errors import PredictorsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from predictors.bundle import Bundle
    from predictors.fitting import Progress, Trainer
    from predictors.generic_training import SubjectRows
    from predictors.predictor import BundlePredictor
    from predictors.training_rows import TrainingFrame
    from predictors.training_settings import TrainingSettings


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
    train.add_argument(
        "--schema",
        choices=["records", "simple"],
        default="records",
        help="simple: a table with gpu, phase, clock_mhz, batch, context_tokens, latency_seconds "
        "and power_watts",
    )
    train.add_argument(
        "--generic",
        action="store_true",
        help="train one bundle for models that the records do not hold",
    )
    train.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="N",
        help="try N settings around the given ones first and keep the best (needs optuna)",
    )
    train.add_argument(
        "--dask",
        default="",
        metavar="SCHEDULER",
        help="grow the trees on the workers of this Dask scheduler",
    )
    train.add_argument(
        "--provenance",
        choices=["measured", "simulated"],
        default="measured",
        help="where a simple table comes from; records say it themselves",
    )
    train.set_defaults(run=_train)
    evaluate = commands.add_parser("evaluate", help="judge a bundle on iteration records")
    evaluate.add_argument("--bundle", required=True, type=Path, metavar="DIR")
    evaluate.add_argument("--data", nargs="+", required=True, type=Path, metavar="PATH")
    evaluate.add_argument("--schema", choices=["records", "simple"], default="records")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    evaluate.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    evaluate.set_defaults(run=_evaluate)
    inspect = commands.add_parser("inspect", help="show what a bundle is")
    inspect.add_argument("bundle", type=Path, metavar="DIR")
    inspect.set_defaults(run=_inspect)
    routed_experts.add_parser(commands)
    return parser


def _train(options: argparse.Namespace) -> None:
    # the training half is imported here: inspecting a bundle needs none of it
    from predictors.fitting import LocalTrainer  # noqa: PLC0415
    from predictors.training import save  # noqa: PLC0415
    from predictors.training_settings import TrainingSettings  # noqa: PLC0415

    settings = TrainingSettings()
    if options.config:
        settings = TrainingSettings.from_toml(options.config.read_text("utf-8"))
    with contextlib.ExitStack() as stack:
        trainer: Trainer = LocalTrainer(settings.threads_count)
        if options.dask:
            from predictors.dask_training import DaskTrainer  # noqa: PLC0415

            trainer = stack.enter_context(DaskTrainer(options.dask))
        for bundle in _trained(options, settings, trainer):
            path = save(bundle, options.out)
            data = bundle.manifest.data
            print(f"bundle      {path}")
            print(f"rows        {data['rows_count']} iterations, {data['idle_rows_count']} idle")
            for reason, count in data["dropped_rows_counts"].items():
                if count:
                    print(f"left out    {count}: {reason}")
            _print_figures(bundle.manifest.metrics, "rows left out, " + bundle.manifest.provenance)


def _trained(
    options: argparse.Namespace, settings: TrainingSettings, trainer: Trainer
) -> Iterator[Bundle]:
    from predictors.dataset import read_records  # noqa: PLC0415
    from predictors.generic_training import train_generic  # noqa: PLC0415
    from predictors.training import train  # noqa: PLC0415

    if options.schema == "simple":
        if options.generic or options.search or options.dask:
            raise PredictorsError(
                "--schema simple is given with --generic, --search or --dask; allowed: alone. A "
                "few hundred rows need none of them"
            )
        from predictors.table import read_tables  # noqa: PLC0415
        from predictors.table_training import train_table  # noqa: PLC0415

        for table in read_tables(options.data):
            yield train_table(table, settings, options.provenance)
        return
    with _progress() as progress:
        if options.generic:
            yield train_generic(_subjects(options.data), settings, progress, trainer)
            return
        records = read_records(options.data)
        if options.search:
            from predictors.search import search  # noqa: PLC0415

            settings = search(records, settings, options.search, trainer)
        yield train(records, settings, progress, trainer)


def _subjects(paths: Sequence[Path]) -> list[SubjectRows]:
    """One set of records for each folder given, or for each folder below the only one."""
    from predictors.dataset import read_records  # noqa: PLC0415
    from predictors.generic_training import SubjectRows  # noqa: PLC0415

    if len(paths) == 1 and paths[0].is_dir():
        paths = sorted(path for path in paths[0].iterdir() if path.is_dir()) or paths
    return [SubjectRows.of(read_records([path])) for path in paths]


def _evaluate(options: argparse.Namespace) -> None:
    from predictors.evaluation import evaluate  # noqa: PLC0415

    path = resolve_bundle(options.bundle)
    predictor, frame, provenance = (
        _table_rows(path, options.data)
        if options.schema == "simple"
        else _record_rows(path, options.data)
    )
    document = evaluate(predictor, frame)
    document["details"] |= {"bundle": predictor.manifest.name, "provenance": provenance}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
    if options.html:
        from predictors.report import write_report  # noqa: PLC0415

        options.html.parent.mkdir(parents=True, exist_ok=True)
        write_report(options.html, load_bundle(path), predictor, frame, document)
    _print_figures(document, f"all rows, {provenance}")


def _table_rows(path: Path, data: Sequence[Path]) -> tuple[BundlePredictor, TrainingFrame, str]:
    from predictors.predictor import load_predictor  # noqa: PLC0415
    from predictors.table import read_tables  # noqa: PLC0415
    from predictors.table_training import table_frame  # noqa: PLC0415

    predictor = load_predictor(path)
    manifest = predictor.manifest
    if manifest.kind != "table":
        raise PredictorsError(
            f"bundle {manifest.name} is of kind {manifest.kind}; allowed for --schema simple: a "
            "bundle trained with --schema simple"
        )
    tables = {table.gpu: table for table in read_tables(data)}
    if manifest.gpu not in tables:
        raise PredictorsError(
            f"gpu of the table is {', '.join(tables)}; the bundle allows only {manifest.gpu}"
        )
    return predictor, table_frame(tables[manifest.gpu]), manifest.provenance


def _record_rows(path: Path, data: Sequence[Path]) -> tuple[BundlePredictor, TrainingFrame, str]:
    from predictors.dataset import read_records  # noqa: PLC0415
    from predictors.predictor import Engine, load_predictor  # noqa: PLC0415
    from predictors.subject import describe  # noqa: PLC0415
    from predictors.training_rows import training_frame  # noqa: PLC0415

    manifest = load_bundle(path).manifest
    if manifest.kind == "table":
        raise PredictorsError(
            f"bundle {manifest.name} was trained on a table; add --schema simple and give one"
        )
    records = read_records(data)
    subject = describe(records)
    seen = (subject.gpu.name, subject.architecture.name, subject.parallelism)
    made = (manifest.gpu, manifest.architecture and manifest.architecture.name)
    if manifest.kind == "model" and seen != (*made, manifest.parallelism):
        raise PredictorsError(
            f"the records are of {seen}; the bundle allows only {(*made, manifest.parallelism)}"
        )
    engine = Engine(subject.gpu.name, subject.architecture, subject.parallelism, subject.clocks_mhz)
    frame = training_frame(records, subject.gpu.power_limit_watts)
    return load_predictor(path, engine), frame, subject.provenance


def _inspect(options: argparse.Namespace) -> None:
    bundle = load_bundle(resolve_bundle(options.bundle))
    manifest = bundle.manifest
    size = len(bundle.latency_model) + len(bundle.power_model)
    clocks = manifest.clocks_mhz
    print(f"bundle      {manifest.name}")
    print(f"kind        {manifest.kind}")
    print(f"provenance  {manifest.provenance}")
    if clocks:
        print(f"clocks      {len(clocks)} from {clocks[0]} to {clocks[-1]} MHz")
    skew = manifest.routing.skew_exponent
    print(
        f"experts     {manifest.active_experts_source}"
        + (f", skew exponent {skew:g}" if skew else "")
    )
    print(f"rows        {manifest.data['rows_count']}, split by {manifest.data['split_by']}")
    if manifest.idle_watts:
        print(
            f"idle power  {manifest.idle_watts[0]:.0f} to {manifest.idle_watts[-1]:.0f} W, "
            f"{manifest.idle_source}"
        )
    print(f"models      {size / 1e6:.2f} MB")
    for name, (low, high) in manifest.envelope.items():
        print(f"covers      {name} {low:g} to {high:g}")
    _print_figures(manifest.metrics, "rows left out")


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
