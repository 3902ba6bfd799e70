"""What an engine's GPUs did between one state and the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from throttle.actuation.backend import GpuReading


@dataclass(frozen=True, slots=True)
class GpuWindow:
    """Clock, and power and energy since the window before; None where they are not known.

    Attributes:
        clock_mhz: SM clock now, the lowest of the engine's GPUs.
        previous_clock_mhz: The same at the window before.
        power_watts: Mean power of one GPU over the window.
        energy_joules: Energy over the window, summed over the GPUs.
        seconds: Length of the window.
    """

    clock_mhz: int
    previous_clock_mhz: int
    power_watts: float | None = None
    energy_joules: float | None = None
    seconds: float | None = None

    def without_energy(self) -> GpuWindow:
        """The clocks alone: for a state whose window ended before its GPUs were read."""
        return GpuWindow(self.clock_mhz, self.previous_clock_mhz)


class GpuMeter:
    """Turns energy counters into windows."""

    def __init__(
        self,
        read: Callable[[str], GpuReading],
        gpu_uuids: Sequence[str],
        clock: Callable[[], float],
    ) -> None:
        """Start the first window.

        Args:
            read: Reads one GPU.
            gpu_uuids: The engine's GPUs.
            clock: Monotonic seconds, for counters without a time of their own.

        Raises:
            ActuationError: A GPU cannot be read.
        """
        self._read = read
        self._gpu_uuids = tuple(gpu_uuids)
        self._clock = clock
        self._before = self._sample()

    def window(self) -> GpuWindow:
        """End the window that runs and start the next.

        Raises:
            ActuationError: A GPU cannot be read.
        """
        before, now = self._before, self._sample()
        self._before = now
        seconds = now.seconds - before.seconds
        energy = now.energy_joules - before.energy_joules
        if seconds <= 0 or energy < 0:  # read twice within one update, or the counter restarted
            return GpuWindow(now.clock_mhz, before.clock_mhz)
        return GpuWindow(
            now.clock_mhz,
            before.clock_mhz,
            energy / seconds / len(self._gpu_uuids),
            energy,
            seconds,
        )

    def _sample(self) -> _Sample:
        readings = [self._read(uuid) for uuid in self._gpu_uuids]
        own_time = readings[0].time_seconds
        return _Sample(
            min(reading.clock_mhz for reading in readings),
            sum(reading.energy_joules for reading in readings),
            self._clock() if own_time is None else own_time,
        )


@dataclass(frozen=True, slots=True)
class _Sample:
    clock_mhz: int
    energy_joules: float
    seconds: float
