"""Trained predictors on disk: a directory with a manifest, two models and a model card."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors import analytic
from predictors.architecture import ModelArchitecture
from predictors.calibration import PHASES, Calibration
from predictors.errors import BundleError, PredictorsError
from predictors.features import ENVELOPE_FEATURES, FEATURES, FeatureSpace, Parallelism

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

#: Version of the directory's layout and of what the features mean.
FORMAT_VERSION = 1

MANIFEST_FILE = "manifest.json"
LATENCY_FILE = "latency.ubj"
POWER_FILE = "power.ubj"
CARD_FILE = "MODEL_CARD.md"
_HASHED_FILES = (LATENCY_FILE, POWER_FILE, CARD_FILE)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a bundle but its trees.

    Attributes:
        gpu: Name of the GPU, a key of `predictors.analytic.GPUS`.
        architecture: Dimensions of the model.
        parallelism: How the model is spread.
        clocks_mhz: Candidate clocks, rising.
        base_coefficients: Of `predictors.analytic.FittedBase`.
        reference_watts: Power that the power model's output is relative to.
        power_limit_watts: Power limit of one GPU; predictions stay below it.
        calibration: Margins of the latency bound.
        idle_clocks_mhz: Clocks at which idle power is known, rising.
        idle_watts: Idle power of one GPU there.
        idle_source: "measured" (in the records' sense) or "nominal".
        envelope: Load feature -> lowest and highest value in training.
        envelope_margin_ratio: Share of that range by which a shape may lie outside.
        provenance: "measured" or "simulated".
        engine: What made the records: engine name and version, formats, limits.
        data: Hash and counts of the training data.
        training: Settings of the training.
        metrics: Accuracy on rows that training did not see.
        library_versions: Versions of what trained it.
    """

    gpu: str
    architecture: ModelArchitecture
    parallelism: Parallelism
    clocks_mhz: tuple[int, ...]
    base_coefficients: Mapping[str, float]
    reference_watts: float
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
    def name(self) -> str:
        """Directory name of the bundle."""
        return bundle_name(self.gpu, self.architecture.name, self.parallelism)


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

    def feature_space(self) -> FeatureSpace:
        """What turns shapes into the models' features."""
        manifest = self.manifest
        gpu = analytic.gpu_by_name(manifest.gpu)
        return FeatureSpace(manifest.architecture, manifest.parallelism, gpu)

    def clock_ratios(self) -> NDArray[np.float64]:
        """Candidate clocks over the maximum clock, (C,)."""
        maximum = analytic.gpu_by_name(self.manifest.gpu).maximum_clock_mhz
        return np.array(self.manifest.clocks_mhz, dtype=np.float64) / maximum

    def base(self) -> analytic.FittedBase:
        """The base that the latency model corrects."""
        return analytic.FittedBase(self.manifest.base_coefficients)

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
    """Find the bundle for an engine.

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
    if (path / MANIFEST_FILE).is_file():
        return path
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
        "features": list(FEATURES),
        "units": dict(FEATURES),
        "targets": {
            "latency": "log(seconds / base seconds)",
            "power": "log(watts / reference_watts)",
        },
        "roofline": _roofline(manifest.gpu),
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
    _check(path, "features", document.get("features"), list(FEATURES))
    _check(path, "units", document.get("units"), FEATURES)
    for name, content in contents.items():
        actual = hashlib.sha256(content).hexdigest()
        _check(path, f"sha256 of {name}", actual, document.get("sha256", {}).get(name))
    try:
        manifest = _manifest(document)
        _check(path, "roofline", document.get("roofline"), _roofline(manifest.gpu))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"manifest of bundle {path} is damaged: {error!r}") from None
    except BundleError:
        raise
    except PredictorsError as error:
        raise BundleError(f"bundle {path}: {error}") from None
    clocks = manifest.clocks_mhz
    if not clocks or any(low >= high for low, high in itertools.pairwise(clocks)):
        raise BundleError(f"bundle {path}: clocks_mhz is {clocks}; allowed: rising clocks")
    return Bundle(manifest, contents[LATENCY_FILE], contents[POWER_FILE])


def _roofline(gpu: str) -> dict[str, Any]:
    """Constants that the features and the base depend on: other ones make another model."""
    return {
        "compute_efficiency": analytic.COMPUTE_EFFICIENCY,
        "memory_efficiency": analytic.MEMORY_EFFICIENCY,
        "fixed_seconds_per_layer": analytic.FIXED_SECONDS_PER_LAYER,
        "seconds_per_sequence": analytic.SECONDS_PER_SEQUENCE,
        "clock_share": analytic.CLOCK_SHARE,
        "gpu": asdict(analytic.gpu_by_name(gpu)),
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
    return Manifest(
        gpu=str(document["gpu"]),
        architecture=ModelArchitecture(**document["architecture"]),
        parallelism=Parallelism(**document["parallelism"]),
        clocks_mhz=tuple(map(int, document["clocks_mhz"])),
        base_coefficients={
            name: float(document["base_coefficients"][name]) for name in analytic.COEFFICIENTS
        },
        reference_watts=float(document["reference_watts"]),
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
