"""The seam to GPU drivers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What one GPU measured.

    Attributes:
        clock_mhz: SM clock in force.
        power_watts: Power drawn.
        energy_joules: Energy counter; only differences mean something.
        time_seconds: The energy counter's own time, where the device keeps one; else None, and
            the reader's clock must serve.
    """

    clock_mhz: int
    power_watts: float
    energy_joules: float
    time_seconds: float | None = None


class GpuBackend(Protocol):
    """Sets and reads the clocks of some GPUs.

    Every method raises `NotFoundError` for an unknown UUID and `ActuationError` when the device
    does not obey. Calls for different GPUs may run at once; calls for one GPU never do.
    """

    def uuids(self) -> tuple[str, ...]:
        """GPUs that this backend sees."""
        ...

    def name(self, uuid: str) -> str:
        """The GPU's model, in the words that bundles are named by, such as `h200-sxm`."""
        ...

    def supported_clocks_mhz(self, uuid: str) -> tuple[int, ...]:
        """SM clocks that can be asked for, in MHz, rising, never empty."""
        ...

    def set_maximum_clock(self, uuid: str, clock_mhz: int) -> None:
        """Forbid SM clocks above one of the supported clocks."""
        ...

    def reset_clock(self, uuid: str) -> None:
        """Return to the default clocks."""
        ...

    def read(self, uuid: str) -> GpuReading:
        """Read clock, power and energy."""
        ...
