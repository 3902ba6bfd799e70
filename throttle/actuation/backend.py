"""The seam to GPU drivers."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol


class EventReason(enum.IntFlag):
    """Why a clock is not higher, as NVML's bits. None of them says that a lock holds it."""

    NONE = 0
    IDLE = 0x1
    APPLICATION_CLOCKS = 0x2
    POWER_CAP = 0x4
    HARDWARE_SLOWDOWN = 0x8
    SYNC_BOOST = 0x10
    SOFTWARE_THERMAL = 0x20
    HARDWARE_THERMAL = 0x40
    POWER_BRAKE = 0x80
    DISPLAY_CLOCKS = 0x100
    BOARD_LIMIT = 0x200
    RELIABILITY = 0x400


class PowerScope(enum.Enum):
    """What a power reading covers."""

    GPU = "gpu"
    #: GPU and CPU of a superchip together.
    MODULE = "module"
    #: There is no power reading; it is given as 0.
    NONE = "none"


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What one GPU measured.

    Attributes:
        clock_mhz: SM clock in force.
        power_watts: Power drawn.
        energy_joules: Energy counter, never falling; only differences mean something.
        time_seconds: The energy counter's own time, where the device keeps one; else None, and
            the reader's clock must serve.
        temperature_celsius: Of the GPU; None where it is not known.
        event_reasons: Why the clock is not higher; none where it is not known.
        power_scope: What the power covers.
        energy_counted: Whether the energy is the device's own counter; else it was summed from
            power readings, which miss what happens between them.
    """

    clock_mhz: int
    power_watts: float
    energy_joules: float
    time_seconds: float | None = None
    temperature_celsius: float | None = None
    event_reasons: EventReason = EventReason.NONE
    power_scope: PowerScope = PowerScope.GPU
    energy_counted: bool = True


@dataclass(frozen=True, slots=True)
class ClockReading:
    """How fast one GPU runs.

    Attributes:
        clock_mhz: SM clock in force.
        event_reasons: Why it is not higher; none where it is not known.
        time_seconds: When by the device's own time, where it keeps one.
    """

    clock_mhz: int
    event_reasons: EventReason = EventReason.NONE
    time_seconds: float | None = None


class ClockDriver(Protocol):
    """Sets the clocks of some GPUs: all that the privileged process has of a driver.

    Every method raises `NotFoundError` for an unknown UUID and `ActuationError` when the device
    does not obey: `GpuDeniedError` when it never will, `GpuLostError` when it is gone, the plain
    one when another try may help. Calls for different GPUs may run at once; calls for one GPU never
    do.
    """

    def uuids(self) -> tuple[str, ...]:
        """GPUs that this backend sees."""
        ...

    def supported_clocks_mhz(self, uuid: str) -> tuple[int, ...]:
        """SM clocks that can be asked for, in MHz, rising, never empty."""
        ...

    def refusal(self, uuid: str) -> str:
        """Why this GPU must not be written, as far as reading tells; empty when nothing does."""
        ...

    def set_maximum_clock(self, uuid: str, clock_mhz: int) -> None:
        """Forbid SM clocks above one of the supported clocks."""
        ...

    def reset_clock(self, uuid: str) -> None:
        """Return to the default clocks."""
        ...

    def read_clock(self, uuid: str) -> ClockReading:
        """Read how fast it runs."""
        ...

    def close(self) -> None:
        """Let go of the driver; clocks stay as they are."""
        ...


class GpuBackend(ClockDriver, Protocol):
    """A driver that tells what GPUs are and what they measure as well."""

    def name(self, uuid: str) -> str:
        """The GPU's model, in the words that bundles are named by, such as `h200-sxm`."""
        ...

    def read(self, uuid: str) -> GpuReading:
        """Read clock, power and energy, and what else the device tells."""
        ...
