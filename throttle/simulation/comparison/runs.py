"""One run of one policy: what it is asked, how it is played, what is kept of it."""

from __future__ import annotations

import functools
import hashlib
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.bundle import MANIFEST_FILE, find_bundle
from predictors.features import Parallelism
from predictors.predictor import BundlePredictor, Engine, load_predictor
from throttle.control.state import Slos
from throttle.simulation.engine import Fidelity, SimulatedEngine
from throttle.simulation.experiment import play
from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.plant import Plant, draw_plant
from throttle.simulation.policies.catalogue import fixed_policy, make_policy, needs_predictor
from throttle.simulation.policies.disturbed import BiasedPredictor, Interrupted, Outages
from throttle.simulation.policies.policy import PolicyInputs
from throttle.simulation.workload import OpenLoop, Trace, load_trace

if TYPE_CHECKING:
    from throttle.control.state import IterationState
    from throttle.simulation.experiment import RunResult
    from throttle.simulation.policies.policy import Policy

#: Idle time after the last request, so that policies that park have parked.
REST_SECONDS = 2.0
#: Limits of an interactive assistant.
CHAT_SLOS = Slos(ttft_seconds=1.0, tpot_seconds=0.05)
#: Modules of `throttle.simulation` that a run at maximum clock is computed by.
ENGINE_MODULES = (
    "admission",
    "attention",
    "communication",
    "drawing",
    "engine",
    "equations",
    "experiment",
    "gpu",
    "operator_tables",
    "operators",
    "outcomes",
    "parameter_files",
    "parameters",
    "plant",
    "power",
    "requests",
    "routing",
    "scheduler",
    "speculation",
    "waiting",
    "workload",
)
_NOT_FOR_READERS = ("idle_power_watts", "clock_series", "bundle")


@dataclass(frozen=True, slots=True)
class Scene:
    """Where policies are compared: plant, trace, limits and knowledge.

    Attributes:
        plant: Shipped plant or TOML file.
        draw: Seed of a randomized plant around it; None for the plant itself.
        overrides: Dotted parameters and their values.
        trace: Shipped trace or CSV file.
        start_seconds: Start of the window that is played.
        duration_seconds: Its length; infinite for the rest of the trace.
        slos: Limits that requests are judged by.
        fidelity: What the engine tells.
        bundle: The predictor's directory, or a directory of bundles to find it in.
        predictor_ratio: Factor on predicted durations; not 1 for a deliberately biased predictor.
        outages: When states are lost; None for never.
    """

    plant: str
    trace: str
    draw: int | None = None
    overrides: tuple[tuple[str, Any], ...] = ()
    start_seconds: float = 0.0
    duration_seconds: float = float("inf")
    slos: Slos = CHAT_SLOS
    fidelity: Fidelity = Fidelity.FULL
    bundle: str = "models"
    predictor_ratio: float = 1.0
    outages: Outages | None = None

    def build_plant(self) -> Plant:
        """The plant; kept for the next run in this process."""
        return _plant(self.plant, self.draw, self.overrides)

    def build_trace(self) -> Trace:
        """The window of the trace as recorded; kept likewise."""
        return _window(self.trace, self.start_seconds, self.duration_seconds)

    def bundle_path(self) -> Path:
        """The predictor's directory.

        Raises:
            BundleError: There is no bundle for the plant.
        """
        path = Path(self.bundle)
        if (path / MANIFEST_FILE).is_file():
            return path
        parameters = self.build_plant().parameters
        spread = parameters.parallelism
        return find_bundle(
            path,
            parameters.gpu.name,
            parameters.model.name,
            spread.tensor_parallel_count,
            spread.expert_parallel_count,
        )

    def build_predictor(self) -> BundlePredictor:
        """The predictor, bound to the plant's engine if its bundle is generic; kept likewise.

        Raises:
            BundleError: There is no bundle for the plant.
        """
        plant = self.build_plant()
        parameters = plant.parameters
        spread = Parallelism(
            parameters.parallelism.tensor_parallel_count,
            parameters.parallelism.expert_parallel_count,
        )
        engine = Engine(parameters.gpu.name, plant.architecture, spread, plant.clocks_mhz)
        return _predictor(self.bundle_path(), engine)

    def digest(self) -> str:
        """Hash of everything that a run at maximum clock depends on, the engine's code too."""
        plant = self.build_plant().parameters
        trace = self.build_trace()
        content = repr((plant, trace.requests, self.slos, self.fidelity, _engine_digest()))
        return hashlib.sha256(content.encode()).hexdigest()[:24]


@functools.cache
def _engine_digest() -> str:
    """Hash of the sources that a run at maximum clock is computed by."""
    folder = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for name in ENGINE_MODULES:
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=4)
def _plant(name: str, draw: int | None, overrides: tuple[tuple[str, Any], ...]) -> Plant:
    if draw is None:
        return Plant.load(name, dict(overrides))
    return draw_plant(name, draw, dict(overrides))


@functools.lru_cache(maxsize=8)
def _window(name: str, start_seconds: float, duration_seconds: float) -> Trace:
    return load_trace(name).window(start_seconds, start_seconds + duration_seconds)


@functools.lru_cache(maxsize=4)
def _predictor(path: Path, engine: Engine) -> BundlePredictor:
    return load_predictor(path, engine)


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run.

    Attributes:
        scene: Where.
        policy: Name for `make_policy`.
        load: Share of the maximum-clock goodput.
        compression_ratio: How many times faster than recorded requests arrive.
        seed: Seeds chip, noise and switching delays.
        limit_ratio: Factor on the limits that the policy is told; it is judged by the true ones.
    """

    scene: Scene
    policy: str
    load: float
    compression_ratio: float
    seed: int
    limit_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What one run cost and how its requests fared; simulated.

    The fields are those of `throttle compare --json`; docs/results.md explains them.
    """

    policy: str
    plant: str
    trace: str
    load: float
    compression_ratio: float
    seed: int
    limit_ratio: float
    energy_joules: float
    energy_per_output_token_joules: float
    attainment_ratio: float
    ttft_p50_seconds: float
    ttft_p99_seconds: float
    tpot_p50_seconds: float
    tpot_p99_seconds: float
    tbt_p50_seconds: float
    tbt_p99_seconds: float
    e2e_p50_seconds: float
    e2e_p99_seconds: float
    requests_count: int
    output_tokens_count: int
    iterations_count: int
    preemptions_count: int
    clock_changes_count: int
    clock_changes_per_second: float
    clock_mean_mhz: float
    lost_count: int
    decision_p50_seconds: float
    decision_p99_seconds: float
    horizon_seconds: float
    idle_energy_joules: float
    wall_seconds: float
    clock_mhz: int | None = None
    idle_power_watts: float = 0.0
    clock_series: tuple[tuple[float, float], ...] = ()
    bundle: str = ""

    def extended_to(self, horizon_seconds: float) -> RunRecord:
        """The same run with idle power added until a later horizon."""
        idle = max(horizon_seconds - self.horizon_seconds, 0.0) * self.idle_power_watts
        energy = self.energy_joules + idle
        return replace(
            self,
            energy_joules=energy,
            energy_per_output_token_joules=energy / max(self.output_tokens_count, 1),
            idle_energy_joules=self.idle_energy_joules + idle,
            horizon_seconds=max(horizon_seconds, self.horizon_seconds),
        )

    def document(self) -> dict[str, Any]:
        """For JSON, without what only the comparison needs."""
        fields = asdict(self)
        for name in _NOT_FOR_READERS:
            del fields[name]
        return fields


def attainment_ratio(result: RunResult, slos: Slos) -> float:
    """Share of all arrived requests that keep TTFT, mean TPOT and E2E; single gaps are reported."""
    if not result.arrived_count:
        return 1.0
    ttft, tpot, e2e = (
        np.inf if each is None else each
        for each in (slos.ttft_seconds, slos.tpot_seconds, slos.e2e_seconds)
    )
    kept = sum(
        item.ttft_seconds <= ttft
        and (item.tpot_seconds is None or item.tpot_seconds <= tpot)
        and item.e2e_seconds <= e2e
        for item in result.outcomes
    )
    return kept / result.arrived_count


def scaled(slos: Slos, ratio: float) -> Slos:
    """Every limit times a factor."""
    return Slos(*(None if each is None else each * ratio for each in limits_of(slos)))


def limits_of(slos: Slos) -> tuple[float | None, ...]:
    """TTFT, TBT, TPOT and E2E limits, in this order."""
    return slos.ttft_seconds, slos.tbt_seconds, slos.tpot_seconds, slos.e2e_seconds


class _Timed:
    """Asks a policy and notes how long it took."""

    def __init__(self, policy: Policy, lock: InProcessLock) -> None:
        self._policy, self._lock = policy, lock
        self.seconds: list[float] = []

    def decide(self, state: IterationState) -> None:
        started = time.perf_counter()
        clock = self._policy.clock_mhz(state)
        self.seconds.append(time.perf_counter() - started)
        self._lock.set_mhz(clock)


def play_run(spec: RunSpec, policy: Policy | None = None) -> RunRecord:
    """Play one run.

    Args:
        spec: Which.
        policy: To be used instead of the one that `spec` names.
    """
    scene = spec.scene
    lock = InProcessLock()
    generator = random.Random(spec.seed)  # noqa: S311 - simulated
    gpu = SimulatedGpu(scene.build_plant(), lock, DiscardedTelemetry(), generator)
    trace = scene.build_trace().compressed(spec.compression_ratio)
    engine = SimulatedEngine(gpu, OpenLoop(trace.requests), scene.fidelity)
    if policy is None:
        policy = _policy(spec, engine, gpu)
    timed = _Timed(policy, lock)
    started = time.perf_counter()
    result = play(engine, gpu, timed.decide, rest_seconds=REST_SECONDS)
    wall = time.perf_counter() - started
    return _record(spec, result, timed.seconds, wall)


def _policy(spec: RunSpec, engine: SimulatedEngine, gpu: SimulatedGpu) -> Policy:
    scene = spec.scene
    if not needs_predictor(spec.policy):
        return fixed_policy(spec.policy)
    predictor: Any = scene.build_predictor()
    if scene.predictor_ratio != 1.0:
        predictor = BiasedPredictor(predictor, scene.predictor_ratio)
    uuids = tuple(f"GPU-simulated-{index}" for index in range(gpu.plant.gpus_count))
    profile = engine.profile("compared", uuids, scaled(scene.slos, spec.limit_ratio))
    policy = make_policy(spec.policy, PolicyInputs(profile, predictor, gpu))
    return policy if scene.outages is None else Interrupted(policy, scene.outages)


def _record(
    spec: RunSpec, result: RunResult, decisions: list[float], wall_seconds: float
) -> RunRecord:
    scene = spec.scene
    slos = scene.slos
    figures = result.summary(slos.ttft_seconds or np.inf, slos.tpot_seconds or np.inf)
    attained = attainment_ratio(result, slos)
    median, tail = np.quantile(decisions, [0.5, 0.99])
    series = result.series
    return RunRecord(
        policy=spec.policy,
        plant=scene.build_plant().parameters.name,
        trace=scene.build_trace().name,
        load=spec.load,
        compression_ratio=spec.compression_ratio,
        seed=spec.seed,
        limit_ratio=spec.limit_ratio,
        energy_joules=result.energy_joules,
        energy_per_output_token_joules=figures["energy_per_output_token_joules"],
        attainment_ratio=attained,
        ttft_p50_seconds=figures["ttft_p50_seconds"],
        ttft_p99_seconds=figures["ttft_p99_seconds"],
        tpot_p50_seconds=figures["tpot_p50_seconds"],
        tpot_p99_seconds=figures["tpot_p99_seconds"],
        tbt_p50_seconds=figures["tbt_p50_seconds"],
        tbt_p99_seconds=figures["tbt_p99_seconds"],
        e2e_p50_seconds=result.e2e_quantile_seconds(0.5),
        e2e_p99_seconds=figures["e2e_p99_seconds"],
        requests_count=result.arrived_count,
        output_tokens_count=result.output_tokens_count,
        iterations_count=result.iterations_count,
        preemptions_count=result.preemptions_count,
        clock_changes_count=result.clock_changes_count,
        clock_changes_per_second=result.clock_changes_count / result.horizon_seconds,
        clock_mean_mhz=float(np.mean(series.clock_mhz)) if series.clock_mhz else 0.0,
        lost_count=result.arrived_count - round(attained * result.arrived_count),
        decision_p50_seconds=float(median),
        decision_p99_seconds=float(tail),
        horizon_seconds=result.horizon_seconds,
        idle_energy_joules=result.idle_energy_joules,
        wall_seconds=wall_seconds,
        idle_power_watts=result.idle_power_watts,
        clock_series=tuple(zip(series.time_seconds, series.clock_mhz, strict=True)),
        bundle=scene.bundle,
    )
