"""Trained predictors on disk: a directory with a manifest, two models and a model card."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors import analytic
from predictors.active_experts import Routing
from predictors.architecture import ModelArchitecture
from predictors.calibration import PHASES, Calibration
from predictors.errors import BundleError, PredictorsError
from predictors.features import ENVELOPE_FEATURES, FEATURES, FeatureSpace, Parallelism
from predictors.generic import GENERIC_FEATURES, GenericSpace
from predictors.power_base import ROOFLINE_WORK, PowerBase, power_coefficients
from predictors.table import (
    TABLE_COEFFICIENTS,
    TABLE_FEATURES,
    TABLE_TERMS,
    TABLE_WORK,
    TableBase,
    TableSpace,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from predictors.features import Space

#: Version of the directory's layout and of what the features mean.
FORMAT_VERSION = 3

#: What a bundle is about -> the features of its trees. "model": one model, spread in one way, on
#: one kind of GPU. "generic": any model on any known GPU, once it is bound to them. "table": the
#: points of another tool's table.
KINDS: dict[str, dict[str, str]] = {
    "model": FEATURES,
    "generic": GENERIC_FEATURES,
    "table": TABLE_FEATURES,
}

#: Directory of the generic bundle.
GENERIC_NAME = "generic-moe"

MANIFEST_FILE = "manifest.json"
LATENCY_FILE = "latency.ubj"
POWER_FILE = "power.ubj"
CARD_FILE = "MODEL_CARD.md"
_HASHED_FILES = (LATENCY_FILE, POWER_FILE, CARD_FILE)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a bundle but its trees.

    Attributes:
        kind: One of `KINDS`.
        name: Directory name of the bundle.
        gpu: Name of the GPU, a key of `predictors.analytic.GPUS`; of a table, as the table has it;
            of an unbound generic bundle, empty.
        maximum_clock_mhz: Clock that clock ratios refer to; 0 of an unbound generic bundle.
        architecture: Dimensions of the model; None where nobody said.
        parallelism: How the model is spread; None likewise.
        routing: How tokens spread over experts.
        clocks_mhz: Candidate clocks, rising; empty of an unbound generic bundle.
        base_coefficients: Of the latency base.
        power_coefficients: Of the power base.
        by_gpu: Of a generic bundle, GPU -> both coefficients fitted to it; they replace those above
            when the bundle is bound to that GPU.
        power_limit_watts: Power limit of one GPU; predictions stay below it.
        calibration: Margins of the latency bound.
        idle_clocks_mhz: Clocks at which idle power is known, rising.
        idle_watts: Idle power of one GPU there.
        idle_source: "recorded", "nominal", ...
        envelope: Load feature -> lowest and highest value in training.
        envelope_margin_ratio: Share of that range by which a shape may lie outside.
        provenance: "measured" or "simulated".
        engine: What made the records: engine name and version, formats, limits.
        data: Hash and counts of the training data.
        training: Settings of the training.
        metrics: Accuracy on rows that training did not see.
        library_versions: Versions of what trained it.
    """

    kind: str
    name: str
    gpu: str
    maximum_clock_mhz: float
    architecture: ModelArchitecture | None
    parallelism: Parallelism | None
    routing: Routing
    clocks_mhz: tuple[int, ...]
    base_coefficients: Mapping[str, float]
    power_coefficients: Mapping[str, float]
    by_gpu: Mapping[str, Mapping[str, Mapping[str, float]]]
    power_limit_watts: float
    calibration: Calibration
    idle_clocks_mhz: tuple[float, ...]
    idle_watts: tuple[float, ...]
    idle_source: str
    envelope: Mapping[str, tuple[float, float]]
    envelope_margin_ratio: float
    provenance: str
    engine: Mapping[str, Any]
    data: Mapping[str, Any]
    training: Mapping[str, Any]
    metrics: Mapping[str, Any]
    library_versions: Mapping[str, str]

    @property
    def active_experts_source(self) -> str:
        """What the count of active experts rests on: uniform, reported or residuals; or none."""
        return self.routing.source if self.kind != "table" else "none"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A loaded and checked bundle.

    Attributes:
        manifest: Everything but the trees.
        latency_model: Latency trees in XGBoost's UBJSON format.
        power_model: Power trees likewise.
    """

    manifest: Manifest
    latency_model: bytes
    power_model: bytes

    @property
    def features(self) -> dict[str, str]:
        """Feature name -> unit, in the order of the models' columns."""
        return KINDS[self.manifest.kind]

    def space(self, active_experts_ratio: float = 1.0) -> Space:
        """What turns shapes into the models' features.

        Args:
            active_experts_ratio: Active experts over those of the routing's formula.

        Raises:
            BundleError: If the bundle is generic and not bound to a model.
        """
        manifest = self.manifest
        if manifest.kind == "table":
            return TableSpace()
        if manifest.architecture is None or manifest.parallelism is None:
            raise BundleError(
                f"bundle {manifest.name} is for any model; bind it to one first (`Bundle.bound`)"
            )
        space = GenericSpace if manifest.kind == "generic" else FeatureSpace
        return space(
            manifest.architecture,
            manifest.parallelism,
            analytic.gpu_by_name(manifest.gpu),
            manifest.routing,
            active_experts_ratio,
        )

    def clock_ratios(self) -> NDArray[np.float64]:
        """Candidate clocks over the maximum clock, (C,)."""
        clocks = np.array(self.manifest.clocks_mhz, dtype=np.float64)
        return clocks / self.manifest.maximum_clock_mhz

    def base(self) -> analytic.LatencyBase:
        """The base that the latency model corrects."""
        base = TableBase if self.manifest.kind == "table" else analytic.FittedBase
        return base(self.manifest.base_coefficients)

    def power_base(self) -> PowerBase:
        """The base that the power model corrects."""
        if self.manifest.kind == "table":
            return PowerBase(self.manifest.power_coefficients, TABLE_WORK, TABLE_TERMS)
        return PowerBase(self.manifest.power_coefficients)

    def bound(
        self,
        gpu: str,
        architecture: ModelArchitecture,
        parallelism: Parallelism,
        clocks_mhz: Sequence[int],
    ) -> Bundle:
        """A generic bundle for one model on one kind of GPU; other bundles as they are.

        Args:
            gpu: Our name of the GPU or the driver's.
            architecture: Dimensions of the model.
            parallelism: How it is spread.
            clocks_mhz: Candidate clocks, rising.

        Raises:
            PredictorsError: If the GPU is not known.
        """
        if self.manifest.kind != "generic":
            return self
        nominal = analytic.gpu_by_name(gpu)
        common = {
            "base": self.manifest.base_coefficients,
            "power": self.manifest.power_coefficients,
        }
        own = self.manifest.by_gpu.get(nominal.name, common)
        manifest = replace(
            self.manifest,
            gpu=nominal.name,
            maximum_clock_mhz=float(nominal.maximum_clock_mhz),
            architecture=architecture,
            parallelism=parallelism,
            clocks_mhz=tuple(clocks_mhz),
            base_coefficients=own["base"],
            power_coefficients={
                name: value * nominal.power_limit_watts for name, value in own["power"].items()
            },
            power_limit_watts=nominal.power_limit_watts,
            idle_clocks_mhz=(float(nominal.minimum_clock_mhz), float(nominal.maximum_clock_mhz)),
            idle_watts=(nominal.parked_power_watts, nominal.idle_power_watts),
            idle_source="nominal",
        )
        return replace(self, manifest=manifest)

    def idle_power_watts(self) -> NDArray[np.float64]:
        """Idle power at the candidate clocks, (C,); flat beyond the known clocks."""
        manifest = self.manifest
        return np.interp(manifest.clocks_mhz, manifest.idle_clocks_mhz, manifest.idle_watts)


def bundle_name(gpu: str, model_name: str, parallelism: Parallelism) -> str:
    """Directory name: `<gpu>__<model>__tp<N>ep<M>`."""
    tensor, expert = parallelism.tensor_parallel_count, parallelism.expert_parallel_count
    return f"{gpu}__{model_name.rsplit('/', 1)[-1].lower()}__tp{tensor}ep{expert}"


def find_bundle(
    directory: Path,
    gpu: str,
    model_name: str,
    tensor_parallel_count: int = 1,
    expert_parallel_count: int = 1,
) -> Path:
    """Find the bundle for an engine: its own, or the generic one, whose name tells.

    Args:
        directory: Holds bundles, each in its directory.
        gpu: Our name of the GPU or the driver's.
        model_name: Model name; case and a leading organization do not matter.
        tensor_parallel_count: GPUs that share every attention layer.
        expert_parallel_count: GPUs that share the experts.

    Raises:
        BundleError: If there is none; the message lists those present.
    """
    parallelism = Parallelism(tensor_parallel_count, expert_parallel_count)
    path = Path(directory) / bundle_name(analytic.gpu_by_name(gpu).name, model_name, parallelism)
    generic = Path(directory) / GENERIC_NAME
    for candidate in (path, generic):
        if (candidate / MANIFEST_FILE).is_file():
            return candidate
    present = sorted(inside.parent.name for inside in Path(directory).glob(f"*/{MANIFEST_FILE}"))
    raise BundleError(
        f"no bundle {path.name} in {directory}; there: {', '.join(present) or 'none'}. "
        "Train one with throttle-predictors train"
    )


def write_bundle(
    directory: Path, manifest: Manifest, latency_model: bytes, power_model: bytes, card: str
) -> Path:
    """Write a bundle below `directory`; the same content gives the same bytes.

    Returns:
        The bundle's directory.
    """
    path = Path(directory) / manifest.name
    path.mkdir(parents=True, exist_ok=True)
    contents = {LATENCY_FILE: latency_model, POWER_FILE: power_model, CARD_FILE: card.encode()}
    for name, content in contents.items():
        (path / name).write_bytes(content)
    document = {
        "format_version": FORMAT_VERSION,
        "features": list(KINDS[manifest.kind]),
        "units": KINDS[manifest.kind],
        "targets": {
            "latency": "log(seconds / base seconds)",
            "power": "log(watts / base watts)",
        },
        "roofline": _roofline(manifest),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        **asdict(manifest),
    }
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False)
    (path / MANIFEST_FILE).write_text(text + "\n", "utf-8")
    return path


def load_bundle(directory: Path) -> Bundle:
    """Read a bundle and check that this code understands it.

    Args:
        directory: The bundle's own directory.

    Raises:
        BundleError: If it is missing, damaged, or made with other features or another version.
    """
    path = Path(directory)
    try:
        document = json.loads((path / MANIFEST_FILE).read_text("utf-8"))
        contents = {name: (path / name).read_bytes() for name in _HASHED_FILES}
    except (OSError, ValueError) as error:
        raise BundleError(f"bundle {path} cannot be read: {error}") from None
    _check(path, "format_version", document.get("format_version"), FORMAT_VERSION)
    features = KINDS.get(document.get("kind"))
    if features is None:
        raise BundleError(
            f"bundle {path}: kind is {document.get('kind')!r}; allowed: {', '.join(KINDS)}"
        )
    _check(path, "features", document.get("features"), list(features))
    _check(path, "units", document.get("units"), features)
    for name, content in contents.items():
        actual = hashlib.sha256(content).hexdigest()
        _check(path, f"sha256 of {name}", actual, document.get("sha256", {}).get(name))
    try:
        manifest = _manifest(document)
        _check(path, "roofline", document.get("roofline"), _roofline(manifest))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"manifest of bundle {path} is damaged: {error!r}") from None
    except BundleError:
        raise
    except PredictorsError as error:
        raise BundleError(f"bundle {path}: {error}") from None
    clocks = manifest.clocks_mhz
    if (not clocks and manifest.kind != "generic") or any(
        low >= high for low, high in itertools.pairwise(clocks)
    ):
        raise BundleError(f"bundle {path}: clocks_mhz is {clocks}; allowed: rising clocks")
    return Bundle(manifest, contents[LATENCY_FILE], contents[POWER_FILE])


def resolve_bundle(directory: Path) -> Path:
    """The bundle's own directory: this one, or the only one below it.

    Raises:
        BundleError: If there is none, or several.
    """
    path = Path(directory)
    if (path / MANIFEST_FILE).is_file():
        return path
    inside = sorted(manifest.parent for manifest in path.glob(f"*/{MANIFEST_FILE}"))
    if len(inside) != 1:
        names = ", ".join(found.name for found in inside) or "none"
        raise BundleError(
            f"{path} is no bundle, and holds {len(inside)} ({names}); allowed: a bundle, or a "
            "directory with exactly one"
        )
    return inside[0]


def _roofline(manifest: Manifest) -> dict[str, Any]:
    """Constants that the features and the base depend on: other ones make another model."""
    if manifest.kind == "table":
        return {}
    gpus = [manifest.gpu] if manifest.gpu else list(analytic.GPUS)
    return {
        "compute_efficiency": analytic.COMPUTE_EFFICIENCY,
        "memory_efficiency": analytic.MEMORY_EFFICIENCY,
        "fixed_seconds_per_layer": analytic.FIXED_SECONDS_PER_LAYER,
        "seconds_per_sequence": analytic.SECONDS_PER_SEQUENCE,
        "communication_bytes_per_second": analytic.COMMUNICATION_BYTES_PER_SECOND,
        "gpus": {gpu: asdict(analytic.gpu_by_name(gpu)) for gpu in gpus},
    }


def _check(path: Path, what: str, value: object, allowed: object) -> None:
    if value != allowed:
        raise BundleError(
            f"bundle {path}: {what} is {value!r}; allowed: {allowed!r}. Train it again"
        )


def _manifest(document: dict[str, Any]) -> Manifest:
    margins = document["calibration"]["log_margins"]
    counts = document["calibration"]["rows_counts"]
    calibration = Calibration(
        float(document["calibration"]["violation_ratio"]),
        tuple(document["calibration"]["clock_band_edges"]),
        {phase: tuple(map(float, margins[phase])) for phase in PHASES},
        {phase: tuple(map(int, counts[phase])) for phase in PHASES},
    )
    envelope = {
        name: (float(document["envelope"][name][0]), float(document["envelope"][name][1]))
        for name in ENVELOPE_FEATURES
    }
    kind = str(document["kind"])
    names = TABLE_COEFFICIENTS if kind == "table" else analytic.COEFFICIENTS
    work = TABLE_WORK if kind == "table" else ROOFLINE_WORK
    power_names = power_coefficients(work)
    architecture, parallelism = document["architecture"], document["parallelism"]
    return Manifest(
        kind=kind,
        name=str(document["name"]),
        gpu=str(document["gpu"]),
        maximum_clock_mhz=float(document["maximum_clock_mhz"]),
        architecture=ModelArchitecture(**architecture) if architecture else None,
        parallelism=Parallelism(**parallelism) if parallelism else None,
        routing=Routing(**document["routing"]),
        clocks_mhz=tuple(map(int, document["clocks_mhz"])),
        base_coefficients={name: float(document["base_coefficients"][name]) for name in names},
        power_coefficients={
            name: float(document["power_coefficients"][name]) for name in power_names
        },
        by_gpu={
            gpu: {
                "base": {name: float(own["base"][name]) for name in names},
                "power": {name: float(own["power"][name]) for name in power_names},
            }
            for gpu, own in document["by_gpu"].items()
        },
        power_limit_watts=float(document["power_limit_watts"]),
        calibration=calibration,
        idle_clocks_mhz=tuple(map(float, document["idle_clocks_mhz"])),
        idle_watts=tuple(map(float, document["idle_watts"])),
        idle_source=str(document["idle_source"]),
        envelope=envelope,
        envelope_margin_ratio=float(document["envelope_margin_ratio"]),
        provenance=str(document["provenance"]),
        engine=document["engine"],
        data=document["data"],
        training=document["training"],
        metrics=document["metrics"],
        library_versions=document["library_versions"],
    )
