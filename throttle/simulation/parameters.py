"""What describes a plant: one GPU kind, one model, its parallelism, and how they behave.

The figures live in TOML files beside this module, `plants/gpus/` for GPUs and `plants/` for
plants; each file says which of its figures are measured, published or assumed.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - read by get_type_hints
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from predictors.architecture import from_catalogue
from throttle.errors import InvalidInputError, NotFoundError
from throttle.simulation.operator_tables import TABLES
from throttle.simulation.parameter_files import from_table, read_toml, with_overrides

_PLANTS = Path(__file__).parent / "plants"
_GPUS = _PLANTS / "gpus"
_BASE_PLANT = "h200-qwen3-30b-a3b"  # engine limits and behavior of plants without a file


@dataclass(frozen=True, slots=True)
class ClockGrid:
    """SM clocks that the driver lists."""

    minimum_mhz: int
    maximum_mhz: int
    step_mhz: int

    def clocks_mhz(self) -> tuple[int, ...]:
        """Supported clocks, rising."""
        return tuple(range(self.minimum_mhz, self.maximum_mhz + 1, self.step_mhz))


@dataclass(frozen=True, slots=True)
class MemoryParameters:
    """Device memory; the knee says where its bandwidth starts to follow the SM clock.

    `l2_bytes` only serves to read benchmarks, which find small weights in L2 again.
    """

    capacity_bytes: float
    bandwidth_bytes_per_second: float
    l2_bytes: float
    knee_ratio: float
    knee_sharpness: float


@dataclass(frozen=True, slots=True)
class ComputeParameters:
    """Dense tensor peaks at the maximum clock."""

    bf16_flops_per_second: float
    fp8_flops_per_second: float
    multiprocessors_count: int


@dataclass(frozen=True, slots=True)
class PowerParameters:
    """Coefficients of the power equation (see `throttle.simulation.power`)."""

    limit_watts: float
    static_watts: float
    memory_watts: float
    busy_watts: float
    memory_path_watts: float
    tensor_watts: float
    small_tile_ratio: float
    small_tile_rows: float
    dequantization_ratio: float
    voltage_knee_ratio: float
    voltage_floor_ratio: float
    gap_activity_ratio: float


@dataclass(frozen=True, slots=True)
class IdleParameters:
    """Power with a live context and no work: `bare + step * x V(x)^2`."""

    bare_watts: float
    step_watts: float


@dataclass(frozen=True, slots=True)
class MoeParameters:
    """Grouped GEMM of a MoE layer, fitted to measured kernels."""

    fixed_seconds: float
    fixed_seconds_per_element: float
    memory_efficiency_ratio: float
    compute_efficiency_ratio: float
    roofline_exponent: float
    padding_tokens: float
    activation_traffic_ratio: float
    benchmark_cache_speedup: float = 1.0


@dataclass(frozen=True, slots=True)
class GemmParameters:
    """Dense GEMM, fitted to measured kernels."""

    fixed_seconds: float
    fixed_seconds_per_element: float
    memory_efficiency_ratio: float
    compute_efficiency_ratio: float
    roofline_exponent: float
    wave_exponent: float
    benchmark_cache_speedup: float = 1.0


@dataclass(frozen=True, slots=True)
class DecodeAttentionParameters:
    """Decode attention, fitted to measured kernels."""

    fixed_seconds: float
    memory_efficiency_ratio: float
    extra_bytes: float
    seconds_per_row: float


@dataclass(frozen=True, slots=True)
class PrefillAttentionParameters:
    """Prefill attention, fitted to measured kernels."""

    fixed_seconds: float
    compute_efficiency_ratio: float
    extra_tokens: float
    traffic_ratio: float


@dataclass(frozen=True, slots=True)
class LatentAttentionParameters:
    """Block of multi-head latent attention with its projections, in decode or in prefill."""

    fixed_seconds: float
    memory_efficiency_ratio: float
    compute_efficiency_ratio: float
    seconds_per_row: float


@dataclass(frozen=True, slots=True)
class AllReduceParameters:
    """All-reduce over one number of GPUs."""

    fixed_seconds: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class AllToAllParameters:
    """Dispatch of tokens to the ranks of their experts, and combining of the results."""

    dispatch_seconds: float
    dispatch_bytes_per_second: float
    combine_seconds: float
    combine_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class EngineCostParameters:
    """What an iteration costs beside its operators.

    Attributes:
        composition_ratio: Operators in a whole iteration over operators alone, fixed time left out.
        layer_seconds: Small kernels and launches of a layer.
        sequence_seconds: Sampling for one request, on the GPU.
        host_gap_seconds: Scheduling between two steps; the GPU waits.
        host_sequence_seconds: What the gap grows by for one request.
    """

    composition_ratio: float
    layer_seconds: float
    sequence_seconds: float
    host_gap_seconds: float
    host_sequence_seconds: float


@dataclass(frozen=True, slots=True)
class GpuParameters:
    """One GPU kind."""

    name: str
    marketing_name: str
    clocks: ClockGrid
    memory: MemoryParameters
    compute: ComputeParameters
    power: PowerParameters
    idle: IdleParameters
    moe: Mapping[str, MoeParameters]  # by weight format
    gemm: Mapping[str, GemmParameters]  # by weight format
    decode_attention: Mapping[str, DecodeAttentionParameters]  # by KV format and head dimension
    prefill_attention: Mapping[str, PrefillAttentionParameters]  # likewise
    engine: EngineCostParameters
    all_reduce: Mapping[str, AllReduceParameters]  # by number of GPUs
    latent_decode: Mapping[str, LatentAttentionParameters] | None = None  # by weight and KV format
    latent_prefill: Mapping[str, LatentAttentionParameters] | None = None  # likewise
    all_to_all: AllToAllParameters | None = None


@dataclass(frozen=True, slots=True)
class ModelParameters:
    """A model of the catalogue and its number formats."""

    name: str
    weight_dtype: str
    kv_dtype: str


@dataclass(frozen=True, slots=True)
class ParallelismParameters:
    """GPUs of one engine: the larger of the two counts.

    With as many tensor-parallel GPUs, all share each attention layer and see all tokens. With
    fewer, attention is replicated, requests are dealt to the replicas, and tokens travel to their
    experts and back (all-to-all). Experts are spread over the expert-parallel GPUs; if these are
    fewer than all, each expert is split.
    """

    tensor_parallel_count: int
    expert_parallel_count: int

    @property
    def gpus_count(self) -> int:
        """GPUs of one engine."""
        return max(self.tensor_parallel_count, self.expert_parallel_count)


@dataclass(frozen=True, slots=True)
class BehaviorParameters:
    """What no public data pins down: the first candidates for randomized plants."""

    routing_skew_exponent: float
    fixed_clock_sensitivity_ratio: float
    latency_noise_ratio: float
    chip_power_spread_ratio: float
    switch_median_seconds: float
    switch_p99_seconds: float
    decision_latency_seconds: float


@dataclass(frozen=True, slots=True)
class EngineParameters:
    """Limits and options of the simulated serving engine.

    Attributes:
        running_requests_limit: Most requests that run at once.
        batched_tokens_limit: Most tokens of one iteration.
        kv_block_tokens: Tokens of one KV block.
        memory_utilization_ratio: Share of device memory that the engine uses.
        activation_bytes: Of that, what is neither weights nor KV.
        role: "prefill", "decode" or "mixed".
        prefix_cache_hit_ratio: Share of a prompt found in the prefix cache, where the request does
            not say itself.
        draft_tokens_count: Tokens drafted for each generating request and iteration.
        draft_acceptance_ratio: Chance that a draft is accepted if those before it were.
    """

    running_requests_limit: int
    batched_tokens_limit: int
    kv_block_tokens: int
    memory_utilization_ratio: float
    activation_bytes: float
    role: str = "mixed"
    prefix_cache_hit_ratio: float = 0.0
    draft_tokens_count: int = 0
    draft_acceptance_ratio: float = 0.7


@dataclass(frozen=True, slots=True)
class PlantParameters:
    """One plant: GPU, model, parallelism and behavior."""

    name: str
    gpu: GpuParameters
    model: ModelParameters
    parallelism: ParallelismParameters
    behavior: BehaviorParameters
    engine: EngineParameters


def plant_names() -> tuple[str, ...]:
    """Plants that are shipped."""
    return tuple(sorted(path.stem for path in _PLANTS.glob("*.toml")))


def gpu_names() -> tuple[str, ...]:
    """GPU kinds that are shipped."""
    return tuple(sorted(path.stem for path in _GPUS.glob("*.toml")))


def gpu_table(name: str) -> dict[str, Any]:
    """The figures of one GPU: what is written by hand, and the fits to measured operators.

    Raises:
        NotFoundError: There is no such GPU.
    """
    path = _GPUS / f"{name}.toml"
    if not path.is_file():
        raise NotFoundError(f"no GPU {name!r}; known GPUs: {', '.join(gpu_names())}")
    table = read_toml(path)
    fitted = TABLES / name / "equations.toml"
    if fitted.is_file():
        for key, value in read_toml(fitted).items():
            table[key] = {**table.get(key, {}), **value}
    return table


def load_plant_parameters(
    name: str, overrides: Mapping[str, object] | None = None
) -> PlantParameters:
    """Parameters of a shipped plant, or of a plant's TOML file.

    Args:
        name: Name of a shipped plant, or path to a `.toml` file.
        overrides: Dotted keys and their values, such as `{"gpu.power.limit_watts": 600}`.

    Raises:
        NotFoundError: There is no such plant or GPU.
        InvalidInputError: A key is unknown, missing or of the wrong type.
    """
    path = Path(name) if name.endswith(".toml") else _PLANTS / f"{name}.toml"
    if not path.is_file():
        raise NotFoundError(f"no plant {name!r}; shipped plants: {', '.join(plant_names())}")
    table = read_toml(path)
    gpu = table.get("gpu")
    if gpu not in gpu_names():
        raise InvalidInputError(f"{path.name}: gpu", gpu, ", ".join(gpu_names()))
    table["gpu"] = gpu_table(str(gpu))
    table.setdefault("name", path.stem)
    if isinstance(table.get("engine"), dict):  # options that the file leaves out can be overridden
        table["engine"] = _defaults(EngineParameters) | table["engine"]
    return from_table(PlantParameters, with_overrides(table, overrides or {}), path.stem)


def _defaults(kind: type[EngineParameters]) -> dict[str, object]:
    return {each.name: each.default for each in fields(kind) if each.default is not MISSING}


def parameters_for(  # noqa: PLR0917 - each is one thing that a user names
    gpu: str,
    model: str,
    weight_dtype: str = "",
    kv_dtype: str = "",
    tensor_parallel_count: int = 1,
    expert_parallel_count: int = 1,
    overrides: Mapping[str, object] | None = None,
) -> PlantParameters:
    """Parameters of any GPU and model; the rest as in the plant `h200-qwen3-30b-a3b`.

    Raises:
        NotFoundError: There is no such GPU.
        ArchitectureError: The catalogue does not know the model or the format.
    """
    architecture = from_catalogue(model, weight_dtype, kv_dtype)
    table = read_toml(_PLANTS / f"{_BASE_PLANT}.toml")
    table["engine"] = _defaults(EngineParameters) | table["engine"]
    table |= {
        "name": f"{gpu}-{architecture.name}",
        "gpu": gpu_table(gpu),
        "model": {
            "name": architecture.name,
            "weight_dtype": architecture.weight_dtype,
            "kv_dtype": architecture.kv_dtype,
        },
        "parallelism": {
            "tensor_parallel_count": tensor_parallel_count,
            "expert_parallel_count": expert_parallel_count,
        },
    }
    return from_table(PlantParameters, with_overrides(table, overrides or {}), table["name"])
