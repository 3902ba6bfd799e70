"""How well recordings predict so far, and where a profiling run should look next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.errors import RecordsError
from predictors.features import FeatureSpace, rows_at
from predictors.fitting import LocalTrainer, base_seconds, fit, predicted
from predictors.generic_training import SubjectRows
from predictors.training import fitting_rows
from predictors.training_settings import TrainingSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from predictors.dataset import Records
    from predictors.fitting import Fitted, FittingRows

#: Members of the ensemble; each learns without one part of the blocks of rows.
_MEMBERS_COUNT = 3

#: Rows that the ensemble looks at.
_ROWS_COUNT = 15_000

#: Quick models: they tell where predictions are unsure, they are not served.
_QUICK = TrainingSettings(
    latency_trees_count=50, power_trees_count=30, learning_rate=0.25, threads_count=1
)


@dataclass(frozen=True, slots=True)
class Advice:
    """What recordings say of themselves.

    Attributes:
        latency_error_ratio: Mean absolute error on rows left out, noise of the rows included.
        power_error_ratio: The same of power.
        rows_count: Usable iterations.
        disagreement: (P, C) deviation of the ensemble's log latency plus that of its log power.
    """

    latency_error_ratio: float
    power_error_ratio: float
    rows_count: int
    disagreement: NDArray[np.float64]

    @property
    def error_ratio(self) -> float:
        """The worse of the two errors."""
        return max(self.latency_error_ratio, self.power_error_ratio)


def advise(
    records: Records, shapes: NDArray[np.float64], clocks_mhz: NDArray[np.float64]
) -> Advice:
    """Train a small ensemble and compare its members.

    Args:
        records: Of one model on one kind of GPU.
        shapes: (P, S, 7): S shapes for each of P loads that could be played next.
        clocks_mhz: (C,) clocks to judge them at.

    Raises:
        RecordsError: If the records are too few to split.
    """
    rows = SubjectRows.of(records).thinned(_ROWS_COUNT, seed=1)
    subject, frame = rows.subject, rows.frame
    groups = np.unique(frame.groups)
    if len(groups) < 2 * _MEMBERS_COUNT or not np.isfinite(frame.watts).any():
        raise RecordsError(
            f"the records hold {len(frame.seconds)} usable rows in {len(groups)} "
            f"{frame.grouping}, too few to advise on; record longer"
        )
    space = FeatureSpace(subject.architecture, subject.parallelism, subject.gpu)
    maximum = subject.gpu.maximum_clock_mhz
    whole = fitting_rows(frame, space, maximum)
    member_of = np.searchsorted(groups, frame.groups) % _MEMBERS_COUNT
    limit = subject.gpu.power_limit_watts
    latency_errors, power_errors, opinions = [], [], []
    asked = _asked(space, shapes, clocks_mhz / maximum, whole)
    for member in range(_MEMBERS_COUNT):
        left_out = member_of == member
        fitted = fit(whole.part(~left_out), None, _QUICK, "model", limit, LocalTrainer(1))
        latency, power = _predict(fitted, whole.part(left_out), limit)
        latency_errors.append(np.abs(latency / frame.seconds[left_out] - 1.0))
        known = np.isfinite(frame.watts[left_out])
        power_errors.append(np.abs(power / frame.watts[left_out] - 1.0)[known])
        opinions.append(np.log(_predict(fitted, asked, limit)))
    spread = np.std(np.stack(opinions), axis=0).sum(axis=0)
    form = (shapes.shape[0], shapes.shape[1], len(clocks_mhz))
    return Advice(
        float(np.mean(np.concatenate(latency_errors))),
        float(np.mean(np.concatenate(power_errors))),
        len(frame.seconds),
        spread.reshape(form).mean(axis=1),
    )


def _asked(
    space: FeatureSpace,
    shapes: NDArray[np.float64],
    clock_ratios: NDArray[np.float64],
    like: FittingRows,
) -> FittingRows:
    """Every shape at every clock as rows; what they took is not known."""
    flat = np.repeat(shapes.reshape(-1, shapes.shape[-1]), len(clock_ratios), axis=0)
    ratios = np.tile(clock_ratios, len(flat) // len(clock_ratios))
    features, terms = rows_at(space, flat, ratios)
    unknown = np.full(len(ratios), np.nan)
    return type(like)(features, terms, ratios, unknown, unknown, unknown, like.names)


def _predict(fitted: Fitted, rows: FittingRows, limit_watts: float) -> NDArray[np.float64]:
    """Latency and power of each row at its own clock, (2, N)."""
    latency = base_seconds(fitted.base, rows) * np.exp(predicted(fitted.latency_model, rows))
    watts = fitted.power_base.watts_of_rows(rows.terms, rows.clock_ratios, latency)
    power = np.minimum(watts, limit_watts) * np.exp(predicted(fitted.power_model, rows))
    return np.stack([latency, np.minimum(power, limit_watts)])
