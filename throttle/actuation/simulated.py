"""A simulated GPU's driver: a small memory-mapped file.

The simulated GPU lives in the process that plays the engine, the daemon in another. As with a real
driver they meet outside both, so that a lock survives a killed daemon. The daemon writes the lock;
the simulation reads it and writes the telemetry.

Layout (native byte order, 8-byte aligned), see the `_..._OFFSET` constants: a header of 64 bytes
(magic, version, number of GPUs), then one record of 2240 bytes per GPU. Telemetry is guarded by a
version that is odd while it is being written, so that a reader never mixes two of them.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from throttle.actuation.backend import ClockReading, GpuReading
from throttle.errors import ActuationError, InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MAGIC = b"SIMGPUS\0"
_VERSION = 1
_HEADER = struct.Struct("=8sII48x")
_GPUS_LIMIT = 64
_CLOCKS_LIMIT = 512
_TEXT_BYTES = 64

# Offsets inside one GPU's record, bytes.
_UUID_OFFSET = 0
_NAME_OFFSET = 64
_LOCK_OFFSET = 128  # int32, MHz, 0 = no lock
_CLOCKS_COUNT_OFFSET = 132  # int32
_WRITE_COUNT_OFFSET = 136  # int64
_VERSION_OFFSET = 144  # int64, odd while telemetry is written
_TELEMETRY_OFFSET = 152  # 4 float64: MHz, watts, joules, seconds
_CLOCKS_OFFSET = 192  # int32 each
_RECORD_BYTES = _CLOCKS_OFFSET + 4 * _CLOCKS_LIMIT

#: A write of telemetry takes a microsecond; this many tries outlast any write that is alive.
_READ_TRIES = 100_000


@dataclass(frozen=True, slots=True)
class SimulatedGpu:
    """One GPU to create.

    Attributes:
        uuid: 1 to 64 bytes of ASCII.
        name: Model, in the words that bundles are named by; 1 to 64 bytes of ASCII.
        supported_clocks_mhz: 1 to 512 clocks, rising, positive.
    """

    uuid: str
    name: str
    supported_clocks_mhz: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check what the file can hold."""
        for field, text in (("uuid", self.uuid), ("name", self.name)):
            if not (text.isascii() and text.isprintable() and 1 <= len(text) <= _TEXT_BYTES):
                raise InvalidInputError(field, text, f"1 to {_TEXT_BYTES} printable ASCII bytes")
        clocks = self.supported_clocks_mhz
        rising = all(lower < upper for lower, upper in itertools.pairwise(clocks))
        if not (1 <= len(clocks) <= _CLOCKS_LIMIT and rising and clocks[0] > 0):
            raise InvalidInputError(
                "supported_clocks_mhz", clocks, f"1 to {_CLOCKS_LIMIT} positive clocks, rising"
            )


class SimulatedGpuFile:
    """The mapped file. One process at a time writes the locks, one the telemetry."""

    def __init__(self, path: Path) -> None:
        """Map an existing file.

        Raises:
            NotFoundError: There is no such file.
            InvalidInputError: It is not a file of simulated GPUs of this version.
        """
        self._path = path
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            raise NotFoundError(
                f"simulated GPU file {str(path)!r} cannot be opened: {error.strerror}"
            ) from None
        try:
            size = os.fstat(descriptor).st_size
            if size < _HEADER.size:
                raise InvalidInputError(str(path), f"{size} bytes", "a file of simulated GPUs")
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        magic, version, count = _HEADER.unpack_from(self._map)
        if magic != _MAGIC or version != _VERSION or size != _file_bytes(count):
            self._map.close()
            raise InvalidInputError(
                str(path),
                f"magic {magic!r}, version {version}, {size} bytes",
                f"a file of simulated GPUs, version {_VERSION}",
            )
        whole = memoryview(self._map)
        self._views = (whole, whole.cast("i"), whole.cast("q"), whole.cast("d"))
        _, self._int32, self._int64, self._float64 = self._views
        self._offsets = {
            self._text(_record_offset(index) + _UUID_OFFSET): _record_offset(index)
            for index in range(count)
        }

    @classmethod
    def create(cls, path: Path, gpus: Sequence[SimulatedGpu]) -> Self:
        """Make a file whose GPUs run at default clocks, replacing an old one in one step.

        Raises:
            InvalidInputError: No GPU, more than 64, or one named twice.
        """
        uuids = [gpu.uuid for gpu in gpus]
        if not 1 <= len(uuids) <= _GPUS_LIMIT or len(set(uuids)) != len(uuids):
            raise InvalidInputError("gpus", uuids, f"1 to {_GPUS_LIMIT} GPUs, each once")
        content = bytearray(_file_bytes(len(gpus)))
        _HEADER.pack_into(content, 0, _MAGIC, _VERSION, len(gpus))
        for index, gpu in enumerate(gpus):
            start = _record_offset(index)
            clocks = gpu.supported_clocks_mhz
            struct.pack_into(
                f"={_TEXT_BYTES}s{_TEXT_BYTES}sii",
                content,
                start,
                gpu.uuid.encode(),
                gpu.name.encode(),
                0,
                len(clocks),
            )
            struct.pack_into("=4d", content, start + _TELEMETRY_OFFSET, clocks[-1], 0.0, 0.0, 0.0)
            struct.pack_into(f"={len(clocks)}i", content, start + _CLOCKS_OFFSET, *clocks)
        draft = path.with_name(f"{path.name}.{os.getpid()}.new")
        draft.write_bytes(content)
        draft.replace(path)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map an existing file; the constructor under the name that pairs with `create`."""
        return cls(path)

    def close(self) -> None:
        """Unmap; the object is of no use after."""
        for view in reversed(self._views):
            view.release()
        self._map.close()

    def __enter__(self) -> Self:
        """The mapped file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Unmap."""
        self.close()

    def uuids(self) -> tuple[str, ...]:
        """GPUs in the file."""
        return tuple(self._offsets)

    def name(self, uuid: str) -> str:
        """The GPU's model."""
        return self._text(self._offset(uuid) + _NAME_OFFSET)

    def supported_clocks_mhz(self, uuid: str) -> tuple[int, ...]:
        """Clocks that can be locked, MHz, rising."""
        start = self._offset(uuid)
        count = self._int32[(start + _CLOCKS_COUNT_OFFSET) // 4]
        first = (start + _CLOCKS_OFFSET) // 4
        return tuple(self._int32[first : first + count])

    def read_lock_mhz(self, uuid: str) -> int:
        """The lock in force, MHz; 0 when there is none."""
        return self._int32[(self._offset(uuid) + _LOCK_OFFSET) // 4]

    def read_write_count(self, uuid: str) -> int:
        """Locks and resets written since the file was made."""
        return self._int64[(self._offset(uuid) + _WRITE_COUNT_OFFSET) // 8]

    def write_lock(self, uuid: str, clock_mhz: int) -> None:
        """Lock to one of the supported clocks, or reset with 0.

        Raises:
            ActuationError: The clock is not supported.
        """
        start = self._offset(uuid)
        if clock_mhz != 0 and clock_mhz not in self.supported_clocks_mhz(uuid):
            raise ActuationError(
                f"GPU {uuid} does not support {clock_mhz} MHz; "
                f"supported: {self.supported_clocks_mhz(uuid)}"
            )
        self._int32[(start + _LOCK_OFFSET) // 4] = clock_mhz
        self._int64[(start + _WRITE_COUNT_OFFSET) // 8] += 1

    def write_telemetry(
        self,
        uuid: str,
        *,
        sm_clock_mhz: float,
        power_watts: float,
        energy_joules: float,
        gpu_time_seconds: float,
    ) -> None:
        """Publish what the GPU measures; one writer at a time."""
        start = self._offset(uuid)
        version_index = (start + _VERSION_OFFSET) // 8
        first = (start + _TELEMETRY_OFFSET) // 8
        # odd even if an earlier writer died in between
        writing = self._int64[version_index] | 1
        self._int64[version_index] = writing
        self._float64[first] = sm_clock_mhz
        self._float64[first + 1] = power_watts
        self._float64[first + 2] = energy_joules
        self._float64[first + 3] = gpu_time_seconds
        self._int64[version_index] = writing + 1

    def read_telemetry(self, uuid: str) -> GpuReading:
        """Read what the GPU measured last, never a mix of two writes.

        Raises:
            ActuationError: The writer died in the middle of a write.
        """
        start = self._offset(uuid)
        version_index = (start + _VERSION_OFFSET) // 8
        first = (start + _TELEMETRY_OFFSET) // 8
        for _ in range(_READ_TRIES):
            before = self._int64[version_index]
            clock, power, energy, seconds = self._float64[first : first + 4]
            if before % 2 == 0 and self._int64[version_index] == before:
                return GpuReading(round(clock), power, energy, seconds)
        raise ActuationError(f"GPU {uuid}: telemetry in {str(self._path)!r} was left half written")

    def gpu(self, uuid: str) -> SimulatedGpuPort:
        """One GPU's end of the file, as the simulation wants it.

        Counters of a GPU outlive the process that computes on it: the port adds to where they are.
        """
        first = (self._offset(uuid) + _TELEMETRY_OFFSET) // 8
        # not `read_telemetry`: whoever played the GPU before may have died in the middle of a write
        energy, seconds = self._float64[first + 2 : first + 4]
        return SimulatedGpuPort(self, uuid, energy, seconds)

    def _offset(self, uuid: str) -> int:
        try:
            return self._offsets[uuid]
        except KeyError:
            raise NotFoundError(
                f"GPU {uuid!r} is not in {str(self._path)!r}; there are: {', '.join(self.uuids())}"
            ) from None

    def _text(self, start: int) -> str:
        return bytes(self._map[start : start + _TEXT_BYTES]).rstrip(b"\0").decode("ascii")


@dataclass(frozen=True, slots=True)
class SimulatedGpuPort:
    """What the simulated GPU itself does with the file: obey the lock, publish what it measures.

    Attributes:
        file: The file.
        uuid: The GPU.
        counted_joules: Where its energy counter stood before.
        counted_seconds: Likewise its time.
    """

    file: SimulatedGpuFile
    uuid: str
    counted_joules: float = 0.0
    counted_seconds: float = 0.0

    def lock_mhz(self) -> int:
        """The lock in force, MHz; 0 when there is none."""
        return self.file.read_lock_mhz(self.uuid)

    def publish(
        self,
        sm_clock_mhz: float,
        power_watts: float,
        energy_joules: float,
        gpu_time_seconds: float,
    ) -> None:
        """Publish clock, power and what energy and time have grown to since the port was made."""
        self.file.write_telemetry(
            self.uuid,
            sm_clock_mhz=sm_clock_mhz,
            power_watts=power_watts,
            energy_joules=self.counted_joules + energy_joules,
            gpu_time_seconds=self.counted_seconds + gpu_time_seconds,
        )


class SimulatedBackend:
    """A `GpuBackend` over the file."""

    def __init__(self, file: SimulatedGpuFile) -> None:
        self._file = file

    def uuids(self) -> tuple[str, ...]:
        """GPUs in the file."""
        return self._file.uuids()

    def name(self, uuid: str) -> str:
        """The GPU's model."""
        return self._file.name(uuid)

    def supported_clocks_mhz(self, uuid: str) -> tuple[int, ...]:
        """Clocks that can be locked, MHz, rising."""
        return self._file.supported_clocks_mhz(uuid)

    def refusal(self, uuid: str) -> str:
        """Nothing: a simulated GPU may be written by anyone."""
        self._file.read_lock_mhz(uuid)  # it must be there all the same
        return ""

    def set_maximum_clock(self, uuid: str, clock_mhz: int) -> None:
        """Lock to one of the supported clocks."""
        if clock_mhz <= 0:
            raise ActuationError(f"GPU {uuid}: {clock_mhz} MHz is not a clock")
        self._file.write_lock(uuid, clock_mhz)

    def reset_clock(self, uuid: str) -> None:
        """Remove the lock."""
        self._file.write_lock(uuid, 0)

    def read_clock(self, uuid: str) -> ClockReading:
        """Read the clock that the simulated GPU published last."""
        reading = self._file.read_telemetry(uuid)
        return ClockReading(reading.clock_mhz, reading.event_reasons, reading.time_seconds)

    def read(self, uuid: str) -> GpuReading:
        """Read what the simulated GPU published last."""
        return self._file.read_telemetry(uuid)

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()


def _record_offset(index: int) -> int:
    return _HEADER.size + index * _RECORD_BYTES


def _file_bytes(gpus_count: int) -> int:
    return _record_offset(gpus_count)
