"""What describes a plant: one GPU kind, one model, its parallelism, and how they behave.

The figures live in TOML files beside this module, `plants/gpus/` for GPUs and `plants/` for
plants; each file says which of its figures are measured, published or assumed.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - read by get_type_hints
from dataclasses import dataclass
from pathlib import Path

from throttle.errors import InvalidInputError, NotFoundError
from throttle.simulation.tables import from_table, read_toml, with_overrides

_PLANTS = Path(__file__).parent / "plants"


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
    """Device memory; the knee says where its bandwidth starts to follow the SM clock."""

    capacity_bytes: float
    bandwidth_bytes_per_second: float
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
    grouped_tensor_ratio: float
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


@dataclass(frozen=True, slots=True)
class GemmParameters:
    """Dense GEMM, fitted to measured kernels."""

    fixed_seconds: float
    fixed_seconds_per_element: float
    memory_efficiency_ratio: float
    compute_efficiency_ratio: float
    roofline_exponent: float
    wave_exponent: float


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
    """Decode block of multi-head latent attention with its projections."""

    fixed_seconds: float
    memory_efficiency_ratio: float
    seconds_per_row: float


@dataclass(frozen=True, slots=True)
class AllReduceParameters:
    """All-reduce over one number of GPUs."""

    fixed_seconds: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class EngineCostParameters:
    """What an iteration costs beside its operators."""

    composition_ratio: float
    layer_seconds: float
    quantization_seconds: float
    sequence_seconds: float
    host_gap_seconds: float


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
    moe: Mapping[str, MoeParameters]
    gemm: GemmParameters
    decode_attention: DecodeAttentionParameters
    prefill_attention: PrefillAttentionParameters
    engine: EngineCostParameters
    all_reduce: Mapping[str, AllReduceParameters]
    latent_attention: LatentAttentionParameters | None = None


@dataclass(frozen=True, slots=True)
class ModelParameters:
    """A model of the catalogue and its number formats."""

    name: str
    weight_dtype: str
    kv_dtype: str


@dataclass(frozen=True, slots=True)
class ParallelismParameters:
    """GPUs of one engine; experts are either split by tensor or spread over all of them."""

    tensor_parallel_count: int
    expert_parallel_count: int


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
    """Limits of the simulated serving engine."""

    running_requests_limit: int
    batched_tokens_limit: int
    kv_block_tokens: int
    memory_utilization_ratio: float
    activation_bytes: float


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
    return tuple(sorted(path.stem for path in (_PLANTS / "gpus").glob("*.toml")))


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
    gpu_path = _PLANTS / "gpus" / f"{gpu}.toml"
    if not isinstance(gpu, str) or not gpu_path.is_file():
        raise InvalidInputError(f"{path.name}: gpu", gpu, ", ".join(gpu_names()))
    table["gpu"] = read_toml(gpu_path)
    table.setdefault("name", path.stem)
    return from_table(PlantParameters, with_overrides(table, overrides or {}), path.stem)
