"""The frequency sweep: every clock at once for the price of about one row.

For each shape every tree is walked once with the interval of clocks still alive. A split on the
clock that divides them takes both branches, each with its part. A leaf adds its value to a
difference array over the clocks, and a running sum gives the prediction at every clock. The
numbers are those of row-by-row prediction, up to the order of summation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from predictors.calibration import phases_of
from predictors.errors import BundleError
from predictors.features import CLOCK_FEATURE
from predictors.prediction import Prediction
from predictors.predictor import BundlePredictor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from predictors.bundle import Bundle

#: Feature index that marks a leaf.
_LEAF = -1

#: Deepest tree that the walk's stack holds.
_MAXIMUM_DEPTH = 32


#: One node in 16 bytes. A leaf has feature `_LEAF` and its value as threshold; the right child
#: follows the left one; `cut` is how many candidate clocks go left where the clock is split.
_NODE = np.dtype(
    [("feature", np.int32), ("left", np.int32), ("cut", np.int32), ("threshold", np.float32)]
)


@dataclass(frozen=True, slots=True)
class Forest:
    """All trees of one model.

    Attributes:
        roots: Index of each tree's root in `nodes`.
        nodes: All nodes, of type `_NODE`, each tree level by level.
        base_score: What the sum of the leaves starts from.
    """

    roots: NDArray[np.int32]
    nodes: NDArray[np.void]
    base_score: float

    @classmethod
    def from_model(
        cls,
        model: bytes,
        features: Sequence[str],
        clock_ratios: NDArray[np.float64],
        source: str,
    ) -> Forest:
        """Read a model and check what the sweep assumes of it.

        Args:
            model: XGBoost's UBJSON.
            features: Names of the features, in order.
            clock_ratios: Candidate values of the clock feature, (C,), rising.
            source: Name for messages.

        Raises:
            BundleError: If the model is no plain regression forest over these features.
        """
        import xgboost  # noqa: PLC0415 (0.8 s, only to read the file)

        booster = xgboost.Booster({"nthread": 1})
        booster.load_model(bytearray(model))
        learner = json.loads(bytes(booster.save_raw("json")))["learner"]
        trees = _checked_trees(learner, list(features), source)
        counts = [len(tree["left_children"]) for tree in trees]
        nodes = np.concatenate([_by_level(tree) for tree in trees])
        roots = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32)
        nodes["left"] += np.repeat(roots, counts)
        # XGBoost compares in single precision; a clock equal to the threshold goes right
        clocks = clock_ratios.astype(np.float32)
        nodes["cut"] = np.searchsorted(clocks, nodes["threshold"], side="left")
        return cls(roots, nodes, _base_score(learner))


def _by_level(tree: dict[str, Any]) -> NDArray[np.void]:
    """One tree's nodes level by level, so that siblings are neighbors."""
    order = [0]
    nodes = np.zeros(len(tree["left_children"]), dtype=_NODE)
    for index, node in enumerate(order):  # grows while it is walked
        left = tree["left_children"][node]
        nodes[index]["threshold"] = tree["split_conditions"][node]
        nodes[index]["feature"] = _LEAF if left < 0 else tree["split_indices"][node]
        if left >= 0:
            nodes[index]["left"] = len(order)
            order += [left, tree["right_children"][node]]
    return nodes


def _checked_trees(
    learner: dict[str, Any], features: list[str], source: str
) -> list[dict[str, Any]]:
    """The trees, if they are what the sweep can walk."""
    booster = learner["gradient_booster"]
    shape = learner["learner_model_param"]
    checks = (
        ("booster", booster["name"], "gbtree"),
        ("objective", learner["objective"]["name"], "reg:squarederror"),
        ("feature_names", learner["feature_names"], features),
        ("num_target", int(shape.get("num_target", "1")), 1),
        ("num_class", int(shape.get("num_class", "0")), 0),
    )
    for what, value, allowed in checks:
        if value != allowed:
            raise BundleError(f"{source}: {what} is {value!r}; allowed: {allowed!r}")
    trees: list[dict[str, Any]] = booster["model"]["trees"]
    for number, tree in enumerate(trees):
        if tree.get("categories") or any(tree.get("split_type", ())):
            raise BundleError(f"{source}: tree {number} splits on categories; allowed: numbers")
        if _depth(tree) > _MAXIMUM_DEPTH:
            raise BundleError(
                f"{source}: tree {number} is deeper than {_MAXIMUM_DEPTH}; train shallower trees"
            )
    return trees


def _depth(tree: dict[str, Any]) -> int:
    level, depth = [0], 0
    while level := [
        child
        for node in level
        for child in (tree["left_children"][node], tree["right_children"][node])
        if child >= 0
    ]:
        depth += 1
    return depth


def _base_score(learner: dict[str, Any]) -> float:
    """Written as "5E-1" by older and as "[5E-1]" by newer versions."""
    return float(learner["learner_model_param"]["base_score"].strip("[]"))


class SweepPredictor(BundlePredictor):
    """Walks the trees itself, compiled; releases the interpreter lock while it does.

    Args:
        bundle: A loaded bundle.

    Raises:
        BundleError: If a model is not what the sweep can walk.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self._latency, self._power = (
            Forest.from_model(
                model,
                list(bundle.features),
                self._clock_ratios,
                f"{what} model of {bundle.manifest.name}",
            )
            for what, model in (("latency", bundle.latency_model), ("power", bundle.power_model))
        )

    def predict(self, shapes: NDArray[np.float64]) -> Prediction:
        """Predict a (K, 7) matrix of shapes at every clock; see `Predictor.predict`."""
        features, terms = self._space.build(shapes)
        rows = np.ascontiguousarray(features.T)
        latency = self._margins(self._latency, rows)
        power = self._margins(self._power, rows)
        upper = np.empty_like(latency)
        # a new array: other forms of `shapes` would be compiled for once more, while serving
        phases = phases_of(shapes)
        _finish_latency(
            latency, upper, self._base.parts(terms), self._clock_ratios, phases, self._bound_factors
        )
        _finish_power(
            power,
            latency,
            self._power_base.work(terms),
            self._static_watts,
            self._work_rates,
            self.manifest.power_limit_watts,
        )
        return Prediction(latency, upper, power)

    def _margins(self, forest: Forest, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """Sum of the trees' values at every clock, (K, C)."""
        margins = np.zeros((len(rows), len(self._clock_ratios)))
        _sweep(
            rows,
            forest.roots,
            forest.nodes,
            forest.base_score,
            margins,
        )
        return margins


@njit(cache=True, nogil=True)
def _sweep(  # noqa: C901 (one walk: a call per step would cost as much as the step)
    rows: NDArray[np.float32],
    roots: NDArray[np.int32],
    nodes: NDArray[Any],
    base_score: float,
    out: NDArray[np.float64],
) -> None:
    """Fill `out` (K, C) with the forest's sums; `out` holds zeros before."""
    count = out.shape[1]
    waiting = np.empty(_MAXIMUM_DEPTH + 1, np.int32)
    lows = np.empty(_MAXIMUM_DEPTH + 1, np.int32)
    highs = np.empty(_MAXIMUM_DEPTH + 1, np.int32)
    for root in roots:  # trees outside: their nodes stay in the cache for all rows
        for row in range(rows.shape[0]):
            waiting[0], lows[0], highs[0] = root, 0, count
            left_over = 1
            while left_over:
                left_over -= 1
                index, low, high = waiting[left_over], lows[left_over], highs[left_over]
                split = nodes[index].feature
                while split != _LEAF:
                    left = nodes[index].left
                    if split != CLOCK_FEATURE:
                        # no jump: which way data goes is what a processor cannot guess
                        index = left + (1 if rows[row, split] >= nodes[index].threshold else 0)
                    else:
                        cut = nodes[index].cut
                        if cut >= high:
                            index = left
                        elif cut <= low:
                            index = left + 1
                        else:
                            waiting[left_over] = left + 1
                            lows[left_over], highs[left_over] = cut, high
                            left_over += 1
                            index, high = left, cut
                    split = nodes[index].feature
                value = nodes[index].threshold
                out[row, low] += value
                if high < count:
                    out[row, high] -= value
    for row in range(rows.shape[0]):
        total = base_score
        for clock in range(count):
            total += out[row, clock]
            out[row, clock] = total


@njit(cache=True, nogil=True)
def _finish_latency(  # noqa: PLR0917 (compiled functions take positions)
    latency: NDArray[np.float64],
    upper: NDArray[np.float64],
    parts: NDArray[np.float64],
    clock_ratios: NDArray[np.float64],
    phases: NDArray[np.intp],
    bound_factors: NDArray[np.float64],
) -> None:
    """Turn log residuals into seconds, in place, and fill the bound; neither rises with clock."""
    for row in range(latency.shape[0]):
        phase = phases[row]
        slowest, slowest_bound = 0.0, 0.0
        for clock in range(latency.shape[1] - 1, -1, -1):
            slowdown = 1.0 / clock_ratios[clock]
            base = (  # FittedBase.seconds
                parts[0, row]
                + parts[1, row] * slowdown
                + max(parts[2, row], parts[3, row] * slowdown)
                + max(parts[4, row], parts[5, row] * slowdown)
            )
            slowest = max(slowest, base * np.exp(latency[row, clock]))
            slowest_bound = max(slowest_bound, slowest * bound_factors[phase, clock])
            latency[row, clock] = slowest
            upper[row, clock] = slowest_bound


@njit(cache=True, nogil=True)
def _finish_power(  # noqa: PLR0917 (compiled functions take positions)
    power: NDArray[np.float64],
    latency: NDArray[np.float64],
    work: NDArray[np.float64],
    static_watts: NDArray[np.float64],
    work_rates: NDArray[np.float64],
    power_limit_watts: float,
) -> None:
    """Turn log ratios into watts, in place; never falling with clock, never above the limit."""
    for row in range(power.shape[0]):
        highest = 0.0
        for clock in range(power.shape[1]):
            joules = 0.0  # PowerBase.watts
            for kind in range(work.shape[0]):
                joules += work[kind, row] * work_rates[kind, clock]
            base = min(static_watts[clock] + joules / latency[row, clock], power_limit_watts)
            watts = min(base * np.exp(power[row, clock]), power_limit_watts)
            highest = max(highest, watts)
            power[row, clock] = highest
