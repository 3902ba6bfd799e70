"""What GPUs measure: read aside, divided among the engines, and cut into windows for decisions."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from throttle.actuation.sampler import Sample, Sampler
from throttle.daemon.attribution import EnergyBook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from throttle.actuation.backend import GpuReading
    from throttle.control.state import IterationState
    from throttle.daemon.attribution import EngineEnergy, EngineLedger
    from throttle.daemon.request_shares import RequestEnergy


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """How GPUs are read. Simulated ones are read when asked, as reading a file takes no time.

    Attributes:
        interval_seconds: From one reading of a GPU to the next.
        stale_seconds: An older reading counts as none; its engine gets default clocks then.
        power_window_seconds: Least time that a recorded power is the mean of: energy counters move
            in steps of 20 to 100 ms, so a shorter one would be noise.
    """

    interval_seconds: float = 0.1
    stale_seconds: float = 2.0
    power_window_seconds: float = 0.5

    def problems(self) -> list[str]:
        """Values that cannot be used, one line each."""
        found = []
        if not 0.01 <= self.interval_seconds <= 10.0:
            found.append(f"interval_seconds is {self.interval_seconds}; allowed: 0.01 to 10")
        if not (math.isfinite(self.stale_seconds) and self.stale_seconds > self.interval_seconds):
            found.append(
                f"stale_seconds is {self.stale_seconds}; allowed: more than interval_seconds"
            )
        if not 0.0 <= self.power_window_seconds <= 60.0:
            found.append(f"power_window_seconds is {self.power_window_seconds}; allowed: 0 to 60")
        return found


class Telemetry:
    """The newest reading of every GPU, and whose energy it was."""

    def __init__(
        self,
        read: Callable[[str], GpuReading],
        uuids: Iterable[str],
        clock: Callable[[], float],
        settings: TelemetrySettings,
        *,
        when_asked: bool,
        on_request: Callable[[RequestEnergy], None] = lambda _: None,
    ) -> None:
        """Nothing read yet.

        Args:
            read: Reads one GPU.
            uuids: GPUs that may be asked for.
            clock: Monotonic seconds.
            settings: How often.
            when_asked: Whether to read a GPU when it is asked for, on the thread that asks: for
                devices that keep a time of their own and answer at once. Otherwise `start` reads
                aside.
            on_request: Told of every request that ended, with its energy.
        """
        self.book = EnergyBook()
        self._clock = clock
        self._settings = settings
        self._read_device = read
        self._when_asked = when_asked
        self._on_request = on_request
        self._uuids = tuple(uuids)
        self._sampler = Sampler(
            read,
            self._uuids,
            clock,
            interval_seconds=settings.interval_seconds,
            stale_seconds=settings.stale_seconds,
            on_sample=self._note_sample,
        )

    def start(self) -> None:
        """Begin to read aside, where that is how GPUs are read."""
        if not self._when_asked:
            self._sampler.start()

    def stop(self) -> None:
        """Read no more aside."""
        self._sampler.stop()

    def read(self, uuid: str) -> GpuReading:
        """The newest reading, with its time.

        Raises:
            NotFoundError: This GPU is not read here.
            ActuationError: There is no fresh one.
        """
        if not self._when_asked:
            return _timed(self._sampler.latest(uuid))
        sample = Sample(self._read_device(uuid), self._clock())
        self._note_sample(uuid, sample)
        return _timed(sample)

    def hurry(self, uuid: str) -> None:
        """The GPU's clock changes: read it often for a while, where it is read aside."""
        if not self._when_asked:
            self._sampler.hurry(uuid)

    def open(self, engine_id: str, gpu_uuids: Sequence[str]) -> GpuMeter:
        """An engine comes: begin to meter its GPUs.

        Raises:
            ActuationError: A GPU cannot be read.
        """
        for uuid in gpu_uuids:
            self.read(uuid)  # what was drawn before is not the engine's
        ledger = self.book.open(engine_id, gpu_uuids, self._on_request)
        aside = not self._when_asked
        try:
            return GpuMeter(
                self.read,
                gpu_uuids,
                self._clock if aside else None,
                least_seconds=self._settings.power_window_seconds if aside else 0.0,
                ledger=ledger,
                close_ledger=self.book.close,
            )
        except BaseException:
            self.book.close(ledger)
            raise

    def _note_sample(self, uuid: str, sample: Sample) -> None:
        timed = _timed(sample)
        assert timed.time_seconds is not None  # noqa: S101 - `_timed` has just set it
        self.book.sample(uuid, timed.time_seconds, timed.energy_joules)


def _timed(sample: Sample) -> GpuReading:
    """The reading with a time: the device's own, or when it was taken."""
    reading = sample.reading
    if reading.time_seconds is not None:
        return reading
    return dataclasses.replace(reading, time_seconds=sample.seconds)


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
    """One engine's GPUs: turns energy counters into windows, and states into shares of energy."""

    def __init__(
        self,
        read: Callable[[str], GpuReading],
        gpu_uuids: Sequence[str],
        clock: Callable[[], float] | None,
        *,
        least_seconds: float = 0.0,
        ledger: EngineLedger | None = None,
        close_ledger: Callable[[EngineLedger], None] = lambda _: None,
    ) -> None:
        """Start the first window.

        Args:
            read: Reads one GPU.
            gpu_uuids: The engine's GPUs.
            clock: Monotonic seconds, for counters without a time of their own; None when all have
                one, which states are timed by then.
            least_seconds: Shortest time that a power is the mean of; a window that ends earlier
                tells the clocks alone, and its energy counts to the next.
            ledger: Where the engine's energy is divided; None to divide none.
            close_ledger: Told when the engine goes.

        Raises:
            ActuationError: A GPU cannot be read.
        """
        self._read = read
        self._gpu_uuids = tuple(gpu_uuids)
        self._clock = clock
        self._least_seconds = least_seconds
        self._ledger = ledger
        self._close_ledger = close_ledger
        self._before = self._metered = self._sample()

    def window(self) -> GpuWindow:
        """End the window that runs and start the next.

        Raises:
            ActuationError: A GPU cannot be read.
        """
        before, now = self._before, self._sample()
        self._before = now
        seconds = now.seconds - self._metered.seconds
        if 0 <= seconds < self._least_seconds:
            return GpuWindow(now.clock_mhz, before.clock_mhz)
        energy = now.energy_joules - self._metered.energy_joules
        self._metered = now
        if seconds <= 0 or energy < 0:  # read twice within one update, or the counter restarted
            return GpuWindow(now.clock_mhz, before.clock_mhz)
        return GpuWindow(
            now.clock_mhz,
            before.clock_mhz,
            energy / seconds / len(self._gpu_uuids),
            energy,
            seconds,
        )

    def note(self, states: Sequence[IterationState]) -> None:
        """Say what the engine did; call it after `window`, with the states in order."""
        if self._ledger is None or not states:
            return
        now = self._before.seconds if self._clock is None else self._clock()
        newest = states[-1].engine_time_seconds
        for state in states:
            self._ledger.note(state, now - (newest - state.engine_time_seconds))

    def energy(self) -> EngineEnergy | None:
        """The engine's energy in parts; None when it is not divided."""
        return None if self._ledger is None else self._ledger.energy()

    def close(self) -> None:
        """The engine goes; a second call does nothing."""
        if self._ledger is not None:
            self._close_ledger(self._ledger)

    def _sample(self) -> _Sample:
        readings = [self._read(uuid) for uuid in self._gpu_uuids]
        seconds = readings[0].time_seconds
        if seconds is None:
            seconds = self._clock() if self._clock is not None else 0.0
        return _Sample(
            min(reading.clock_mhz for reading in readings),
            sum(reading.energy_joules for reading in readings),
            seconds,
        )


@dataclass(frozen=True, slots=True)
class _Sample:
    clock_mhz: int
    energy_joules: float
    seconds: float
