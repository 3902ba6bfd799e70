"""From iteration records of one model on one kind of GPU to a bundle."""

from __future__ import annotations

import platform
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import xgboost

from predictors.active_experts import Routing, chosen_skew, fit_reported_skew, skews_to_try
from predictors.bundle import Bundle, Manifest, bundle_name, write_bundle
from predictors.calibration import PHASES, Calibration, calibrate, phases_of
from predictors.card import model_card
from predictors.errors import RecordsError
from predictors.evaluation import evaluate, predict_rows
from predictors.features import ENVELOPE_FEATURES, FeatureSpace, envelope_columns, rows_at
from predictors.fitting import (
    FittingRows,
    LocalTrainer,
    balancing_weights,
    base_seconds,
    fit,
    fit_base,
)
from predictors.prediction import SHAPE_COLUMNS
from predictors.predictor import fastest_predictor
from predictors.subject import Subject, describe
from predictors.training_rows import TrainingFrame, supported_clocks, training_frame
from predictors.training_settings import TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from predictors.analytic import NominalGpu
    from predictors.dataset import Records
    from predictors.features import Space
    from predictors.fitting import Progress, Trainer

#: Rows that the choice of a routing skew looks at.
_SKEW_ROWS_COUNT = 3000

_DECODE_KV_COLUMN = SHAPE_COLUMNS.index("decode_kv_tokens")

#: A clock this much below the lowest one recorded is still a candidate.
_CLOCK_REACH_RATIO = 0.15


def train(
    records: Records,
    settings: TrainingSettings | None = None,
    progress: Progress | None = None,
    trainer: Trainer | None = None,
) -> Bundle:
    """Train the latency and the power model, and calibrate the bound.

    Args:
        records: Records of one model on one kind of GPU.
        settings: How to train.
        progress: Told about progress.
        trainer: What grows the trees; this process if None.

    Raises:
        RecordsError: If the records are about several models or GPUs, or too few.
    """
    settings = settings or TrainingSettings()
    subject = describe(records)
    frame = training_frame(records, subject.gpu.power_limit_watts)
    return train_frame(frame, subject, settings, split(frame, settings), progress, trainer)


def train_frame(  # noqa: PLR0917 (each is one thing that callers name)
    frame: TrainingFrame,
    subject: Subject,
    settings: TrainingSettings,
    parts: Mapping[str, NDArray[np.bool_]],
    progress: Progress | None = None,
    trainer: Trainer | None = None,
    routing: Routing | None = None,
) -> Bundle:
    """Train on given parts of a frame: "train", "validation", "calibration" and "test".

    The routing is found from the rows unless it is given. Other arguments are those of `train`.

    Raises:
        RecordsError: If no row has power.
    """
    known = np.isfinite(frame.watts)
    if not (parts["train"] & known).any() or not (parts["validation"] & known).any():
        raise RecordsError("no power in the records; record on a GPU that reports energy")
    routing = routing or fit_routing(frame.rows(parts["train"]), subject)
    space = FeatureSpace(subject.architecture, subject.parallelism, subject.gpu, routing)
    rows = fitting_rows(frame, space, subject.gpu.maximum_clock_mhz)
    limit = max(subject.gpu.power_limit_watts, float(np.nanmax(frame.watts)))
    fitted = fit(
        rows.part(parts["train"]),
        rows.part(parts["validation"]),
        settings,
        "model",
        limit,
        trainer or LocalTrainer(settings.threads_count),
        progress,
    )
    supported = supported_clocks(frame).values()
    lowest = max((low for low, _ in supported), default=float(frame.clocks_mhz.min()))
    lowest *= 1.0 - _CLOCK_REACH_RATIO
    idle_clocks, idle_watts, idle_source = idle_power(frame, subject.gpu)
    manifest = Manifest(
        kind="model",
        name=bundle_name(subject.gpu.name, subject.architecture.name, subject.parallelism),
        gpu=subject.gpu.name,
        maximum_clock_mhz=float(subject.gpu.maximum_clock_mhz),
        architecture=subject.architecture,
        parallelism=subject.parallelism,
        routing=routing,
        clocks_mhz=tuple(clock for clock in subject.clocks_mhz if clock >= lowest),
        base_coefficients=fitted.base.coefficients,
        power_coefficients=fitted.power_base.coefficients,
        by_gpu={},
        power_limit_watts=limit,
        calibration=no_margins(settings),
        idle_clocks_mhz=idle_clocks,
        idle_watts=idle_watts,
        idle_source=idle_source,
        envelope=envelope(frame.shapes[parts["train"]]),
        envelope_margin_ratio=settings.envelope_margin_ratio,
        provenance=subject.provenance,
        engine=dict(subject.engine),
        data=data_description(frame, parts),
        training=settings_description(settings),
        metrics={},
        library_versions=library_versions(),
    )
    bundle = Bundle(manifest, fitted.latency_model, fitted.power_model)
    return _judged(_calibrated(bundle, frame, parts["calibration"], settings), frame, parts["test"])


def fitting_rows(frame: TrainingFrame, space: Space, maximum_clock_mhz: float) -> FittingRows:
    """What fitting needs of a frame."""
    ratios = frame.clocks_mhz / maximum_clock_mhz
    features, terms = rows_at(space, frame.shapes, ratios)
    weights = balancing_weights(frame.shapes, ratios)
    return FittingRows(
        features, terms, ratios, frame.seconds, frame.watts, weights, list(space.features)
    )


def fit_routing(frame: TrainingFrame, subject: Subject) -> Routing:
    """How the router spreads tokens: from reported counts, else from latency, else uniform."""
    model = subject.architecture
    if model.experts_per_token >= model.experts_count:
        return Routing()
    tokens = frame.shapes[:, 1] + frame.shapes[:, 5]
    reported = np.isfinite(frame.active_experts) & (frame.active_experts > 0)
    if reported.any():
        return fit_reported_skew(
            tokens[reported],
            frame.active_experts[reported],
            model.experts_count,
            model.experts_per_token,
        )
    chosen = np.zeros(len(tokens), dtype=bool)
    step = max(1, len(tokens) // _SKEW_ROWS_COUNT)
    chosen[::step] = True
    some, errors = frame.rows(chosen), {}
    for skew in skews_to_try():
        routing = Routing(skew, "residuals")
        space = FeatureSpace(model, subject.parallelism, subject.gpu, routing)
        rows = fitting_rows(some, space, subject.gpu.maximum_clock_mhz)
        base = fit_base(rows, "model")
        residual = base_seconds(base, rows) / rows.seconds - 1.0
        errors[skew] = float(np.sqrt(np.average(residual**2, weights=rows.weights)))
    return chosen_skew(errors)


def save(bundle: Bundle, directory: Path) -> Path:
    """Write a trained bundle below `directory`, with its card; returns its own directory."""
    card = model_card(bundle.manifest)
    return write_bundle(directory, bundle.manifest, bundle.latency_model, bundle.power_model, card)


def split(frame: TrainingFrame, settings: TrainingSettings) -> dict[str, NDArray[np.bool_]]:
    """Rows of each part; a run (or block) is in one part only.

    Runs are dealt in order of the largest KV that they decoded with, in proportion to the parts:
    few runs fill the KV cache, and each part should hold some of them. Training gets the first.

    Raises:
        RecordsError: There are too few runs or blocks.
    """
    groups, group_of = np.unique(frame.groups, return_inverse=True)
    names = ("validation", "calibration", "test")
    shares = (settings.validation_ratio, settings.calibration_ratio, settings.test_ratio)
    counts = {
        name: max(1, round(share * len(groups))) for name, share in zip(names, shares, strict=True)
    }
    held_out = sum(counts.values())
    if held_out >= len(groups):
        raise RecordsError(
            f"the records hold {len(frame.seconds)} usable rows in {len(groups)} {frame.grouping}; "
            f"allowed: {held_out + 1} {frame.grouping} or more. Record longer"
        )
    wanted = {"train": len(groups) - held_out} | counts
    reach = np.zeros(len(groups))
    np.maximum.at(reach, group_of, frame.shapes[:, _DECODE_KV_COLUMN])
    shuffled = np.random.default_rng(settings.seed).permutation(len(groups))
    order = shuffled[np.argsort(-reach[shuffled], kind="stable")]
    dealt: dict[str, list[int]] = {name: [] for name in wanted}
    for place, group in enumerate(order, start=1):
        behind = {
            name: wanted[name] * place / len(groups) - len(dealt[name])
            for name in wanted
            if len(dealt[name]) < wanted[name]
        }
        dealt[max(behind, key=behind.__getitem__)].append(group)
    return {name: np.isin(group_of, members) for name, members in dealt.items()}


def envelope(shapes: NDArray[np.float64]) -> dict[str, tuple[float, float]]:
    """Load feature -> lowest and highest value."""
    load = envelope_columns(shapes)
    return {
        name: (float(load[:, index].min()), float(load[:, index].max()))
        for index, name in enumerate(ENVELOPE_FEATURES)
    }


def no_margins(settings: TrainingSettings) -> Calibration:
    """A calibration before there is one."""
    zeros: dict[str, tuple[float, ...]] = dict.fromkeys(PHASES, (0.0,))
    none: dict[str, tuple[int, ...]] = dict.fromkeys(PHASES, (0,))
    return Calibration(settings.violation_ratio, (), zeros, none)


def data_description(
    frame: TrainingFrame, parts: Mapping[str, NDArray[np.bool_]]
) -> dict[str, object]:
    """What the manifest says of the data."""
    return {
        "sha256": frame.data_hash(),
        "rows_count": len(frame.seconds),
        "power_rows_count": int(np.count_nonzero(np.isfinite(frame.watts))),
        "idle_rows_count": len(frame.idle_watts),
        "dropped_rows_counts": dict(frame.dropped),
        "split_by": frame.grouping,
        "parts_rows_counts": {name: int(part.sum()) for name, part in parts.items()},
        "lowest_clock_mhz": float(frame.clocks_mhz.min()),
        "highest_clock_mhz": float(frame.clocks_mhz.max()),
        "clocks_count": len(np.unique(frame.clocks_mhz)),
        "supported_clocks_mhz": {
            phase: list(ends) for phase, ends in supported_clocks(frame).items()
        },
    }


def settings_description(settings: TrainingSettings) -> dict[str, object]:
    """What the manifest says of the settings: those that change the result."""
    return {name: value for name, value in asdict(settings).items() if name != "threads_count"}


def library_versions() -> dict[str, str]:
    """Versions of what trains."""
    return {
        "numpy": np.__version__,
        "python": platform.python_version(),
        "xgboost": xgboost.__version__,
    }


def idle_power(
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
        phases_of(shapes),
        clocks / bundle.manifest.maximum_clock_mhz,
        settings.violation_ratio,
    )
    return replace(bundle, manifest=replace(bundle.manifest, calibration=calibration))


def _judged(bundle: Bundle, frame: TrainingFrame, part: NDArray[np.bool_]) -> Bundle:
    """The bundle with its metrics on rows that neither fitting nor calibration saw."""
    metrics = evaluate(fastest_predictor(bundle), frame.rows(part))
    return replace(bundle, manifest=replace(bundle.manifest, metrics=metrics))
