"""Power of one GPU over its clock: active, idle, and the driver's power cap.

`P = Ps + Hm um + kappa Ck busy + (kappa / x) (Cl um + Ct uf)` with `kappa = x V(x)^2`; x is the
clock over the maximum, um and uf are achieved bytes/s and FLOP/s over the full-clock peaks. The
form agrees with arXiv 2607.00819 (linear in clock up to a transition, steeper beyond); the
coefficients are scaled to public kernel power at full clock, and how they follow the clock is
assumed for Hopper and newer (docs/plant.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from throttle.simulation.equations import Numbers
    from throttle.simulation.parameters import GpuParameters, IdleParameters, PowerParameters


def voltage_ratio(clock_ratio: float, power: PowerParameters) -> float:
    """Supply voltage over its maximum: a floor up to the knee, then linear in clock."""
    knee, floor = power.voltage_knee_ratio, power.voltage_floor_ratio
    if clock_ratio <= knee:
        return floor
    return floor + (1.0 - floor) * (clock_ratio - knee) / (1.0 - knee)


def bandwidth_ratio(clock_ratio: float, knee_ratio: float, sharpness: float) -> float:
    """Device-memory bandwidth over its full-clock value.

    `[(1 + rb^-m) / (1 + (rb x)^-m)]^(1/m)`: the L2 and SM side saturates the memory above a clock
    ratio of about 1/rb.
    """
    at_full = 1.0 + knee_ratio**-sharpness
    here = 1.0 + (knee_ratio * clock_ratio) ** -sharpness
    return float((at_full / here) ** (1.0 / sharpness))


def small_tile_weight(power: PowerParameters, rows: Numbers) -> Numbers:
    """Tensor power per FLOP of a dense GEMM over that of one with many rows."""
    return 1.0 + (power.small_tile_ratio - 1.0) / (1.0 + rows / power.small_tile_rows)


def idle_power_watts(idle: IdleParameters, power: PowerParameters, clock_ratio: float) -> float:
    """Power with a live context and no work.

    `P_bare + step kappa(x)`; the two ends are measured on H100, A100 and L40S (8bitai
    gpu-parking-tax, arXiv 2605.23918), the curve between them is assumed.
    """
    voltage = voltage_ratio(clock_ratio, power)
    return idle.bare_watts + idle.step_watts * clock_ratio * voltage * voltage


def scaled_power(gpu: GpuParameters, ratio: float) -> GpuParameters:
    """The same GPU as a chip that draws `ratio` times the power; its limit stays."""
    power = replace(
        gpu.power,
        static_watts=gpu.power.static_watts * ratio,
        memory_watts=gpu.power.memory_watts * ratio,
        busy_watts=gpu.power.busy_watts * ratio,
        memory_path_watts=gpu.power.memory_path_watts * ratio,
        tensor_watts=gpu.power.tensor_watts * ratio,
    )
    idle = replace(
        gpu.idle, bare_watts=gpu.idle.bare_watts * ratio, step_watts=gpu.idle.step_watts * ratio
    )
    return replace(gpu, power=power, idle=idle)


@dataclass(frozen=True, slots=True)
class ClockTerms:
    """Everything that one clock fixes.

    Attributes:
        clock_mhz: The clock.
        memory_factor: Memory time over its full-clock value.
        compute_factor: Compute time over its full-clock value.
        fixed_factor: Fixed time over its full-clock value.
        memory_powers: `memory_factor` raised to each exponent of the blended operators.
        compute_powers: `compute_factor` likewise.
        busy_watts: Power of the clock tree while kernels are resident.
        memory_watts: Power at full memory traffic, device memory and path to it.
        tensor_watts: Power of the tensor cores at their full-clock peak.
        idle_watts: Power without work.
    """

    clock_mhz: int
    memory_factor: float
    compute_factor: float
    fixed_factor: float
    memory_powers: tuple[float, ...]
    compute_powers: tuple[float, ...]
    busy_watts: float
    memory_watts: float
    tensor_watts: float
    idle_watts: float


def clock_terms(
    gpu: GpuParameters,
    clock_mhz: int,
    fixed_clock_sensitivity_ratio: float,
    exponents: tuple[float, ...],
    busy_ratio: float,
) -> ClockTerms:
    """Terms of one clock.

    Args:
        gpu: The GPU.
        clock_mhz: The clock.
        fixed_clock_sensitivity_ratio: Share G of fixed time that follows the clock; fixed time
            scales by `(1 - G) + G / x`.
        exponents: Exponents of the blended operators.
        busy_ratio: Factor on the clock tree's power, 1 unless weights are unpacked on the fly.
    """
    power, memory = gpu.power, gpu.memory
    x = clock_mhz / gpu.clocks.maximum_mhz
    voltage = voltage_ratio(x, power)
    squared = voltage * voltage
    slow_memory = 1.0 / bandwidth_ratio(x, memory.knee_ratio, memory.knee_sharpness)
    share = fixed_clock_sensitivity_ratio
    return ClockTerms(
        clock_mhz=clock_mhz,
        memory_factor=slow_memory,
        compute_factor=1.0 / x,
        fixed_factor=(1.0 - share) + share / x,
        memory_powers=tuple(slow_memory**p for p in exponents),
        compute_powers=tuple(x**-p for p in exponents),
        busy_watts=x * squared * power.busy_watts * busy_ratio,
        memory_watts=power.memory_watts + squared * power.memory_path_watts,
        tensor_watts=squared * power.tensor_watts,
        idle_watts=idle_power_watts(gpu.idle, power, x),
    )
