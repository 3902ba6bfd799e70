"""Fitting of one latency and one power model: bases by least squares, trees by XGBoost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xgboost

from predictors.analytic import TERMS, FittedBase, LatencyBase
from predictors.calibration import CLOCK_BAND_EDGES
from predictors.power_base import ROOFLINE_WORK, PowerBase
from predictors.table import TABLE_TERMS, TABLE_WORK, TableBase

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from predictors.training_settings import TrainingSettings

    #: Called with what is fitted ("latency", "power") and the share of it that is done.
    Progress = Callable[[str, float], None]


#: Weight of a row of another GPU in the bases of one: enough to settle what its own rows do not.
_OTHER_GPU_WEIGHT = 0.02


@dataclass(frozen=True, slots=True)
class FittingRows:
    """Rows to fit, of N iterations.

    Attributes:
        features: (N, F).
        terms: (T, N) of both bases.
        clock_ratios: (N,).
        seconds: (N,) measured durations.
        watts: (N,) measured power; NaN where unknown.
        weights: (N,) how much each row counts for latency.
        names: Names of the features.
        gpus: (N,) name of each row's GPU where there are several; None for one.
    """

    features: NDArray[np.float32]
    terms: NDArray[np.float64]
    clock_ratios: NDArray[np.float64]
    seconds: NDArray[np.float64]
    watts: NDArray[np.float64]
    weights: NDArray[np.float64]
    names: Sequence[str]
    gpus: NDArray[np.str_] | None = None

    def part(self, chosen: NDArray[np.bool_]) -> FittingRows:
        """Some of the rows."""
        return FittingRows(
            self.features[chosen],
            self.terms[:, chosen],
            self.clock_ratios[chosen],
            self.seconds[chosen],
            self.watts[chosen],
            self.weights[chosen],
            self.names,
            None if self.gpus is None else self.gpus[chosen],
        )

    def leaning_to(self, gpu: str) -> FittingRows:
        """The same rows, those of other GPUs counting little."""
        mine = self.gpus == gpu
        return replace(self, weights=self.weights * np.where(mine, 1.0, _OTHER_GPU_WEIGHT))


@dataclass(frozen=True, slots=True)
class Fitted:
    """Both bases and both models.

    Attributes:
        base: Of all rows.
        power_base: Of all rows.
        latency_model: UBJSON.
        power_model: UBJSON.
        by_gpu: GPU -> its own latency and power base, where rows are of several.
    """

    base: LatencyBase
    power_base: PowerBase
    latency_model: bytes
    power_model: bytes
    by_gpu: dict[str, tuple[LatencyBase, PowerBase]]


class Trainer(Protocol):
    """Grows trees."""

    def boost(  # noqa: PLR0917 (each is one thing that callers name)
        self,
        parameters: Mapping[str, Any],
        trees_count: int,
        early_stopping_count: int,
        train: Part,
        validation: Part | None,
        report: Callable[[float], None] | None = None,
    ) -> bytes:
        """Fit and return UBJSON; without validation rows every tree is kept."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that a trainer sees."""

    features: NDArray[np.float32]
    target: NDArray[np.float64]
    weights: NDArray[np.float64]
    names: Sequence[str]


class LocalTrainer:
    """Grows trees in this process.

    Args:
        threads_count: Threads of XGBoost; 0 means all cores.
    """

    def __init__(self, threads_count: int = 0) -> None:
        self._threads_count = threads_count

    def boost(  # noqa: PLR0917 (each is one thing that callers name)
        self,
        parameters: Mapping[str, Any],
        trees_count: int,
        early_stopping_count: int,
        train: Part,
        validation: Part | None,
        report: Callable[[float], None] | None = None,
    ) -> bytes:
        """Fit and return UBJSON; without validation rows every tree is kept."""
        evaluated = [(self._matrix(validation), "validation")] if validation else []
        booster = xgboost.train(
            {**parameters, "nthread": self._threads_count},
            self._matrix(train),
            num_boost_round=trees_count,
            evals=evaluated,
            early_stopping_rounds=early_stopping_count if validation else None,
            verbose_eval=False,
            callbacks=[_Reporter(trees_count, report)] if report else None,
        )
        return serialized(booster, stopped_early=bool(validation))

    def _matrix(self, part: Part) -> xgboost.DMatrix:
        return xgboost.DMatrix(
            part.features,
            part.target,
            weight=part.weights,
            feature_names=list(part.names),
            nthread=self._threads_count or None,
        )


def serialized(booster: xgboost.Booster, *, stopped_early: bool) -> bytes:
    """The best trees as UBJSON, without what differs between equal models."""
    if stopped_early:
        booster = booster[: booster.best_iteration + 1]
    booster.set_attr(best_iteration=None, best_score=None)
    return bytes(booster.save_raw("ubj"))


class _Reporter(xgboost.callback.TrainingCallback):
    """Passes on how many of the trees are fitted."""

    def __init__(self, trees_count: int, report: Callable[[float], None]) -> None:
        super().__init__()
        self._trees_count, self._report = trees_count, report

    def after_iteration(self, _model: object, epoch: int, _evals_log: object) -> bool:
        self._report((epoch + 1) / self._trees_count)
        return False


def balancing_weights(
    shapes: NDArray[np.float64], clock_ratios: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weights with mean one that keep rare loads from drowning.

    A serving engine decodes thousands of times for each large prompt, yet the prompt decides about
    the time to the first token. Rows in one cell of prompt tokens, decoding requests (both by
    powers of two) and clock band share a weight of one over the root of their number.
    """
    cells = np.column_stack(
        [
            np.ceil(np.log2(shapes[:, 1] + 1.0)),
            np.ceil(np.log2(shapes[:, 3] + 1.0)),
            np.searchsorted(CLOCK_BAND_EDGES, clock_ratios, side="right"),
        ]
    )
    _, cell, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    weights: NDArray[np.float64] = 1.0 / np.sqrt(counts[cell])
    weights /= weights.mean()
    return weights


def fit_base(rows: FittingRows, kind: str) -> LatencyBase:
    """The latency base of a kind of bundle."""
    base = TableBase if kind == "table" else FittedBase
    return base.fit(rows.terms, rows.clock_ratios, rows.seconds, rows.weights)


def fit_power_base(
    rows: FittingRows,
    seconds: NDArray[np.float64],
    limit_watts: float,
    kind: str,
    weights: NDArray[np.float64] | None = None,
) -> PowerBase:
    """The power base of a kind of bundle, from rows with known power.

    Args:
        rows: Rows, all with power.
        seconds: (N,) predicted durations.
        limit_watts: Power limit.
        kind: Of bundle.
        weights: (N,) how much each row counts; all alike if None.
    """
    work, terms = (TABLE_WORK, TABLE_TERMS) if kind == "table" else (ROOFLINE_WORK, TERMS)
    return PowerBase.fit(
        rows.terms, rows.clock_ratios, seconds, rows.watts, limit_watts, work, terms, weights
    )


def base_seconds(base: LatencyBase, rows: FittingRows) -> NDArray[np.float64]:
    """The base at each row's clock, (N,)."""
    return base.seconds(base.parts(rows.terms), rows.clock_ratios[:, None])[:, 0]


def predicted(model: bytes, rows: FittingRows) -> NDArray[np.float64]:
    """What trees say of each row, (N,)."""
    booster = xgboost.Booster({"nthread": 1})
    booster.load_model(bytearray(model))
    margins: NDArray[np.float64] = booster.inplace_predict(rows.features).astype(np.float64)
    return margins


def fit(  # noqa: PLR0917 (each is one thing that callers name)
    rows: FittingRows,
    validation: FittingRows | None,
    settings: TrainingSettings,
    kind: str,
    limit_watts: float,
    trainer: Trainer,
    progress: Progress | None = None,
) -> Fitted:
    """Fit both models.

    The trees correct the logarithm of each base without a constraint: whoever evaluates them takes
    the running maximum over the clocks, which keeps latency from rising and power from falling.
    Trees that may only fall with clock can add dependence to a base but never take any back.

    Args:
        rows: Rows to learn from.
        validation: Rows that decide when to stop; None keeps every tree.
        settings: How to train.
        kind: Of bundle.
        limit_watts: Power limit that predictions stay below.
        trainer: What grows the trees.
        progress: Told about progress.
    """
    base = fit_base(rows, kind)
    names = [] if rows.gpus is None else sorted(set(rows.gpus.tolist()))
    bases = {gpu: fit_base(rows.leaning_to(gpu), kind) for gpu in names}

    def expected(part: FittingRows) -> NDArray[np.float64]:
        found = base_seconds(base, part)
        for gpu, own in bases.items():
            mine = part.gpus == gpu
            found[mine] = base_seconds(own, part.part(mine))
        return found

    boost = _Boost(settings, trainer, progress)
    latency = boost("latency", rows, validation, lambda part: np.log(part.seconds / expected(part)))

    def seconds(part: FittingRows) -> NDArray[np.float64]:
        estimate: NDArray[np.float64] = expected(part) * np.exp(predicted(latency, part))
        return estimate

    measured = _with_power(rows)
    durations = seconds(measured)
    power_base = fit_power_base(measured, durations, limit_watts, kind)
    power_bases = {
        gpu: fit_power_base(
            measured,
            durations,
            limit_watts,
            kind,
            np.where(measured.gpus == gpu, 1.0, _OTHER_GPU_WEIGHT),
        )
        for gpu in names
    }

    def power_target(part: FittingRows) -> NDArray[np.float64]:
        durations = seconds(part)
        watts = power_base.watts_of_rows(part.terms, part.clock_ratios, durations)
        for gpu, own in power_bases.items():
            mine = part.gpus == gpu
            watts[mine] = own.watts_of_rows(
                part.terms[:, mine], part.clock_ratios[mine], durations[mine]
            )
        target: NDArray[np.float64] = np.log(part.watts / np.minimum(watts, limit_watts))
        return target

    power = boost("power", measured, _with_power(validation) if validation else None, power_target)
    by_gpu = {gpu: (bases[gpu], power_bases[gpu]) for gpu in names}
    return Fitted(base, power_base, latency, power, by_gpu)


class _Boost:
    """Grows the trees of one target after the other."""

    def __init__(
        self, settings: TrainingSettings, trainer: Trainer, progress: Progress | None
    ) -> None:
        self._settings, self._trainer, self._progress = settings, trainer, progress

    def __call__(
        self,
        what: str,
        rows: FittingRows,
        validation: FittingRows | None,
        target: Callable[[FittingRows], NDArray[np.float64]],
    ) -> bytes:
        settings, progress = self._settings, self._progress
        parameters = {
            "objective": "reg:squarederror",
            # when to stop is no matter of the few rows that no feature explains
            "eval_metric": "mae",
            "tree_method": "hist",
            "max_bin": 256,  # keeps every one of about 110 clocks apart
            "max_depth": settings.tree_depth,
            "eta": settings.learning_rate,
            "min_child_weight": settings.minimum_leaf_rows_count,
            "seed": settings.seed,
        }

        def part(of: FittingRows) -> Part:
            # weighed by load for latency alone: power in rare loads decides about little
            weights = of.weights if what == "latency" else np.ones_like(of.weights)
            return Part(of.features, target(of), weights, of.names)

        trees = settings.latency_trees_count if what == "latency" else settings.power_trees_count
        return self._trainer.boost(
            parameters,
            trees,
            settings.early_stopping_count,
            part(rows),
            part(validation) if validation else None,
            (lambda share: progress(what, share)) if progress else None,
        )


def _with_power(rows: FittingRows) -> FittingRows:
    return rows.part(np.isfinite(rows.watts))
