"""How bundles are trained: defaults, and a TOML file that changes them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields

from predictors.errors import RecordsError


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How a bundle is trained.

    Attributes:
        latency_trees_count: Most trees of the latency model; early stopping may keep fewer.
        power_trees_count: Most trees of the power model.
        tree_depth: Depth of every tree. Serving cost grows with trees and depth.
        learning_rate: Share of each tree's correction that counts.
        minimum_leaf_rows_count: Fewest rows in a leaf.
        early_stopping_count: Trees without improvement on validation rows before fitting stops.
        validation_ratio: Share of the runs that decides when to stop.
        calibration_ratio: Share of the runs that sets the latency bound.
        test_ratio: Share of the runs kept for the metrics.
        violation_ratio: Share of iterations allowed to take longer than the bound.
        envelope_margin_ratio: Share of a load feature's range by which a shape may lie outside.
        seed: Of the split and of XGBoost.
        threads_count: Threads that XGBoost trains with; 0 means all cores.
    """

    latency_trees_count: int = 150
    power_trees_count: int = 150
    tree_depth: int = 5
    learning_rate: float = 0.15
    minimum_leaf_rows_count: int = 5
    early_stopping_count: int = 25
    validation_ratio: float = 0.1
    calibration_ratio: float = 0.2
    test_ratio: float = 0.1
    violation_ratio: float = 0.01
    envelope_margin_ratio: float = 0.1
    seed: int = 1
    threads_count: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work, all at once.

        Raises:
            RecordsError: Naming each setting, its value and what is allowed.
        """
        ranges = {
            "latency_trees_count": (1, 2000),
            "power_trees_count": (1, 2000),
            "tree_depth": (1, 10),
            "learning_rate": (0.001, 1.0),
            "minimum_leaf_rows_count": (1, 1_000_000),
            "early_stopping_count": (1, 1000),
            "validation_ratio": (0.01, 0.5),
            "calibration_ratio": (0.01, 0.5),
            "test_ratio": (0.01, 0.5),
            "violation_ratio": (0.0001, 0.5),
            "envelope_margin_ratio": (0.0, 10.0),
            "seed": (0, 2**31 - 1),
            "threads_count": (0, 1024),
        }
        faults = [
            f"{name} is {getattr(self, name)!r}; allowed: {low} to {high}"
            for name, (low, high) in ranges.items()
            if not low <= getattr(self, name) <= high
        ]
        if self.validation_ratio + self.calibration_ratio + self.test_ratio > 0.8:
            faults.append("validation, calibration and test ratios add up to more than 0.8")
        if faults:
            raise RecordsError("training settings: " + "; ".join(faults))

    @classmethod
    def from_toml(cls, text: str) -> TrainingSettings:
        """Read settings; what is absent keeps its default.

        Raises:
            RecordsError: If the text is no TOML, or a key or type is not known.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecordsError(f"training settings cannot be read as TOML: {error}") from None
        known = {item.name: type(getattr(cls(), item.name)) for item in fields(cls)}
        faults = []
        for name, value in document.items():
            if name not in known:
                faults.append(f"{name} is not known; allowed: {', '.join(known)}")
            elif isinstance(value, bool) or not isinstance(value, (int, known[name])):
                faults.append(f"{name} is {value!r}; allowed: a {known[name].__name__}")
        if faults:
            raise RecordsError("training settings: " + "; ".join(faults))
        return cls(**document)
