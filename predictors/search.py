"""Search for training settings with Optuna."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.errors import PredictorsError
from predictors.evaluation import predict_rows
from predictors.predictor import fastest_predictor
from predictors.subject import describe
from predictors.training import fit_routing, split, train_frame
from predictors.training_rows import training_frame

if TYPE_CHECKING:
    from predictors.dataset import Records
    from predictors.fitting import Trainer
    from predictors.training_settings import TrainingSettings

#: Ranges that are searched, and whether their logarithm is. Serving cost grows with trees and
#: depth, so neither goes beyond the defaults by much.
RANGES: dict[str, tuple[float, float, bool]] = {
    "latency_trees_count": (60, 200, True),
    "power_trees_count": (60, 200, True),
    "tree_depth": (3, 6, False),
    "learning_rate": (0.05, 0.3, True),
    "minimum_leaf_rows_count": (2, 60, True),
}


def search(
    records: Records,
    settings: TrainingSettings,
    trials_count: int,
    trainer: Trainer | None = None,
) -> TrainingSettings:
    """The best settings of so many trials, the given ones being the first.

    Trials are judged by the sum of the mean absolute log errors of latency and power on the
    calibration part, whose rows no trial learns from. The test part stays unseen.

    Args:
        records: Records of one model on one kind of GPU.
        settings: Where the search starts; also seeds it.
        trials_count: Trials.
        trainer: What grows the trees.

    Raises:
        PredictorsError: Optuna is not installed, or there are no trials.
    """
    if trials_count < 1:
        raise PredictorsError(f"number of trials is {trials_count}; allowed: 1 or more")
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise PredictorsError(
            "a search needs Optuna, which is not installed; install moe-throttle[search]"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    subject = describe(records)
    frame = training_frame(records, subject.gpu.power_limit_watts)
    parts = split(frame, settings)
    routing = fit_routing(frame.rows(parts["train"]), subject)
    judged = frame.rows(parts["calibration"])

    def error(trial: Any) -> float:  # noqa: ANN401 (Optuna is optional)
        tried = _tried(trial, settings)
        bundle = train_frame(frame, subject, tried, parts, trainer=trainer, routing=routing)
        found = predict_rows(fastest_predictor(bundle), judged.shapes, judged.clocks_mhz)
        latency = np.abs(np.log(found[0] / judged.seconds))
        power = np.abs(np.log(found[2] / judged.watts))
        return float(np.mean(latency) + np.nanmean(power))

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=settings.seed))
    study.enqueue_trial({name: getattr(settings, name) for name in RANGES})
    study.optimize(error, n_trials=trials_count)
    return replace(settings, **study.best_params)


def _tried(trial: Any, settings: TrainingSettings) -> TrainingSettings:  # noqa: ANN401
    values: dict[str, Any] = {}
    for name, (low, high, logarithmic) in RANGES.items():
        # the given settings are allowed, wherever they lie
        given = getattr(settings, name)
        ends = min(low, given), max(high, given)
        if isinstance(given, int):
            values[name] = trial.suggest_int(name, *map(int, ends), log=logarithmic)
        else:
            values[name] = trial.suggest_float(name, *ends, log=logarithmic)
    return replace(settings, **values)
