"""The seam between a session and what decides for it, and the usual way to fill it."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Protocol

from predictors.analytic import gpu_by_name
from predictors.architecture import ModelArchitecture, from_catalogue, from_config_json
from predictors.bundle import MANIFEST_FILE, find_bundle, load_bundle
from predictors.errors import ArchitectureError, BundleError
from predictors.features import Parallelism
from predictors.predictor import Engine, load_predictor
from throttle.control.advice import ParallelSize
from throttle.control.controller import Controller
from throttle.control.warm_up import warm_up
from throttle.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from predictors.predictor import BundlePredictor
    from throttle.control.evaluation import Evaluation
    from throttle.control.selection import Decision
    from throttle.control.settings import ControlSettings
    from throttle.control.state import EngineProfile, IterationState


#: Predictors kept for engines to come, about 0.5 MB each; those that serve keep their own. Whoever
#: may register may say a new architecture each time.
PREDICTORS_LIMIT = 32
#: Sizes that advice is given on.
_SIZES_GPUS_COUNTS = (1, 2, 4, 8)


class Brain(Protocol):
    """Decides for one engine. Called by one thread at a time; whatever it raises is a fault."""

    @property
    def latency_bias_ratio(self) -> float:
        """Observed over predicted duration."""
        ...

    @property
    def coverage_ratio(self) -> float | None:
        """Share of recent iterations within their upper bound; None before the first."""
        ...

    def observe(
        self,
        state: IterationState,
        observed_clock_mhz: int,
        observed_power_watts: float | None = None,
    ) -> None:
        """Take in one state, in order, with what was read from the GPUs as it came.

        Args:
            state: The state.
            observed_clock_mhz: Clock; 0 when not known.
            observed_power_watts: Mean power of one GPU since the state before, if known.
        """
        ...

    def decide(self, state: IterationState) -> Decision:
        """Choose the clock for what comes after a state that has been observed."""
        ...

    def evaluate(self, state: IterationState) -> Evaluation:
        """Judge every clock for a state that has been observed."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class GpuModel:
    """What kind of GPU an engine runs on.

    Attributes:
        name: Its name in the backend's words.
        clocks_mhz: Clocks that all of the engine's GPUs support, rising.
    """

    name: str
    clocks_mhz: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class EngineBrain:
    """A brain and what the engine is told about it.

    Attributes:
        brain: Decides.
        bundle: Name of the bundle that predicts; empty without one.
        candidate_clocks_mhz: Clocks that it may choose, rising.
    """

    brain: Brain
    bundle: str
    candidate_clocks_mhz: tuple[int, ...]


class BrainFactory(Protocol):
    """Makes the brain of each registration."""

    def build(self, profile: EngineProfile, gpu: GpuModel | None) -> EngineBrain:
        """Make a brain, or raise a `ThrottleError` or `PredictorsError` that the engine is told.

        Args:
            profile: The engine.
            gpu: Its GPUs; None when they are not on this machine (what-if questions only).
        """
        ...

    def warm_up(self) -> Iterator[tuple[str, str]]:
        """Do what is slow before serving; yields (thing, problem), problem empty if it is well."""
        ...


class ControllerFactory:
    """Brains that control by a trained bundle.

    Args:
        bundles_directory: Holds bundles, each in its own directory, or is the one bundle to use.
        settings: How clocks are chosen.
    """

    def __init__(self, bundles_directory: Path, settings: ControlSettings) -> None:
        self._directory = bundles_directory
        self._settings = settings
        self._lock = threading.Lock()
        self._predictors: dict[tuple[Path, Engine | None], tuple[int, BundlePredictor]] = {}

    def build(self, profile: EngineProfile, gpu: GpuModel | None) -> EngineBrain:
        """Find, load and check the bundle for an engine.

        Raises:
            NotFoundError: The model is not in the catalogue.
            InvalidInputError: Its config.json cannot be used.
            BundleError: There is no bundle for this engine, or it is damaged or made for another.
        """
        architecture = _architecture(profile)
        engine = None
        if gpu is not None:
            spread = Parallelism(profile.tensor_parallel_count, profile.expert_parallel_count)
            engine = Engine(gpu.name, architecture, spread, gpu.clocks_mhz)
            path = self._bundle_for(engine)
        else:
            path = self._only_bundle(architecture.name, profile)
        predictor = self._load(path, engine)
        trained = predictor.manifest.architecture
        if trained is not None:  # a table of another tool's points says nothing of the model
            _check_architecture(path, trained, architecture)
            if engine is not None:
                _check_gpu(path, predictor.manifest.gpu, engine.gpu)
        sizes = self._sizes(profile, engine) if profile.wants_advice and engine else ()
        return EngineBrain(
            Controller(profile, predictor, self._settings, sizes=sizes),
            path.name,
            tuple(int(clock) for clock in predictor.clocks_mhz),
        )

    def warm_up(self) -> Iterator[tuple[str, str]]:
        """Load every bundle, and decide once, which compiles what they share."""
        decided = False
        for manifest in sorted(self._directory.glob(f"*/{MANIFEST_FILE}")):
            try:
                generic = load_bundle(manifest.parent).manifest.kind == "generic"
                # a generic bundle predicts only once an engine says what it serves
                predictor = None if generic else self._load(manifest.parent, None)
                if predictor is not None and not decided:
                    warm_up(predictor)
                    decided = True
            except BundleError as error:
                yield manifest.parent.name, str(error)
            else:
                yield manifest.parent.name, predictor.fallback_reason if predictor else ""

    def _sizes(self, profile: EngineProfile, engine: Engine) -> tuple[ParallelSize, ...]:
        """The engine on 1, 2, 4 and 8 GPUs, where there is a bundle and the model has room.

        Memory is that of the engine as it is: what its KV cache and its weights take on one GPU.
        """
        model, spread = engine.architecture, engine.parallelism
        gpus = len(profile.gpu_uuids)
        weights = model.total_parameters_count * model.weight_bytes
        own_tokens = float(profile.kv_blocks_count * profile.kv_block_tokens)
        bytes_per_gpu = (own_tokens * model.kv_bytes_per_token + weights) / gpus
        found = []
        for count in _SIZES_GPUS_COUNTS:
            kv_tokens = (bytes_per_gpu * count - weights) / model.kv_bytes_per_token
            resized = _resized(spread, gpus, count)
            if kv_tokens <= 0.0 or resized is None:
                continue
            size = dataclasses.replace(engine, parallelism=resized)
            try:
                predictor = self._load(self._bundle_for(size), size)
            except BundleError:
                continue  # there is no bundle for that size, and advice does without
            found.append(ParallelSize(count, predictor, kv_tokens))
        return tuple(found)

    def _load(self, path: Path, engine: Engine | None) -> BundlePredictor:
        # a bundle that was trained anew is read anew; predictors keep no state between calls
        try:
            written = (path / MANIFEST_FILE).stat().st_mtime_ns
        except OSError as error:
            raise BundleError(f"bundle {path} cannot be read: {error}") from None
        with self._lock:
            known = self._predictors.get((path, engine))
            if known is None or known[0] != written:
                try:
                    known = (written, load_predictor(path, engine))
                except BundleError:
                    if known is None:
                        raise
                    known = (written, known[1])  # damaged since: what is in memory serves on
            self._predictors.pop((path, engine), None)  # the one used last comes last
            self._predictors[path, engine] = known
            if len(self._predictors) > PREDICTORS_LIMIT:
                del self._predictors[next(iter(self._predictors))]
            return known[1]

    def _bundle_for(self, engine: Engine) -> Path:
        if (self._directory / MANIFEST_FILE).is_file():
            return self._directory
        return find_bundle(
            self._directory,
            engine.gpu,
            engine.architecture.name,
            engine.parallelism.tensor_parallel_count,
            engine.parallelism.expert_parallel_count,
        )

    def _only_bundle(self, model_name: str, profile: EngineProfile) -> Path:
        spread = f"tp{profile.tensor_parallel_count}ep{profile.expert_parallel_count}"
        pattern = f"*__{model_name}__{spread}"
        found = sorted(
            manifest.parent for manifest in self._directory.glob(f"{pattern}/{MANIFEST_FILE}")
        )
        if len(found) != 1:
            raise BundleError(
                f"{len(found)} bundles {pattern} in {self._directory}; allowed: exactly one when "
                f"the GPUs are not on this machine; there: "
                f"{', '.join(path.name for path in found) or 'none'}"
            )
        return found[0]


def _resized(spread: Parallelism, gpus_count: int, count: int) -> Parallelism | None:
    """Spread in the same manner over another number of GPUs; None where it is not plain how."""
    tensor, expert = spread.tensor_parallel_count, spread.expert_parallel_count
    if not {tensor, expert} <= {1, gpus_count}:
        return None
    return Parallelism(count if tensor > 1 or expert == 1 else 1, count if expert > 1 else 1)


def _architecture(profile: EngineProfile) -> ModelArchitecture:
    formats = (profile.weight_dtype, profile.kv_dtype)
    if profile.model_config_json:
        try:
            return from_config_json(profile.model_config_json, profile.model_name, *formats)
        except ArchitectureError as error:
            raise InvalidInputError(
                "registration.model.config_json", str(error), "a config.json of a known kind"
            ) from None
    try:
        return from_catalogue(profile.model_name, *formats)
    except ArchitectureError as error:
        raise NotFoundError(f"registration.model.name: {error}") from None


def _check_gpu(path: Path, trained: str, served: str) -> None:
    name = gpu_by_name(served).name
    if trained != name:
        raise BundleError(
            f"bundle {path.name} was made for GPU {trained!r}; the engine's is {name!r}. "
            "Train one with throttle-predictors train"
        )


def _check_architecture(path: Path, trained: ModelArchitecture, served: ModelArchitecture) -> None:
    different = [
        f"{field.name} is {getattr(served, field.name)!r}, "
        f"trained with {getattr(trained, field.name)!r}"
        for field in dataclasses.fields(ModelArchitecture)
        if field.name != "name" and getattr(served, field.name) != getattr(trained, field.name)
    ]
    if different:
        raise BundleError(
            f"bundle {path.name} was made for another model: {'; '.join(different)}. "
            "Train one with throttle-predictors train"
        )
