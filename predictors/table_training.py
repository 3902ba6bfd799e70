"""From another tool's table to a bundle: a base of counts, few and shallow trees."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from predictors.active_experts import Routing
from predictors.bundle import Bundle, Manifest
from predictors.calibration import calibrate, phases_of
from predictors.errors import RecordsError
from predictors.evaluation import judged, predict_rows
from predictors.fitting import FittingRows, LocalTrainer, fit
from predictors.predictor import fastest_predictor
from predictors.table import TableSpace
from predictors.training import (
    data_description,
    envelope,
    fitting_rows,
    library_versions,
    no_margins,
    settings_description,
)
from predictors.training_rows import TrainingFrame
from predictors.training_settings import TrainingSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from predictors.fitting import Fitted
    from predictors.table import Table

#: Folds of the cross-fitting, and fewest rows that can be split so.
_FOLDS_COUNT = 5
_LEAST_ROWS_COUNT = 20

#: Numbers of trees that cross-fitting chooses from. One small tree is next to none.
_TREES_COUNTS = (1, 10, 30, 60)

#: What a few hundred rows bear, whatever the settings for records of a hundred thousand say.
_TREE_DEPTH = 3
_LEARNING_RATE = 0.1

#: Idle power of a GPU that nobody measured idle: this share of the least power in the table.
_IDLE_RATIO = 0.5


def table_frame(table: Table) -> TrainingFrame:
    """The rows as evaluation and splits want them; groups are folds of whole clocks."""
    clocks = np.unique(table.clocks_mhz)
    rows_count = len(table.seconds)
    if len(clocks) >= _FOLDS_COUNT:
        groups = np.searchsorted(clocks, table.clocks_mhz) % _FOLDS_COUNT
        grouping = f"clocks, cross-fitted in {_FOLDS_COUNT} folds"
    else:
        groups = np.arange(rows_count) % _FOLDS_COUNT
        grouping = f"rows, cross-fitted in {_FOLDS_COUNT} folds"
    return TrainingFrame(
        table.shapes,
        table.clocks_mhz,
        table.seconds,
        table.watts,
        groups.astype(np.int64),
        np.full(rows_count, np.nan),
        np.zeros(0),
        np.zeros(0),
        {},
        grouping,
    )


def train_table(
    table: Table, settings: TrainingSettings | None = None, provenance: str = "measured"
) -> Bundle:
    """Train on one GPU's rows.

    Every fifth clock is left out in turn; errors there choose the number of trees, set the bound
    and are the metrics. The bundle itself then learns from all rows.

    Args:
        table: The rows.
        settings: How to train; trees are fewer and shallower than it says.
        provenance: "measured" or "simulated", for the card.

    Raises:
        RecordsError: If the rows are too few, or none has power.
    """
    settings = settings or TrainingSettings()
    frame = table_frame(table)
    rows_count = len(frame.seconds)
    if rows_count < _LEAST_ROWS_COUNT:
        raise RecordsError(
            f"the table holds {rows_count} rows of {table.gpu}; allowed: {_LEAST_ROWS_COUNT} or "
            "more"
        )
    if np.count_nonzero(np.isfinite(frame.watts)) < _LEAST_ROWS_COUNT:
        raise RecordsError(
            f"power_watts of {table.gpu} is empty in all but few rows; allowed: "
            f"{_LEAST_ROWS_COUNT} rows with power or more"
        )
    settings = replace(
        settings,
        tree_depth=min(settings.tree_depth, _TREE_DEPTH),
        learning_rate=min(settings.learning_rate, _LEARNING_RATE),
    )
    maximum = float(frame.clocks_mhz.max())
    rows = fitting_rows(frame, TableSpace(), maximum)
    settings = _with_best_trees(table, frame, rows, settings)
    latency, power = _outside(table, frame, rows, settings)
    bundle = _bundle(table, frame, _fitted(frame, rows, settings), settings, provenance)
    ratios = frame.clocks_mhz / maximum
    phases = phases_of(frame.shapes)
    calibration = calibrate(
        np.log(frame.seconds / latency),
        phases,
        ratios,
        # fewer rows than the rate needs: the largest error seen, and the rate that this gives
        max(settings.violation_ratio, 1.0 / (rows_count + 1.0)),
    )
    margins = calibration.factors(ratios)[phases, np.arange(rows_count)]
    metrics = judged(
        frame, maximum, latency, latency * margins, power, np.ones(rows_count, dtype=bool)
    )
    manifest = replace(bundle.manifest, calibration=calibration, metrics=metrics)
    return replace(bundle, manifest=manifest)


def _fitted(frame: TrainingFrame, rows: FittingRows, settings: TrainingSettings) -> Fitted:
    return fit(rows, None, settings, "table", float(np.nanmax(frame.watts)), LocalTrainer(1))


def _outside(
    table: Table, frame: TrainingFrame, rows: FittingRows, settings: TrainingSettings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latency and power of each row, predicted without the rows of its fold."""
    latency, power = np.empty(len(frame.seconds)), np.empty(len(frame.seconds))
    for fold in np.unique(frame.groups):
        left_out = frame.groups == fold
        fitted = _fitted(frame, rows.part(~left_out), settings)
        predictor = fastest_predictor(_bundle(table, frame, fitted, settings, ""))
        found = predict_rows(predictor, frame.shapes[left_out], frame.clocks_mhz[left_out])
        latency[left_out], _, power[left_out] = found
    return latency, power


def _with_best_trees(
    table: Table, frame: TrainingFrame, rows: FittingRows, settings: TrainingSettings
) -> TrainingSettings:
    """The settings with the number of trees, of each model, that errs least outside its folds."""
    known = np.isfinite(frame.watts)
    errors: dict[str, dict[int, float]] = {"latency": {}, "power": {}}
    for count in _TREES_COUNTS:
        tried = replace(settings, latency_trees_count=count, power_trees_count=count)
        latency, power = _outside(table, frame, rows, tried)
        errors["latency"][count] = float(np.mean(np.abs(np.log(latency / frame.seconds))))
        errors["power"][count] = float(np.mean(np.abs(np.log(power / frame.watts)[known])))
    latency_trees, power_trees = (min(tried, key=tried.__getitem__) for tried in errors.values())
    return replace(settings, latency_trees_count=latency_trees, power_trees_count=power_trees)


def _bundle(
    table: Table, frame: TrainingFrame, fitted: Fitted, settings: TrainingSettings, provenance: str
) -> Bundle:
    """The bundle, with the bound and the metrics still empty."""
    least = _IDLE_RATIO * float(np.nanmin(frame.watts))
    clocks = sorted({round(clock) for clock in frame.clocks_mhz})
    whole = np.ones(len(frame.seconds), dtype=bool)
    manifest = Manifest(
        kind="table",
        name=f"{table.slug}__table",
        gpu=table.gpu,
        maximum_clock_mhz=float(frame.clocks_mhz.max()),
        architecture=None,
        parallelism=None,
        routing=Routing(),
        clocks_mhz=tuple(clocks),
        base_coefficients=fitted.base.coefficients,
        power_coefficients=fitted.power_base.coefficients,
        by_gpu={},
        power_limit_watts=float(np.nanmax(frame.watts)),
        calibration=no_margins(settings),
        idle_clocks_mhz=(float(clocks[0]), float(clocks[-1])),
        idle_watts=(least, least),
        idle_source=f"unknown: {_IDLE_RATIO:.0%} of the least power in the table",
        envelope=envelope(frame.shapes),
        envelope_margin_ratio=settings.envelope_margin_ratio,
        provenance=provenance,
        engine={},
        data=data_description(frame, {"cross-fitted": whole}),
        training=settings_description(settings),
        metrics={},
        library_versions=library_versions(),
    )
    return Bundle(manifest, fitted.latency_model, fitted.power_model)
