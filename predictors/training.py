"""From iteration records to a bundle."""

from __future__ import annotations

import platform
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import xgboost

from predictors.analytic import GPUS, FittedBase, NominalGpu
from predictors.bundle import Bundle, Manifest, write_bundle
from predictors.calibration import CLOCK_BAND_EDGES, PHASES, Calibration, calibrate
from predictors.card import model_card
from predictors.errors import RecordsError
from predictors.evaluation import evaluate, predict_rows
from predictors.features import (
    CLOCK_FEATURE,
    ENVELOPE_FEATURES,
    FEATURES,
    FeatureSpace,
    envelope_columns,
)
from predictors.predictor import fastest_predictor
from predictors.subject import Subject, describe
from predictors.training_rows import TrainingFrame, training_frame
from predictors.training_settings import TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from predictors.dataset import Records

    #: Called with what is fitted ("latency", "power") and the share of it that is done.
    Progress = Callable[[str, float], None]


def train(
    records: Records,
    settings: TrainingSettings | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Train the latency and the power model, and calibrate the bound.

    Args:
        records: Records of one model on one kind of GPU.
        settings: How to train.
        progress: Told about progress.

    Raises:
        RecordsError: If the records are about several models or GPUs, or too few.
    """
    settings = settings or TrainingSettings()
    subject = describe(records)
    frame = training_frame(records, subject.gpu.power_limit_watts)
    parts = _split(frame, settings)
    known = np.isfinite(frame.watts)
    if not (parts["train"] & known).any() or not (parts["validation"] & known).any():
        raise RecordsError("no power in the records; record on a GPU that reports energy")
    space = FeatureSpace(subject.architecture, subject.parallelism, subject.gpu)
    ratios = frame.clocks_mhz / subject.gpu.maximum_clock_mhz
    rows, terms = space.rows(frame.shapes, ratios)
    fitted = parts["train"]
    weights = _weights(frame, ratios)
    base = FittedBase.fit(terms[:, fitted], ratios[fitted], frame.seconds[fitted], weights[fitted])
    base_seconds = base.seconds(base.parts(terms), ratios[:, None])[:, 0]
    reference = float(np.exp(np.mean(np.log(frame.watts[fitted & known]))))
    with np.errstate(invalid="ignore"):
        power_target = np.log(frame.watts / reference)
    # weighed by load for latency alone: power in rare loads decides about little
    latency = _fit(
        "latency", rows, np.log(frame.seconds / base_seconds), weights, parts, settings, progress
    )
    with_power = {name: part & known for name, part in parts.items()}
    ones = np.ones_like(weights)
    power = _fit("power", rows, power_target, ones, with_power, settings, progress)
    bundle = Bundle(
        _manifest(subject, frame, parts, base, reference, settings), bytes(latency), bytes(power)
    )
    return _judged(_calibrated(bundle, frame, parts["calibration"], settings), frame, parts["test"])


def save(bundle: Bundle, directory: Path) -> Path:
    """Write a trained bundle below `directory`, with its card; returns its own directory."""
    card = model_card(bundle.manifest)
    return write_bundle(directory, bundle.manifest, bundle.latency_model, bundle.power_model, card)


def _split(frame: TrainingFrame, settings: TrainingSettings) -> dict[str, NDArray[np.bool_]]:
    """Rows of each part; a run (or block) is in one part only."""
    groups = np.unique(frame.groups)
    names = ("validation", "calibration", "test")
    shares = (settings.validation_ratio, settings.calibration_ratio, settings.test_ratio)
    counts = [max(1, round(share * len(groups))) for share in shares]
    if sum(counts) >= len(groups):
        raise RecordsError(
            f"the records hold {len(frame.seconds)} usable rows in {len(groups)} {frame.grouping}; "
            f"allowed: {sum(counts) + 1} {frame.grouping} or more. Record longer"
        )
    shuffled = np.random.default_rng(settings.seed).permutation(groups)
    parts, start = {}, 0
    for name, count in zip(names, counts, strict=True):
        parts[name] = np.isin(frame.groups, shuffled[start : start + count])
        start += count
    parts["train"] = np.isin(frame.groups, shuffled[start:])
    return parts


def _weights(frame: TrainingFrame, clock_ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights with mean one that keep rare loads from drowning.

    A serving engine decodes thousands of times for each large prompt, yet the prompt decides about
    the time to the first token. Rows in one cell of prompt tokens, decoding requests (both by
    powers of two) and clock band share a weight of one over the root of their number.
    """
    cells = np.column_stack(
        [
            np.ceil(np.log2(frame.shapes[:, 1] + 1.0)),
            np.ceil(np.log2(frame.shapes[:, 3] + 1.0)),
            np.searchsorted(CLOCK_BAND_EDGES, clock_ratios, side="right"),
        ]
    )
    _, cell, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    weights: NDArray[np.float64] = 1.0 / np.sqrt(counts[cell])
    weights /= weights.mean()
    return weights


class _Reporter(xgboost.callback.TrainingCallback):
    """Passes on how many of the trees are fitted."""

    def __init__(self, what: str, trees_count: int, progress: Progress) -> None:
        super().__init__()
        self._what, self._trees_count, self._progress = what, trees_count, progress

    def after_iteration(self, _model: object, epoch: int, _evals_log: object) -> bool:
        self._progress(self._what, (epoch + 1) / self._trees_count)
        return False


def _fit(  # noqa: PLR0917 (private, called twice)
    what: str,
    rows: NDArray[np.float32],
    target: NDArray[np.float64],
    weights: NDArray[np.float64],
    parts: Mapping[str, NDArray[np.bool_]],
    settings: TrainingSettings,
    progress: Progress | None,
) -> bytearray:
    """Fit one model and return its UBJSON."""
    constraints = [0] * len(FEATURES)
    constraints[CLOCK_FEATURE] = -1 if what == "latency" else 1
    parameters = {
        "objective": "reg:squarederror",
        "tree_method": "hist",
        "max_bin": 256,  # keeps every one of about 110 clocks apart
        "max_depth": settings.tree_depth,
        "eta": settings.learning_rate,
        "min_child_weight": settings.minimum_leaf_rows_count,
        "monotone_constraints": "(" + ",".join(map(str, constraints)) + ")",
        "seed": settings.seed,
        "nthread": settings.threads_count,
    }
    trees_count = settings.latency_trees_count if what == "latency" else settings.power_trees_count
    matrices = {
        name: xgboost.DMatrix(
            rows[parts[name]],
            target[parts[name]],
            weight=weights[parts[name]],
            feature_names=list(FEATURES),
            nthread=settings.threads_count or None,
        )
        for name in ("train", "validation")
    }
    booster = xgboost.train(
        parameters,
        matrices["train"],
        num_boost_round=trees_count,
        evals=[(matrices["validation"], "validation")],
        early_stopping_rounds=settings.early_stopping_count,
        verbose_eval=False,
        callbacks=[_Reporter(what, trees_count, progress)] if progress else None,
    )
    best = booster[: booster.best_iteration + 1]
    best.set_attr(best_iteration=None, best_score=None)
    content: bytearray = best.save_raw("ubj")
    return content


def _manifest(  # noqa: PLR0917 (private, called once)
    subject: Subject,
    frame: TrainingFrame,
    parts: Mapping[str, NDArray[np.bool_]],
    base: FittedBase,
    reference_watts: float,
    settings: TrainingSettings,
) -> Manifest:
    """The manifest, with the bound and the metrics still empty."""
    load = envelope_columns(frame.shapes[parts["train"]])
    idle_clocks, idle_watts, idle_source = _idle_power(frame, subject.gpu)
    measured_watts = frame.watts[np.isfinite(frame.watts)]
    zeros: dict[str, tuple[float, ...]] = dict.fromkeys(PHASES, (0.0,))
    none: dict[str, tuple[int, ...]] = dict.fromkeys(PHASES, (0,))
    return Manifest(
        gpu=subject.gpu.name,
        architecture=subject.architecture,
        parallelism=subject.parallelism,
        clocks_mhz=subject.clocks_mhz,
        base_coefficients=base.coefficients,
        reference_watts=reference_watts,
        power_limit_watts=max(subject.gpu.power_limit_watts, float(measured_watts.max())),
        calibration=Calibration(settings.violation_ratio, (), zeros, none),
        idle_clocks_mhz=idle_clocks,
        idle_watts=idle_watts,
        idle_source=idle_source,
        envelope={
            name: (float(load[:, index].min()), float(load[:, index].max()))
            for index, name in enumerate(ENVELOPE_FEATURES)
        },
        envelope_margin_ratio=settings.envelope_margin_ratio,
        provenance=subject.provenance,
        engine=dict(subject.engine),
        data={
            "sha256": frame.data_hash(),
            "rows_count": len(frame.seconds),
            "power_rows_count": len(measured_watts),
            "idle_rows_count": len(frame.idle_watts),
            "dropped_rows_counts": dict(frame.dropped),
            "split_by": frame.grouping,
            "parts_rows_counts": {name: int(part.sum()) for name, part in parts.items()},
            "lowest_clock_mhz": float(frame.clocks_mhz.min()),
            "highest_clock_mhz": float(frame.clocks_mhz.max()),
            "clocks_count": len(np.unique(frame.clocks_mhz)),
        },
        training={
            name: value for name, value in asdict(settings).items() if name != "threads_count"
        },
        metrics={},
        library_versions={
            "numpy": np.__version__,
            "python": platform.python_version(),
            "xgboost": xgboost.__version__,
        },
    )


def _idle_power(
    frame: TrainingFrame, gpu: NominalGpu
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Idle power at the clocks where it was seen, never falling; else the nominal line.

    With one clock only, the nominal line is scaled to meet it.
    """
    ends = np.array([gpu.minimum_clock_mhz, gpu.maximum_clock_mhz], dtype=np.float64)
    nominal = np.array([gpu.parked_power_watts, gpu.idle_power_watts], dtype=np.float64)
    clocks = np.unique(frame.idle_clocks_mhz)
    medians = np.array(
        [np.median(frame.idle_watts[frame.idle_clocks_mhz == clock]) for clock in clocks]
    )
    if len(clocks) >= 2:
        rising = np.maximum.accumulate(medians)
        return tuple(map(float, clocks)), tuple(map(float, rising)), "recorded"
    if len(clocks) == 1:
        nominal *= float(medians[0] / np.interp(clocks[0], ends, nominal))
        return tuple(map(float, ends)), tuple(map(float, nominal)), "nominal, scaled to one clock"
    return tuple(map(float, ends)), tuple(map(float, nominal)), "nominal"


def _calibrated(
    bundle: Bundle,
    frame: TrainingFrame,
    part: NDArray[np.bool_],
    settings: TrainingSettings,
) -> Bundle:
    """The bundle with the bound set on rows that fitting never saw."""
    shapes, clocks = frame.shapes[part], frame.clocks_mhz[part]
    latency, _, _ = predict_rows(fastest_predictor(bundle), shapes, clocks)
    calibration = calibrate(
        np.log(frame.seconds[part] / latency),
        shapes[:, 1] > 0,
        clocks / GPUS[bundle.manifest.gpu].maximum_clock_mhz,
        settings.violation_ratio,
    )
    return replace(bundle, manifest=replace(bundle.manifest, calibration=calibration))


def _judged(bundle: Bundle, frame: TrainingFrame, part: NDArray[np.bool_]) -> Bundle:
    """The bundle with its metrics on rows that neither fitting nor calibration saw."""
    maximum = GPUS[bundle.manifest.gpu].maximum_clock_mhz
    metrics = evaluate(fastest_predictor(bundle), frame.rows(part), maximum)
    return replace(bundle, manifest=replace(bundle.manifest, metrics=metrics))
