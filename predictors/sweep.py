"""Predictions by compiled code: every clock at once for the price of about one row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from predictors.calibration import phases_of
from predictors.compiled_features import CompiledFeatures
from predictors.compiled_sweep import predict_rows, predict_shapes, shapes_covered
from predictors.features import FeatureSpace
from predictors.forest import Forest
from predictors.prediction import Prediction
from predictors.predictor import BundlePredictor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from predictors.bundle import Bundle


class SweepPredictor(BundlePredictor):
    """Walks the trees itself, compiled; releases the interpreter lock while it does.

    Args:
        bundle: A loaded bundle.

    Raises:
        BundleError: If a model is not what the sweep can walk.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        latency, power = (
            Forest.from_model(
                model,
                list(bundle.features),
                self._clock_ratios,
                f"{what} model of {bundle.manifest.name}",
            )
            for what, model in (("latency", bundle.latency_model), ("power", bundle.power_model))
        )
        self._model = (
            latency.arguments,
            power.arguments,
            self._clock_ratios,
            self._bound_factors,
            self._static_watts,
            self._work_rates,
            float(self.manifest.power_limit_watts),
        )
        self._compiled_space: tuple[Any, ...] | None = None  # where features are built compiled
        self._envelope = (self._lowest, self._highest)
        self._compile_features()

    def with_active_experts(self, ratio: float) -> Self:
        """The same predictor with other active experts than its formula gives."""
        adapted = super().with_active_experts(ratio)
        adapted._compile_features()  # noqa: SLF001 (of this class)
        return adapted

    def _compile_features(self) -> None:
        """Features of one model attended for as a whole are built by compiled code."""
        space = self._space
        if type(space) is FeatureSpace and space.whole:
            features = CompiledFeatures(space, self._base.weights, self._power_base.weights)
            self._compiled_space = features.arguments

    @property
    def arguments(self) -> tuple[Any, ...] | None:
        """What `predict_shapes` takes after the shapes, then what `shapes_covered` takes.

        None where features are not built by compiled code.
        """
        if self._compiled_space is None:
            return None
        return (self._compiled_space, self._model, *self._envelope)

    def covers(self, shapes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell, per shape, whether its load lies inside the range seen in training, shape (K,)."""
        return shapes_covered(_own(shapes), *self._envelope)

    def predict(self, shapes: NDArray[np.float64]) -> Prediction:
        """Predict a (K, 7) matrix of shapes at every clock; see `Predictor.predict`."""
        if self._compiled_space is not None and shapes.ndim == 2:
            found = predict_shapes(_own(shapes), self._compiled_space, self._model)
            if len(found):
                return Prediction(found[0], found[1], found[2])
        # which also says what is wrong with shapes that are not allowed
        features, terms = self._space.build(shapes)
        found = np.empty((3, len(shapes), len(self._clock_ratios)))
        predict_rows(
            features,
            self._base.parts(terms),
            self._power_base.work(terms),
            phases_of(shapes),
            found,
            self._model,
        )
        return Prediction(found[0], found[1], found[2])


def _own(shapes: NDArray[np.float64]) -> NDArray[np.float64]:
    """A copy of one form: any other would be compiled for once more, while serving."""
    return np.array(shapes, np.float64, order="C")
