"""Randomized plants: what no public data pins down, drawn from documented ranges.

A policy tuned to one plant is caught on draws it has not seen. The ranges stand in docs/plant.md
with their sources.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from throttle.simulation.parameters import PlantParameters

#: Lowest and highest value of each drawn figure. Sensitivity: assumed 0.2 to 0.9, a published
#: RTX 5090 sweep favors 0.9. Knee: assumed 0.5, measured 0.80 to 0.87 on A100 and L20. Floor: 1
#: over the measured 1.075 to 1.336, widened downward. Memory knee: 1.65 refit on A100, 3.0 assumed.
#: Skew: end-to-end data fit 0 to 0.8 equally well. Noise: repeat runs agree in 1 to 3 %. Chip
#: spread: assumed 5 % at two sigma.
RANGES: dict[str, tuple[float, float]] = {
    "routing_skew_exponent": (0.0, 0.8),
    "fixed_clock_sensitivity_ratio": (0.2, 0.9),
    "latency_noise_ratio": (0.01, 0.03),
    "chip_power_spread_ratio": (0.01, 0.04),
    "voltage_knee_ratio": (0.45, 0.87),
    "voltage_floor_ratio": (0.65, 0.92),
    "memory_knee_ratio": (1.5, 3.2),
    "tensor_watts_factor": (0.8, 1.25),
}


def draw_parameters(base: PlantParameters, seed: int) -> PlantParameters:
    """A plant around this one, each figure of `RANGES` uniform and independent.

    Args:
        base: The plant; what is not drawn stays.
        seed: The same seed draws the same figures.
    """
    generator = random.Random(f"plant draw {seed}")  # noqa: S311 - simulation, no secret
    drawn = {name: generator.uniform(*bounds) for name, bounds in RANGES.items()}
    gpu = base.gpu
    power = replace(
        gpu.power,
        voltage_knee_ratio=drawn["voltage_knee_ratio"],
        voltage_floor_ratio=drawn["voltage_floor_ratio"],
        tensor_watts=gpu.power.tensor_watts * drawn["tensor_watts_factor"],
    )
    memory = replace(gpu.memory, knee_ratio=drawn["memory_knee_ratio"])
    behavior = replace(
        base.behavior,
        routing_skew_exponent=drawn["routing_skew_exponent"],
        fixed_clock_sensitivity_ratio=drawn["fixed_clock_sensitivity_ratio"],
        latency_noise_ratio=drawn["latency_noise_ratio"],
        chip_power_spread_ratio=drawn["chip_power_spread_ratio"],
    )
    name = f"{base.name}-draw-{seed}"
    return replace(base, name=name, gpu=replace(gpu, power=power, memory=memory), behavior=behavior)
