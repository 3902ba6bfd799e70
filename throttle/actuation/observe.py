"""GPUs that are read and never written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

from throttle.errors import GpuPermissionError

if TYPE_CHECKING:
    from throttle.actuation.backend import ClockReading, GpuBackend, GpuReading

_REFUSAL: Final = "backend is 'observe', which only reads; set backend to 'nvml' to set clocks"


class ObserveBackend:
    """Reads through another backend, and refuses every write before it reaches the driver."""

    def __init__(self, backend: GpuBackend) -> None:
        self._backend = backend

    def uuids(self) -> tuple[str, ...]:
        """GPUs that the other backend sees."""
        return self._backend.uuids()

    def name(self, uuid: str) -> str:
        """The GPU's model."""
        return self._backend.name(uuid)

    def supported_clocks_mhz(self, uuid: str) -> tuple[int, ...]:
        """Clocks that could be asked for, MHz, rising."""
        return self._backend.supported_clocks_mhz(uuid)

    def refusal(self, uuid: str) -> str:
        """Why no GPU is written here."""
        self._backend.supported_clocks_mhz(uuid)  # it must be there all the same
        return f"GPU {uuid}: {_REFUSAL}"

    def set_maximum_clock(self, uuid: str, clock_mhz: int) -> None:
        """Refuse.

        Raises:
            GpuPermissionError: Always.
        """
        self._refuse(uuid, f"{clock_mhz} MHz was not set")

    def reset_clock(self, uuid: str) -> None:
        """Refuse.

        Raises:
            GpuPermissionError: Always.
        """
        self._refuse(uuid, "clocks were not reset")

    def read_clock(self, uuid: str) -> ClockReading:
        """Read through the other backend."""
        return self._backend.read_clock(uuid)

    def read(self, uuid: str) -> GpuReading:
        """Read through the other backend."""
        return self._backend.read(uuid)

    def close(self) -> None:
        """Close the other backend."""
        self._backend.close()

    def _refuse(self, uuid: str, what: str) -> NoReturn:
        self._backend.supported_clocks_mhz(uuid)
        raise GpuPermissionError(f"GPU {uuid}: {what}: {_REFUSAL}")
