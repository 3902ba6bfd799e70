"""One GPU seen through NVML. Nothing here can change it: only queries are called."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


class GpuAbsentError(Exception):
    """There is no NVIDIA GPU to measure, or something that measuring needs is missing."""


@dataclass(frozen=True, slots=True)
class Reading:
    """State of the GPU; None where the driver does not tell."""

    energy_joules: float | None
    temperature_celsius: float | None
    sm_clock_mhz: int | None
    power_watts: float | None


class Card:
    """Read-only view of one GPU.

    Args:
        index: The GPU's number, as nvidia-smi counts.

    Raises:
        GpuAbsentError: There is no such GPU, or no NVML.
    """

    def __init__(self, index: int) -> None:
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ModuleNotFoundError as error:
            raise GpuAbsentError("NVML's Python binding (nvidia-ml-py) is not installed") from error
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        except self._nvml.NVMLError as error:
            raise GpuAbsentError(f"no NVIDIA GPU here: NVML says {error}") from error

    @property
    def uuid(self) -> str:
        """The GPU's UUID; used to point CUDA at it, never recorded."""
        return str(self._nvml.nvmlDeviceGetUUID(self._handle))

    def read(self) -> Reading:
        """Energy counter, temperature, clock and power now."""
        nvml = self._nvml
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return Reading(
            None if millijoules is None else millijoules / 1e3,
            self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            None if milliwatts is None else milliwatts / 1e3,
        )

    def describe(self) -> dict[str, Any]:
        """What the GPU is and how it is set."""
        nvml = self._nvml
        memory = self._ask("nvmlDeviceGetSupportedMemoryClocks") or []
        clocks: list[int] = []
        if memory:
            clocks = self._ask("nvmlDeviceGetSupportedGraphicsClocks", max(memory)) or []
        ecc = self._ask("nvmlDeviceGetEccMode")
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses")
        return {
            "gpu_name": _text(nvml.nvmlDeviceGetName(self._handle)),
            "driver_version": _text(nvml.nvmlSystemGetDriverVersion()),
            "memory_clock_mhz": max(memory, default=None),
            "maximum_clock_mhz": max(clocks, default=None),
            "minimum_clock_mhz": min(clocks, default=None),
            "clocks_count": len(clocks),
            "power_limit_watts": None if limit is None else limit / 1e3,
            "ecc_enabled": None if ecc is None else bool(ecc[0]),
            "mig_mode": self._ask("nvmlDeviceGetMigMode"),
            "other_processes_count": None if processes is None else len(processes),
        }

    def _ask(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401 - whatever NVML answers
        """One query; None where this GPU or driver does not answer it."""
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError):
            return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
