"""A trained model's trees, read and laid out for the sweep (`predictors.compiled_sweep`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.errors import BundleError
from predictors.features import CLOCK_FEATURE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: Feature index that marks a leaf.
LEAF = -1

#: Deepest tree that the walk's stack holds.
MAXIMUM_DEPTH = 32

#: One node in 16 bytes. A leaf has feature `LEAF`; the right child follows the left one; `cut` is
#: how many candidate clocks go left where the clock is split, else the place of the threshold in
#: `Forest.thresholds`; `value` is a leaf's.
_NODE = np.dtype(
    [("feature", np.int32), ("left", np.int32), ("cut", np.int32), ("value", np.float32)]
)


@dataclass(frozen=True, slots=True)
class Forest:
    """All trees of one model.

    Attributes:
        roots: Index of each tree's root in `nodes`.
        nodes: All nodes, of type `_NODE`, each tree level by level.
        base_score: What the sum of the leaves starts from.
        thresholds: All thresholds of each feature in turn, each once.
        firsts: Where those of each feature begin, and where the last ends, (F + 1,).
    """

    roots: NDArray[np.int32]
    nodes: NDArray[np.void]
    base_score: float
    thresholds: NDArray[np.float32]
    firsts: NDArray[np.int64]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Its fields, in order: what the sweep takes."""
        return self.roots, self.nodes, self.base_score, self.thresholds, self.firsts

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
        thresholds: list[NDArray[np.float32]] = []
        firsts = [0]
        for feature in range(len(features)):
            splits = nodes["feature"] == feature
            if feature == CLOCK_FEATURE:
                nodes["cut"][splits] = np.searchsorted(clocks, nodes["value"][splits], side="left")
                different = np.empty(0, np.float32)
            else:
                different, places = np.unique(nodes["value"][splits], return_inverse=True)
                nodes["cut"][splits] = firsts[-1] + places
            thresholds.append(different)
            firsts.append(firsts[-1] + len(different))
        return cls(roots, nodes, _base_score(learner), np.concatenate(thresholds), np.array(firsts))


def _by_level(tree: dict[str, Any]) -> NDArray[np.void]:
    """One tree's nodes level by level, so that siblings are neighbors."""
    order = [0]
    nodes = np.zeros(len(tree["left_children"]), dtype=_NODE)
    for index, node in enumerate(order):  # grows while it is walked
        left = tree["left_children"][node]
        nodes[index]["value"] = tree["split_conditions"][node]
        nodes[index]["feature"] = LEAF if left < 0 else tree["split_indices"][node]
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
        if _depth(tree) > MAXIMUM_DEPTH:
            raise BundleError(
                f"{source}: tree {number} is deeper than {MAXIMUM_DEPTH}; train shallower trees"
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
