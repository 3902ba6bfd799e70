"""Steps of a decision as compiled code, where numba is there: the same numbers, much sooner.

Each has its definition in the module of the step itself, which serves where numba does not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from predictors.prediction import Prediction, Predictor
    from throttle.control.cruise import Balance
    from throttle.control.feedback import PredictionFeedback
    from throttle.control.lateness import Lateness
    from throttle.control.projection import Horizon
    from throttle.control.prompt_work import Measure
    from throttle.control.slack import SlackTable

    _Corrected = tuple[
        NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]
    ]


@dataclass(frozen=True, slots=True)
class CompiledSteps:
    """Functions of `throttle.control.compiled`.

    Attributes:
        advance: Of the scoreboard's rows.
        project: Horizon of the live requests, lengths planned.
        correct: Prediction by feedback, and the horizon's sums.
        measure_slack: Slack of every limit.
        expect_lateness: Lateness of every clock.
        balance: Where every clock's batch settles.
        measure_work: Prompt work in windows of every length.
        decide: All of a decision.
        model_of: What `decide` takes of a predictor; None where that is not compiled.
    """

    advance: Callable[..., None]
    project: Callable[..., Horizon]
    correct: Callable[[Prediction, Horizon, PredictionFeedback], _Corrected]
    measure_slack: Callable[..., SlackTable]
    expect_lateness: Callable[..., Lateness | None]
    balance: Balance
    measure_work: Measure
    decide: Callable[..., NDArray[np.float64]]
    model_of: Callable[[Predictor], tuple[Any, ...] | None]


@functools.cache
def compiled_steps() -> CompiledSteps | None:
    """The compiled steps; None where numba is not installed or finds no place for its code."""
    try:
        from throttle.control.compiled import (  # noqa: PLC0415 - needs numba
            cruise,
            decision,
            lateness,
            projection,
            prompt_work,
            scoreboard,
            slack,
        )
    except (ImportError, RuntimeError):  # the predictor's `fallback_reason` says which
        return None
    advance: Any = scoreboard.advance
    decide: Any = decision.decide
    return CompiledSteps(
        advance,
        projection.project,
        slack.correct,
        slack.measure_slack,
        lateness.expect_lateness,
        cruise.balance,
        prompt_work.measure,
        decide,
        _model_of,
    )


def _model_of(predictor: Predictor) -> tuple[Any, ...] | None:
    from predictors.sweep import SweepPredictor  # noqa: PLC0415 - needs numba

    return predictor.arguments if isinstance(predictor, SweepPredictor) else None
