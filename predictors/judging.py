"""Judgements beyond one bundle on one set of records: what is left out, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.active_experts import Routing
from predictors.correction import OnlineCorrection
from predictors.evaluation import evaluate, predict_rows
from predictors.fitting import LocalTrainer
from predictors.generic_training import SubjectRows, bound_to, fit_generic, generic_settings
from predictors.predictor import fastest_predictor
from predictors.training import split, train_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from predictors.bundle import Bundle
    from predictors.predictor import BundlePredictor
    from predictors.subject import Subject
    from predictors.training_rows import TrainingFrame
    from predictors.training_settings import TrainingSettings

#: Every this many-th clock is left out of training by `held_out_clocks`.
_EVERY_CLOCK = 3


#: A router that counts every expert as active in every iteration, as for a dense model: what a
#: predictor without features for mixtures of experts knows.
BLIND = Routing(source="all")


def train_rows(
    rows: SubjectRows, settings: TrainingSettings, routing: Routing | None = None
) -> BundlePredictor:
    """A predictor from rows, split as `train` does; with `BLIND` one that knows no experts."""
    parts = split(rows.frame, settings)
    bundle = train_frame(rows.frame, rows.subject, settings, parts, routing=routing)
    return fastest_predictor(bundle)


def held_out_clocks(
    training: SubjectRows, test: SubjectRows, settings: TrainingSettings
) -> dict[str, Any]:
    """Train without every third supported clock, and judge on test rows at those clocks alone."""
    clocks = np.array(training.subject.clocks_mhz, dtype=np.float64)

    def left_out(frame: TrainingFrame) -> NDArray[np.bool_]:
        nearest = np.abs(frame.clocks_mhz[:, None] - clocks).argmin(axis=1)
        out: NDArray[np.bool_] = nearest % _EVERY_CLOCK == 1
        return out

    seen = training.frame.rows(~left_out(training.frame))
    predictor = train_rows(replace(training, frame=seen), settings)
    return evaluate(predictor, test.frame.rows(left_out(test.frame)))


def leave_one_out(  # noqa: PLR0917 (each is one thing that callers name)
    training: Sequence[SubjectRows],
    test: SubjectRows,
    settings: TrainingSettings,
    same: Callable[[Subject, Subject], bool],
    rows_count: int = 6000,
    routing: Routing | None = None,
) -> BundlePredictor:
    """A generic predictor that has seen nothing like the test rows; arguments as below."""
    bundle = left_out_bundle(training, test.subject, settings, same, rows_count, routing)
    return fastest_predictor(bound_to(bundle, test.subject))


def left_out_bundle(  # noqa: PLR0917 (each is one thing that callers name)
    training: Sequence[SubjectRows],
    left_out: Subject,
    settings: TrainingSettings,
    same: Callable[[Subject, Subject], bool],
    rows_count: int = 6000,
    routing: Routing | None = None,
) -> Bundle:
    """A generic bundle that has seen nothing like a subject, not yet bound to an engine.

    Args:
        training: Rows of many models and GPUs.
        left_out: What to leave out.
        settings: How to train.
        same: Tells of two subjects whether one may not be seen when the other is judged.
        rows_count: Most rows of each subject to learn from.
        routing: `BLIND` for a predictor that knows no experts.
    """
    rest = [
        item.thinned(rows_count, settings.seed)
        for item in training
        if not same(item.subject, left_out)
    ]
    trainer = LocalTrainer(settings.threads_count)
    return fit_generic(rest, generic_settings(settings), trainer, routing=routing)


def same_model(one: Subject, other: Subject) -> bool:
    """Whether both are about one model, in whatever format and on whatever GPU."""
    return one.architecture.name == other.architecture.name


def same_gpu(one: Subject, other: Subject) -> bool:
    """Whether both are about one kind of GPU."""
    return one.gpu.name == other.gpu.name


@dataclass(frozen=True, slots=True)
class Streamed:
    """Predictions made while learning, in order of time; arrays of length N.

    Attributes:
        latency: Seconds, corrected by all iterations before.
        upper: Their bounds.
        power: Watts.
        covered: Whether the iteration kept its bound.
    """

    latency: NDArray[np.float64]
    upper: NDArray[np.float64]
    power: NDArray[np.float64]
    covered: NDArray[np.bool_]


def stream(
    predictor: BundlePredictor,
    frame: TrainingFrame,
    correction: OnlineCorrection | None = None,
) -> Streamed:
    """Predict each row with what all rows before it taught, as serving does.

    Args:
        predictor: The predictor.
        frame: Rows in order of time.
        correction: What learns; a new one if None.
    """
    correction = correction or OnlineCorrection(predictor.manifest.calibration.violation_ratio)
    latency, upper, power = predict_rows(predictor, frame.shapes, frame.clocks_mhz)
    ratios = frame.clocks_mhz / predictor.manifest.maximum_clock_mhz
    found = np.empty((3, len(latency)))
    for row in range(len(latency)):
        found[:, row] = correction.correct_row(
            frame.shapes[row], ratios[row], (latency[row], upper[row], power[row])
        )
        watts = frame.watts[row]
        correction.learn(
            frame.shapes[row],
            ratios[row],
            observed_seconds=frame.seconds[row],
            predicted_seconds=latency[row],
            upper_seconds=upper[row],
            observed_watts=watts if np.isfinite(watts) else None,
            predicted_watts=power[row],
        )
    return Streamed(found[0], found[1], found[2], frame.seconds <= found[1])


@dataclass(frozen=True, slots=True)
class Regret:
    """What choosing clocks by prediction costs against knowing the truth.

    Attributes:
        mean_energy_ratio: Energy above the best, mean over loads where the best keeps the limit.
        p95_energy_ratio: The same, 95th percentile.
        violations_ratio: Share of them in which the chosen clock misses the limit.
        saving_ratio: Energy saved against the highest clock, mean.
        best_saving_ratio: The same by the truth.
    """

    mean_energy_ratio: float
    p95_energy_ratio: float
    violations_ratio: float
    saving_ratio: float
    best_saving_ratio: float


def energy_regret(
    predictor: BundlePredictor,
    shapes: NDArray[np.float64],
    true_seconds: NDArray[np.float64],
    true_watts: NDArray[np.float64],
    slowdown_limit: float = 1.25,
) -> Regret:
    """Choose for each load the clock of least energy that keeps a limit on latency.

    Args:
        predictor: The predictor; its upper bound must keep the limit.
        shapes: (K, 7) loads.
        true_seconds: (K, C) true latency at the predictor's clocks.
        true_watts: (K, C) true power.
        slowdown_limit: Limit of latency over that at the highest clock.
    """
    prediction = predictor.predict(shapes)
    limits = slowdown_limit * true_seconds[:, -1:]
    rows = np.arange(len(shapes))

    def least(
        seconds: NDArray[np.float64], watts: NDArray[np.float64], kept: NDArray[np.bool_]
    ) -> NDArray[np.intp]:
        energy = np.where(kept, seconds * watts, np.inf)
        found = energy.argmin(axis=1)
        fallback = seconds.shape[1] - 1  # as the service does: the highest clock
        least_of: NDArray[np.intp] = np.where(kept.any(axis=1), found, fallback)
        return least_of

    chosen = least(
        prediction.latency_seconds,
        prediction.power_watts,
        prediction.latency_upper_seconds <= limits,
    )
    best = least(true_seconds, true_watts, true_seconds <= limits)
    energy = true_seconds * true_watts
    above = energy[rows, chosen] / energy[rows, best] - 1.0
    kept = true_seconds[rows, chosen] <= limits[:, 0]
    return Regret(
        float(np.mean(above[kept])),
        float(np.quantile(above[kept], 0.95)),
        float(np.mean(~kept)),
        float(np.mean(1.0 - energy[rows, chosen] / energy[:, -1])),
        float(np.mean(1.0 - energy[rows, best] / energy[:, -1])),
    )
