"""The frequency sweep: every clock at once for the price of about one row.

For each shape every tree is walked once with the interval of clocks still alive. A split on the
clock that divides them takes both branches, each with its part. A leaf adds its value to a
difference array over the clocks, and a running sum gives the prediction at every clock. The
numbers are those of row-by-row prediction, up to the order of summation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from predictors.calibration import OLD_KV_RATIO, phases_of
from predictors.compiled_features import CompiledFeatures, build_features
from predictors.elementary import compiled, exponentials
from predictors.errors import BundleError
from predictors.features import CLOCK_FEATURE, FeatureSpace
from predictors.prediction import SHAPE_COLUMNS, Prediction
from predictors.predictor import BundlePredictor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from predictors.bundle import Bundle

_SHAPE_WIDTH = len(SHAPE_COLUMNS)

#: Feature index that marks a leaf.
_LEAF = -1

#: Deepest tree that the walk's stack holds.
_MAXIMUM_DEPTH = 32

#: Rows that walk a tree together, marked by the bits of a number.
_ROWS_AT_ONCE = 32

#: Branches that may wait: one at each level of a tree.
_WAITING_LIMIT = _MAXIMUM_DEPTH + 1


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

        self._features: CompiledFeatures | None = None
        self._model: tuple[Any, ...] | None = None
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
            self._features = CompiledFeatures(space, self._base.weights, self._power_base.weights)
            self._model = (*self._features.arguments, *self._forests())

    def _forests(self) -> tuple[Any, ...]:
        """What `_predict` takes after phases and results."""
        return (
            self._latency.roots,
            self._latency.nodes,
            self._latency.base_score,
            self._power.roots,
            self._power.nodes,
            self._power.base_score,
            self._clock_ratios,
            self._bound_factors,
            self._static_watts,
            self._work_rates,
            float(self.manifest.power_limit_watts),
        )

    @property
    def model(self) -> tuple[Any, ...] | None:
        """What `predict_shapes` takes after the shapes; None where that cannot build features."""
        return self._model

    @property
    def envelope(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What `shapes_covered` takes after the shapes."""
        return self._lowest, self._highest

    def covers(self, shapes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell, per shape, whether its load lies inside the range seen in training, shape (K,)."""
        return shapes_covered(np.ascontiguousarray(shapes, np.float64), *self.envelope)

    def predict(self, shapes: NDArray[np.float64]) -> Prediction:
        """Predict a (K, 7) matrix of shapes at every clock; see `Predictor.predict`."""
        if self._model is not None and shapes.ndim == 2:
            found = predict_shapes(np.ascontiguousarray(shapes, np.float64), self._model)
            if len(found):
                return Prediction(found[0], found[1], found[2])
        # which also says what is wrong with shapes that are not allowed
        features, terms = self._space.build(shapes)
        found = np.empty((3, len(shapes), len(self._clock_ratios)))
        _predict(
            features,
            self._base.parts(terms),
            self._power_base.work(terms),
            # a new array: other forms of `shapes` would be compiled for once more, while serving
            phases_of(shapes),
            found,
            *self._forests(),
        )
        return Prediction(found[0], found[1], found[2])


@compiled
def predict_shapes(shapes: NDArray[np.float64], model: tuple[Any, ...]) -> NDArray[np.float64]:
    """Latency, its bound and power of (K, 7) shapes, (3, K, C); (0, K, C) if one is not allowed.

    Args:
        shapes: What is computed, columns as in `SHAPE_COLUMNS`.
        model: Of a `SweepPredictor`.
    """
    (
        constants,
        table,
        weights,
        features_count,
        parts_count,
        latency_roots,
        latency_nodes,
        latency_base_score,
        power_roots,
        power_nodes,
        power_base_score,
        clock_ratios,
        bound_factors,
        static_watts,
        work_rates,
        power_limit_watts,
    ) = model
    rows_count, clocks_count = len(shapes), len(clock_ratios)
    if shapes.shape[1] != _SHAPE_WIDTH:
        return np.empty((0, rows_count, clocks_count))
    features = np.empty((features_count, rows_count), np.float32)
    weighed = np.empty((len(weights), rows_count))
    if not build_features(shapes, constants, table, weights, features, weighed):
        return np.empty((0, rows_count, clocks_count))
    phases = np.zeros(rows_count, np.intp)
    for row in range(rows_count):  # `phases_of`
        requests, tokens, old = shapes[row, 0], shapes[row, 1], shapes[row, 2]
        if tokens > 0.0:
            phases[row] = 2 if requests > 1.5 and old > OLD_KV_RATIO * tokens else 1
    found = np.empty((3, rows_count, clocks_count))
    _predict(
        features,
        weighed[:parts_count],
        weighed[parts_count:],
        phases,
        found,
        latency_roots,
        latency_nodes,
        latency_base_score,
        power_roots,
        power_nodes,
        power_base_score,
        clock_ratios,
        bound_factors,
        static_watts,
        work_rates,
        power_limit_watts,
    )
    return found


@compiled
def shapes_covered(
    shapes: NDArray[np.float64], lowest: NDArray[np.float64], highest: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Whether `envelope_columns` of each of (K, 7) shapes lie within their ranges, (K,)."""
    inside = np.empty(len(shapes), np.bool_)
    for row in range(len(shapes)):
        covered = True
        for column in range(len(lowest)):
            if column < 6:
                value = shapes[row, column]
            elif column == 6:
                value = shapes[row, 1] + shapes[row, 5]
            else:
                value = shapes[row, 4] / max(shapes[row, 3], 1.0)
            covered = covered and lowest[column] <= value <= highest[column]
        inside[row] = covered
    return inside


@compiled
def _predict(
    features: NDArray[np.float32],
    parts: NDArray[np.float64],
    work: NDArray[np.float64],
    phases: NDArray[np.intp],
    found: NDArray[np.float64],
    latency_roots: NDArray[np.int32],
    latency_nodes: NDArray[Any],
    latency_base_score: float,
    power_roots: NDArray[np.int32],
    power_nodes: NDArray[Any],
    power_base_score: float,
    clock_ratios: NDArray[np.float64],
    bound_factors: NDArray[np.float64],
    static_watts: NDArray[np.float64],
    work_rates: NDArray[np.float64],
    power_limit_watts: float,
) -> None:
    """Fill latency, bound and power, (3, K, C); rows that the walk can mark at once in turn."""
    latency, upper, power = found[0], found[1], found[2]
    rows_count, clocks_count = latency.shape
    room = (clocks_count + 1) * min(rows_count, _ROWS_AT_ONCE)
    bits, base = np.empty(room, np.int64), np.empty(clocks_count)
    margins, factors = np.empty(room), np.empty(room)
    for first in range(0, rows_count, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, rows_count - first)
        size = clocks_count * count
        form = (clocks_count + 1, count)
        sums = margins[: size + count].reshape(form)
        ratios = factors[: size + count].reshape(form)
        _sweep(features, first, latency_roots, latency_nodes, latency_base_score, sums)
        exponentials(margins, bits, factors, size)
        _finish_latency(
            latency, upper, ratios, first, parts, clock_ratios, phases, bound_factors, base
        )
        _sweep(features, first, power_roots, power_nodes, power_base_score, sums)
        exponentials(margins, bits, factors, size)
        _finish_power(
            power, latency, ratios, first, work, static_watts, work_rates, power_limit_watts, base
        )


@compiled
def _sweep(
    features: NDArray[np.float32],
    first: int,
    roots: NDArray[np.int32],
    nodes: NDArray[Any],
    base_score: float,
    out: NDArray[np.float64],
) -> None:
    """Fill `out` (C + 1, rows) with the forest's sums for the rows from `first` on.

    The last row of `out` is where intervals that reach beyond the last clock end.
    """
    clocks_count, rows_count = len(out) - 1, out.shape[1]
    out[:] = 0.0
    waiting = np.empty(_WAITING_LIMIT, np.int32)
    marks = np.empty(_WAITING_LIMIT, np.int64)
    lows = np.empty(_WAITING_LIMIT, np.int32)
    highs = np.empty(_WAITING_LIMIT, np.int32)
    everyone = np.int64((1 << rows_count) - 1)
    for root in roots:
        waiting[0], marks[0], lows[0], highs[0] = root, everyone, 0, clocks_count
        left_over = 1
        while left_over:
            left_over -= 1
            index, mark = waiting[left_over], marks[left_over]
            low, high = lows[left_over], highs[left_over]
            split = nodes[index].feature
            while split != _LEAF:
                left = nodes[index].left
                if split != CLOCK_FEATURE:
                    threshold = nodes[index].threshold
                    right = np.int64(0)
                    for row in range(rows_count):
                        right |= np.int64(features[split, first + row] >= threshold) << row
                    right &= mark
                    if right == 0:
                        index = left
                    elif right == mark:
                        index = left + 1
                    else:
                        waiting[left_over], marks[left_over] = left + 1, right
                        lows[left_over], highs[left_over] = low, high
                        left_over += 1
                        index, mark = left, mark ^ right
                else:
                    cut = nodes[index].cut
                    if cut >= high:
                        index = left
                    elif cut <= low:
                        index = left + 1
                    else:
                        waiting[left_over], marks[left_over] = left + 1, mark
                        lows[left_over], highs[left_over] = cut, high
                        left_over += 1
                        index, high = left, cut
                split = nodes[index].feature
            value = nodes[index].threshold
            for row in range(rows_count):
                added = value if (mark >> row) & 1 else np.float32(0.0)
                out[low, row] += added
                out[high, row] -= added
    for row in range(rows_count):
        out[0, row] += base_score
    for clock in range(1, clocks_count):
        for row in range(rows_count):
            out[clock, row] += out[clock - 1, row]


@compiled
def _finish_latency(
    latency: NDArray[np.float64],
    upper: NDArray[np.float64],
    factors: NDArray[np.float64],
    first: int,
    parts: NDArray[np.float64],
    clock_ratios: NDArray[np.float64],
    phases: NDArray[np.intp],
    bound_factors: NDArray[np.float64],
    base: NDArray[np.float64],
) -> None:
    """Turn factors (C, rows) into seconds and their bound; neither rises with clock."""
    clocks_count = len(clock_ratios)
    for row in range(factors.shape[1]):
        at = first + row
        flat, slope = parts[0, at], parts[1, at]
        memory_1, compute_1, memory_2, compute_2 = parts[2:, at]
        for clock in range(clocks_count):
            slowdown = 1.0 / clock_ratios[clock]
            base[clock] = (  # FittedBase.seconds
                flat
                + slope * slowdown
                + max(memory_1, compute_1 * slowdown)
                + max(memory_2, compute_2 * slowdown)
            )
        widths = bound_factors[phases[at]]
        slowest = slowest_bound = 0.0
        for clock in range(clocks_count - 1, -1, -1):
            slowest = max(slowest, base[clock] * factors[clock, row])
            slowest_bound = max(slowest_bound, slowest * widths[clock])
            latency[at, clock] = slowest
            upper[at, clock] = slowest_bound


@compiled
def _finish_power(
    power: NDArray[np.float64],
    latency: NDArray[np.float64],
    factors: NDArray[np.float64],
    first: int,
    work: NDArray[np.float64],
    static_watts: NDArray[np.float64],
    work_rates: NDArray[np.float64],
    power_limit_watts: float,
    base: NDArray[np.float64],
) -> None:
    """Turn factors (C, rows) into watts, never falling with clock, never above the limit."""
    clocks_count = len(static_watts)
    for row in range(factors.shape[1]):
        at = first + row
        base[:] = 0.0
        for kind in range(len(work)):  # PowerBase.watts
            done = work[kind, at]
            for clock in range(clocks_count):
                base[clock] += done * work_rates[kind, clock]
        for clock in range(clocks_count):
            watts = static_watts[clock] + base[clock] / latency[at, clock]
            base[clock] = min(watts, power_limit_watts)
        highest = 0.0
        for clock in range(clocks_count):
            watts = min(base[clock] * factors[clock, row], power_limit_watts)
            highest = max(highest, watts)
            power[at, clock] = highest
