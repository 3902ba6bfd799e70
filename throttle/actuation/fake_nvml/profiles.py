"""GPUs that can be pretended.

Clocks, memory clocks and power limits are those that `nvidia-smi -q -x` printed on such GPUs, as
captured in the end-to-end tests of NVIDIA/k8s-test-infra; of H200 only the highest clock and the
limit are published, its lowest clock and idle power are taken from H100. What a live context draws
at the highest clock is measured for A100, H100 and L40S (8bitai, gpu-parking-tax) and assumed for
the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True)
class FakeGpuProfile:
    """One model of GPU.

    Attributes:
        name: As NVML gives it.
        driver_version: Of the capture.
        clocks_mhz: Supported SM clocks by memory clock, MHz, rising.
        power_limits_watts: Lowest, highest and default power limit.
        idle_watts: Power without a context.
        context_watts: What a live context adds at the highest clock.
        compute_capability: Major and minor.
        mig_supported: Whether it can be cut into instances.
        application_clocks: Whether the driver still answers about them.
    """

    name: str
    driver_version: str
    clocks_mhz: dict[int, tuple[int, ...]] = field(hash=False)
    power_limits_watts: tuple[float, float, float]
    idle_watts: float
    context_watts: float
    compute_capability: tuple[int, int]
    mig_supported: bool = True
    application_clocks: bool = True


def _steps(lowest: int, highest: int, step: int = 15) -> tuple[int, ...]:
    return tuple(range(lowest, highest + 1, step))


#: 247 clocks of 7.5 MHz, which NVML rounds down.
_B200_CLOCKS: Final = tuple(120 + 15 * index // 2 for index in range(247))

PROFILES: Final = {
    "a100": FakeGpuProfile(
        "NVIDIA A100-SXM4-40GB",
        "570.148.08",
        {1215: _steps(210, 1410)},
        (100.0, 400.0, 400.0),
        53.7,
        26.3,
        (8, 0),
    ),
    "h100": FakeGpuProfile(
        "NVIDIA H100 80GB HBM3",
        "580.105.08",
        {2619: _steps(345, 1980), 1593: _steps(345, 1980)},
        (200.0, 700.0, 700.0),
        71.7,
        49.9,
        (9, 0),
    ),
    "h200": FakeGpuProfile(
        "NVIDIA H200",
        "580.105.08",
        {3201: _steps(345, 1980), 1593: _steps(345, 1980)},
        (200.0, 700.0, 700.0),
        80.0,
        50.0,
        (9, 0),
    ),
    "b200": FakeGpuProfile(
        "NVIDIA B200",
        "580.105.08",
        {3996: _B200_CLOCKS, 3402: _B200_CLOCKS},
        (200.0, 1000.0, 1000.0),
        140.0,
        60.0,
        (10, 0),
    ),
    "l40s": FakeGpuProfile(
        "NVIDIA L40S",
        "595.91.07",
        {9001: _steps(210, 2520), 405: _steps(210, 405)},
        (100.0, 350.0, 350.0),
        35.6,
        66.4,
        (8, 9),
        mig_supported=False,
        application_clocks=False,
    ),
}
