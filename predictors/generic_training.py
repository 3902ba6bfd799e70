"""From records of many models and GPUs to one bundle for models that none of them saw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from predictors.active_experts import Routing
from predictors.bundle import GENERIC_NAME, Bundle, Manifest
from predictors.calibration import calibrate, phases_of
from predictors.errors import RecordsError
from predictors.evaluation import judged, predict_rows
from predictors.features import ENVELOPE_FEATURES
from predictors.fitting import FittingRows, LocalTrainer, fit
from predictors.generic import GENERIC_FEATURES, GenericSpace
from predictors.predictor import fastest_predictor
from predictors.subject import Subject, describe
from predictors.training import (
    envelope,
    fitting_rows,
    library_versions,
    no_margins,
    settings_description,
)
from predictors.training_rows import TrainingFrame, training_frame
from predictors.training_settings import TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from predictors.dataset import Records
    from predictors.fitting import Progress, Trainer

#: Rows of one subject that training looks at: models count alike, however long each was recorded.
_SUBJECT_ROWS_COUNT = 6000

#: Rows of one subject that judging and calibration look at.
_JUDGED_ROWS_COUNT = 1500

#: What trees over several models are held to, whatever the settings say.
_TREE_DEPTH = 3
_LEARNING_RATE = 0.1
_LEAF_ROWS_COUNT = 200

#: Most folds of the leave-some-models-out fits.
_FOLDS_COUNT = 8


@dataclass(frozen=True, slots=True)
class SubjectRows:
    """Rows of one model, spread in one way, on one kind of GPU.

    Attributes:
        subject: What they are about.
        frame: The rows.
    """

    subject: Subject
    frame: TrainingFrame

    @classmethod
    def of(cls, records: Records) -> SubjectRows:
        """Describe records and take their usable rows."""
        subject = describe(records)
        return cls(subject, training_frame(records, subject.gpu.power_limit_watts))

    def thinned(self, rows_count: int, seed: int) -> SubjectRows:
        """A random part of the rows, rare loads kept more than common ones."""
        frame = self.frame
        count = len(frame.seconds)
        if count <= rows_count:
            return self
        prompts = frame.shapes[:, 1] > 0
        share = np.where(prompts, 1.0 / max(1, prompts.sum()), 1.0 / max(1, (~prompts).sum()))
        drawn = np.random.default_rng(seed).choice(
            count, rows_count, replace=False, p=share / share.sum()
        )
        chosen = np.zeros(count, dtype=bool)
        chosen[drawn] = True
        return replace(self, frame=frame.rows(chosen))


def train_generic(
    subjects: Sequence[SubjectRows],
    settings: TrainingSettings | None = None,
    progress: Progress | None = None,
    trainer: Trainer | None = None,
) -> Bundle:
    """Train the generic bundle.

    Models are left out in turn; errors on those set the bound and are the metrics. The bundle
    itself then learns from all of them.

    Args:
        subjects: Rows of each model and GPU.
        settings: How to train; every tree is kept.
        progress: Told about progress of the last fit.
        trainer: What grows the trees; this process if None.

    Raises:
        RecordsError: If there are fewer than two models.
    """
    settings = generic_settings(settings or TrainingSettings())
    trainer = trainer or LocalTrainer(settings.threads_count)
    names = sorted({item.subject.architecture.name for item in subjects})
    if len(names) < 2:
        raise RecordsError(
            f"records of {len(names)} models ({', '.join(names)}); allowed: two or more for a "
            "generic bundle"
        )
    drawn = [item.thinned(_SUBJECT_ROWS_COUNT, settings.seed) for item in subjects]
    outside = _left_out(drawn, names, settings, trainer)
    bundle = fit_generic(drawn, settings, trainer, progress)
    frame = joined([item for item, _ in outside])
    latency, power, ratios = (
        np.concatenate([values[index] for _, values in outside]) for index in range(3)
    )
    phases = phases_of(frame.shapes)
    calibration = calibrate(
        np.log(frame.seconds / latency), phases, ratios, settings.violation_ratio
    )
    margins = calibration.factors(ratios)[phases, np.arange(len(ratios))]
    on_ratios = replace(frame, clocks_mhz=ratios)  # bands are of ratios: GPUs differ in clocks
    inside = np.ones(len(ratios), dtype=bool)
    metrics = judged(on_ratios, 1.0, latency, latency * margins, power, inside)
    manifest = replace(bundle.manifest, calibration=calibration, metrics=metrics)
    return replace(bundle, manifest=manifest)


def generic_settings(settings: TrainingSettings) -> TrainingSettings:
    """The settings with shallower and slower trees: what is particular to a model must not stay."""
    return replace(
        settings,
        tree_depth=min(settings.tree_depth, _TREE_DEPTH),
        learning_rate=min(settings.learning_rate, _LEARNING_RATE),
        minimum_leaf_rows_count=max(settings.minimum_leaf_rows_count, _LEAF_ROWS_COUNT),
    )


def fit_generic(
    subjects: Sequence[SubjectRows],
    settings: TrainingSettings,
    trainer: Trainer,
    progress: Progress | None = None,
    routing: Routing | None = None,
) -> Bundle:
    """One fit over all subjects, without bound and metrics; the routing is uniform if None."""
    routing = routing or Routing()
    fitted = fit(_rows(subjects, routing), None, settings, "generic", 1.0, trainer, progress)
    everything = joined(subjects)
    ranges = [envelope(item.frame.shapes) for item in subjects]
    manifest = Manifest(
        kind="generic",
        name=GENERIC_NAME,
        gpu="",
        maximum_clock_mhz=0.0,
        architecture=None,
        parallelism=None,
        routing=routing,
        clocks_mhz=(),
        base_coefficients=fitted.base.coefficients,
        power_coefficients=fitted.power_base.coefficients,  # of the power limit's
        by_gpu={
            gpu: {"base": base.coefficients, "power": power.coefficients}
            for gpu, (base, power) in fitted.by_gpu.items()
        },
        power_limit_watts=1.0,
        calibration=no_margins(settings),
        idle_clocks_mhz=(),
        idle_watts=(),
        idle_source="nominal",
        envelope={
            name: (min(one[name][0] for one in ranges), max(one[name][1] for one in ranges))
            for name in ENVELOPE_FEATURES
        },
        envelope_margin_ratio=settings.envelope_margin_ratio,
        provenance=_provenance(subjects),
        engine={},
        data={
            "sha256": everything.data_hash(),
            "rows_count": len(everything.seconds),
            "power_rows_count": int(np.count_nonzero(np.isfinite(everything.watts))),
            "idle_rows_count": 0,
            "dropped_rows_counts": {},
            "split_by": "models",
            "parts_rows_counts": {"train": len(everything.seconds)},
            "lowest_clock_mhz": float(everything.clocks_mhz.min()),
            "highest_clock_mhz": float(everything.clocks_mhz.max()),
            "clocks_count": len(np.unique(everything.clocks_mhz)),
            "models": sorted({item.subject.architecture.name for item in subjects}),
            "gpus": sorted({item.subject.gpu.name for item in subjects}),
        },
        training=settings_description(settings),
        metrics={},
        library_versions=library_versions(),
    )
    return Bundle(manifest, fitted.latency_model, fitted.power_model)


def bound_to(bundle: Bundle, subject: Subject) -> Bundle:
    """A generic bundle for what records are about."""
    return bundle.bound(
        subject.gpu.name, subject.architecture, subject.parallelism, subject.clocks_mhz
    )


def joined(subjects: Sequence[SubjectRows]) -> TrainingFrame:
    """All rows in one frame; groups are the subjects."""
    frames = [item.frame for item in subjects]
    groups = [np.full(len(frame.seconds), index) for index, frame in enumerate(frames)]
    return TrainingFrame(
        np.concatenate([frame.shapes for frame in frames]),
        np.concatenate([frame.clocks_mhz for frame in frames]),
        np.concatenate([frame.seconds for frame in frames]),
        np.concatenate([frame.watts for frame in frames]),
        np.concatenate(groups).astype(np.int64),
        np.concatenate([frame.active_experts for frame in frames]),
        np.zeros(0),
        np.zeros(0),
        {},
        "models",
    )


def _rows(subjects: Sequence[SubjectRows], routing: Routing) -> FittingRows:
    """Rows of all subjects; power over its limit, every subject of the same weight."""
    parts = []
    for item in subjects:
        subject = item.subject
        space = GenericSpace(subject.architecture, subject.parallelism, subject.gpu, routing)
        parts.append(fitting_rows(item.frame, space, subject.gpu.maximum_clock_mhz))
    limits = [item.subject.gpu.power_limit_watts for item in subjects]
    return FittingRows(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.terms for part in parts], axis=1),
        np.concatenate([part.clock_ratios for part in parts]),
        np.concatenate([part.seconds for part in parts]),
        np.concatenate([part.watts / limit for part, limit in zip(parts, limits, strict=True)]),
        np.concatenate([part.weights / len(part.weights) for part in parts])
        * (sum(len(part.weights) for part in parts) / len(parts)),
        list(GENERIC_FEATURES),
        np.concatenate(
            [np.full(len(item.frame.seconds), item.subject.gpu.name) for item in subjects]
        ),
    )


def _left_out(
    subjects: Sequence[SubjectRows],
    names: Sequence[str],
    settings: TrainingSettings,
    trainer: Trainer,
) -> list[tuple[SubjectRows, NDArray[np.float64]]]:
    """Each subject's rows with latency, power and clock ratio, predicted without its model."""
    found = []
    folds_count = min(_FOLDS_COUNT, len(names))
    for fold in range(folds_count):
        out = set(names[fold::folds_count])
        rest = [item for item in subjects if item.subject.architecture.name not in out]
        bundle = fit_generic(rest, settings, trainer)
        for item in subjects:
            if item.subject.architecture.name in out:
                judged_rows = item.thinned(_JUDGED_ROWS_COUNT, settings.seed)
                found.append((judged_rows, _predicted(bundle, judged_rows)))
    return found


def _predicted(bundle: Bundle, rows: SubjectRows) -> NDArray[np.float64]:
    predictor = fastest_predictor(bound_to(bundle, rows.subject))
    latency, _, power = predict_rows(predictor, rows.frame.shapes, rows.frame.clocks_mhz)
    return np.stack([latency, power, rows.frame.clocks_mhz / rows.subject.gpu.maximum_clock_mhz])


def _provenance(subjects: Sequence[SubjectRows]) -> str:
    """Simulated as soon as any of it is."""
    provenances = {item.subject.provenance for item in subjects}
    return "simulated" if "simulated" in provenances else "measured"
