"""Predictors made from bundles. `XGBoostPredictor` is the reference: plain and not fast."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from predictors.analytic import TERMS
from predictors.bundle import Bundle, load_bundle
from predictors.calibration import phases_of
from predictors.features import CLOCK_FEATURE, ENVELOPE_FEATURES, envelope_columns
from predictors.prediction import BatchShape, Prediction

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from predictors.architecture import ModelArchitecture
    from predictors.features import Parallelism, Space


@dataclass(frozen=True, slots=True)
class Engine:
    """What a generic bundle needs to know of an engine.

    Attributes:
        gpu: Our name of the GPU or the driver's.
        architecture: Dimensions of the model.
        parallelism: How it is spread.
        clocks_mhz: Candidate clocks, rising.
    """

    gpu: str
    architecture: ModelArchitecture
    parallelism: Parallelism
    clocks_mhz: tuple[int, ...]


class BundlePredictor(ABC):
    """What every predictor made from a bundle knows.

    Args:
        bundle: A loaded bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.manifest = bundle.manifest
        self._bundle = bundle
        self._space = bundle.space()
        self._base = bundle.base()
        self._power_base = bundle.power_base()
        self._clocks_mhz = np.array(bundle.manifest.clocks_mhz, dtype=np.int64)
        self._clock_ratios = bundle.clock_ratios()
        self._active_experts_source = ""
        self._idle_power_watts = bundle.idle_power_watts()
        self._static_watts = self._power_base.static_watts(self._clock_ratios)
        self._work_rates = self._power_base.rates(self._clock_ratios)
        self._bound_factors = bundle.manifest.calibration.factors(self._clock_ratios)
        ranges = np.array([bundle.manifest.envelope[name] for name in ENVELOPE_FEATURES])
        slack = bundle.manifest.envelope_margin_ratio * (ranges[:, 1] - ranges[:, 0])
        self._lowest, self._highest = ranges[:, 0] - slack, ranges[:, 1] + slack

    @property
    def space(self) -> Space:
        """What turns shapes into the trees' features."""
        return self._space

    @property
    def clocks_mhz(self) -> NDArray[np.int64]:
        """Candidate clocks in MHz, rising, shape (C,)."""
        return self._clocks_mhz

    @property
    def idle_power_watts(self) -> NDArray[np.float64]:
        """Power of one idle GPU with a live context at each clock, shape (C,)."""
        return self._idle_power_watts

    @property
    def fallback_reason(self) -> str:
        """Why this predictor is slower than it could be; empty if it is not. Worth a log line."""
        return ""

    @property
    def active_experts_source(self) -> str:
        """What the count of active experts rests on; see `Manifest.active_experts_source`."""
        return self._active_experts_source or self.manifest.active_experts_source

    def with_active_experts(self, ratio: float) -> Self:
        """The same predictor with other active experts than its formula gives.

        Args:
            ratio: Active experts over those of the formula, as `ActiveExpertsEstimator` finds it.
        """
        adapted = copy.copy(self)
        adapted._space = self._bundle.space(ratio)  # noqa: SLF001 (of this class)
        adapted._active_experts_source = "inverted"  # noqa: SLF001
        return adapted

    def expert_seconds(self, shapes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Time at maximum clock that the latency base spends on reading experts, (K,).

        Zero for bundles that know no experts.
        """
        if self.manifest.kind == "table":
            return np.zeros(len(shapes))
        _, terms = self._space.build(shapes)
        only = np.zeros_like(terms)
        row = TERMS.index("expert_memory")
        only[row] = terms[row]
        return self._base.seconds(self._base.parts(only), np.ones(1))[:, 0]

    @abstractmethod
    def predict(self, shapes: NDArray[np.float64]) -> Prediction:
        """Predict a (K, 7) matrix of shapes at every clock; see `Predictor.predict`.

        Raises:
            PredictorsError: If the matrix has another form, or a row has no work.
        """

    def covers(self, shapes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell, per shape, whether its load lies inside the range seen in training, shape (K,)."""
        columns = envelope_columns(shapes)
        inside: NDArray[np.bool_] = ((columns >= self._lowest) & (columns <= self._highest)).all(
            axis=1
        )
        return inside

    def warm_up(self) -> None:
        """Do what is slow only once, before serving."""
        mixed = BatchShape(1.0, 128.0, 0.0, 8.0, 4096.0, 8.0)
        decode = BatchShape(0.0, 0.0, 0.0, 8.0, 4096.0, 8.0)
        shapes = np.array([mixed.row(), decode.row()])
        self.predict(shapes)
        self.covers(shapes)


class XGBoostPredictor(BundlePredictor):
    """Asks XGBoost for every shape at every clock.

    Args:
        bundle: A loaded bundle.
        fallback_reason: Why no faster predictor is used.
    """

    def __init__(self, bundle: Bundle, fallback_reason: str = "") -> None:
        super().__init__(bundle)
        import xgboost  # noqa: PLC0415 (0.8 s and 150 MB, which the compiled sweep's users may avoid)

        self._fallback_reason = fallback_reason
        self._latency = xgboost.Booster({"nthread": 1})
        self._latency.load_model(bytearray(bundle.latency_model))
        self._power = xgboost.Booster({"nthread": 1})
        self._power.load_model(bytearray(bundle.power_model))

    @property
    def fallback_reason(self) -> str:
        """Why no faster predictor is used."""
        return self._fallback_reason

    def predict(self, shapes: NDArray[np.float64]) -> Prediction:
        """Predict a (K, 7) matrix of shapes at every clock; see `Predictor.predict`."""
        features, terms = self._space.build(shapes)
        form = (features.shape[1], len(self._clock_ratios))
        rows = np.repeat(features.T, form[1], axis=0)
        rows[:, CLOCK_FEATURE] = np.tile(self._clock_ratios, form[0])
        latency_margin = self._latency.inplace_predict(rows).reshape(form).astype(np.float64)
        power_margin = self._power.inplace_predict(rows).reshape(form).astype(np.float64)
        base = self._base.seconds(self._base.parts(terms), self._clock_ratios)
        latency = _never_rising(base * np.exp(latency_margin))
        factors = self._bound_factors[phases_of(shapes)]
        limit = self.manifest.power_limit_watts
        power = np.minimum(self._power_base.watts(terms, self._clock_ratios, latency), limit)
        power = np.minimum(power * np.exp(power_margin), limit)
        power = np.maximum.accumulate(power, axis=1)
        return Prediction(latency, _never_rising(latency * factors), power)


def load_predictor(directory: Path, engine: Engine | None = None) -> BundlePredictor:
    """Load a bundle with the fastest predictor that this environment has.

    Args:
        directory: The bundle's own directory.
        engine: What a generic bundle is to predict; other bundles know.

    Returns:
        A warm predictor; its `fallback_reason` says why it is slow, if it is.

    Raises:
        BundleError: If the bundle is missing, damaged or made for other code.
    """
    bundle = load_bundle(directory)
    if engine is not None:
        bundle = bundle.bound(
            engine.gpu, engine.architecture, engine.parallelism, engine.clocks_mhz
        )
    predictor = fastest_predictor(bundle)
    predictor.warm_up()
    return predictor


def fastest_predictor(bundle: Bundle) -> BundlePredictor:
    """The compiled sweep, or XGBoost itself where numba cannot work."""
    try:
        from predictors.sweep import SweepPredictor  # noqa: PLC0415 (needs numba)
    except ImportError:
        reason = "numba is not installed; the extra moe-throttle[fast] has it"
        return XGBoostPredictor(bundle, reason)
    except RuntimeError as error:  # numba finds no directory to keep compiled code in
        reason = f"{error}; set NUMBA_CACHE_DIR to a writable directory"
        return XGBoostPredictor(bundle, reason)
    return SweepPredictor(bundle)


def _never_rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least values above the given ones that do not rise along the clocks."""
    falling: NDArray[np.float64] = np.maximum.accumulate(values[:, ::-1], axis=1)[:, ::-1]
    return falling
