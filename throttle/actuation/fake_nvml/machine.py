"""The pretended machine: a memory-mapped file that every process with the library shares.

A test writes here what happens to the GPUs, and reads what was done to them. The layout is that of
`nvml.c`; the library refuses a file of another size.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import fcntl
import mmap
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from throttle.actuation.fake_nvml.layout import (
    FAULTS_LIMIT,
    GPUS_LIMIT,
    MAGIC,
    VERSION,
    WRITES_LIMIT,
    FaultLayout,
    GpuLayout,
    StateLayout,
    WriteLayout,
)
from throttle.actuation.fake_nvml.profiles import PROFILES
from throttle.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_DEPRECATED: Final = 26
_ANY_GPU: Final = -1
_FOR_EVER: Final = -1


class Permission(enum.IntEnum):
    """Who may write clocks."""

    EVERYONE = 0
    #: Processes with CAP_SYS_ADMIN in effect, as the real driver wants it.
    PRIVILEGED = 1
    NOBODY = 2


class WriteKind(enum.IntEnum):
    """What a call that writes was about."""

    LOCK = 1
    RESET = 2
    POWER_LIMIT = 3
    MEMORY_LOCK = 4


@dataclass(frozen=True, slots=True)
class FakeGpu:
    """One GPU to pretend.

    Attributes:
        profile: One of `throttle.actuation.fake_nvml.profiles.PROFILES`.
        uuid: As NVML would give it.
    """

    profile: str
    uuid: str


@dataclass(frozen=True, slots=True)
class DriverWrite:
    """One call that would have written, whether or not it was allowed to.

    Attributes:
        kind: What it was about.
        gpu_uuid: The GPU.
        minimum: Lower end of the lock, MHz; a power limit is in milliwatts.
        maximum: Upper end.
        pid: Who called.
        code: What NVML answered; 0 is success.
        time_seconds: When, by the machine's clock.
    """

    kind: WriteKind
    gpu_uuid: str
    minimum: int
    maximum: int
    pid: int
    code: int
    time_seconds: float


class Fault:
    """An injected fault, in force until it has been used up or is removed."""

    def __init__(self, machine: FakeMachine, slot: FaultLayout) -> None:
        """Made by `FakeMachine.inject` only."""
        self._machine = machine
        self._slot = slot

    def remove(self) -> None:
        """End the fault; calls that hang in it go on."""
        with self._machine.locked():
            self._slot.remaining = 0


class FakeMachine:
    """The machine's state; one object per process is enough, and any process may hold one."""

    def __init__(self, path: Path) -> None:
        """Map an existing file.

        Raises:
            NotFoundError: There is no such file.
            InvalidInputError: It is not the state of a pretended machine.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise NotFoundError(f"{path} cannot be opened: {error.strerror}") from None
        size = os.fstat(self._descriptor).st_size
        if size != ctypes.sizeof(StateLayout):
            os.close(self._descriptor)
            raise InvalidInputError(
                str(path), f"{size} bytes", f"{ctypes.sizeof(StateLayout)} bytes"
            )
        self._map = mmap.mmap(self._descriptor, size)
        self._state = StateLayout.from_buffer(self._map)
        self._mutex = threading.Lock()

    @classmethod
    def create(cls, path: Path, gpus: Sequence[FakeGpu], *, virtual_time: bool = False) -> Self:
        """Make a machine whose GPUs are idle at default clocks.

        Args:
            path: The file; replaced if there is one.
            gpus: 1 to 16, each UUID once.
            virtual_time: Whether time passes by `advance` only; else it is the monotonic clock.

        Raises:
            InvalidInputError: No such profile, too many GPUs, or one named twice.
        """
        uuids = [gpu.uuid for gpu in gpus]
        if not 1 <= len(gpus) <= GPUS_LIMIT or len(set(uuids)) != len(uuids):
            raise InvalidInputError("gpus", uuids, f"1 to {GPUS_LIMIT} GPUs, each once")
        state = StateLayout()
        state.magic, state.version, state.bytes = MAGIC, VERSION, ctypes.sizeof(StateLayout)
        state.loaded, state.gpus_count, state.cuda_version = 1, len(gpus), 13000
        state.time_virtual = virtual_time
        for entry, gpu in zip(state.gpus, gpus, strict=False):
            if gpu.profile not in PROFILES:
                raise InvalidInputError("gpus.profile", gpu.profile, ", ".join(PROFILES))
            state.driver_version = PROFILES[gpu.profile].driver_version.encode()
            _describe(entry, gpu)
        draft = path.with_name(f"{path.name}.{os.getpid()}.new")
        draft.write_bytes(bytes(state))
        draft.replace(path)
        return cls(path)

    def close(self) -> None:
        """Unmap; the object and its GPUs are of no use after."""
        del self._state
        with contextlib.suppress(BufferError):  # a GPU's view is still held somewhere
            self._map.close()
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        """The machine itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Unmap."""
        self.close()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every call of every process out for a moment."""
        with self._mutex:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def gpu(self, uuid: str) -> FakeGpuControl:
        """What can be done to one GPU.

        Raises:
            NotFoundError: There is no such GPU.
        """
        for index in range(self._state.gpus_count):
            if self._state.gpus[index].uuid == uuid.encode():
                return FakeGpuControl(self, index, self._state.gpus[index])
        raise NotFoundError(f"GPU {uuid!r} is not on the pretended machine {self.path}")

    def inject(
        self,
        function: str,
        *,
        code: int = 0,
        times: int | None = None,
        gpu_uuid: str | None = None,
        delay_seconds: tuple[float, float] = (0.0, 0.0),
        hang: bool = False,
    ) -> Fault:
        """Make calls of a function fail, take time or hang.

        Args:
            function: Exported name, `FieldValue<id>` for one field, `FieldValue<id>.<scope>` for
                one in a scope other than GPU, or `*` for all of them.
            code: What is answered instead; 0 answers as usual. A missing function is 13.
            times: How often; None until removed.
            gpu_uuid: For this GPU only; None for all.
            delay_seconds: Least and greatest delay; drawn evenly between them.
            hang: Block until the fault is removed.

        Raises:
            InvalidInputError: There are too many faults already.
        """
        index = _ANY_GPU if gpu_uuid is None else self.gpu(gpu_uuid).index
        with self.locked():
            for slot in self._state.faults:
                if slot.remaining != 0:
                    continue
                slot.function, slot.gpu = function.encode(), index
                slot.code, slot.hang = code, hang
                slot.delay_minimum_seconds, slot.delay_maximum_seconds = delay_seconds
                slot.remaining = _FOR_EVER if times is None else times
                return Fault(self, slot)
        raise InvalidInputError("function", function, f"up to {FAULTS_LIMIT} faults at once")

    def clear_faults(self) -> None:
        """Remove every fault."""
        with self.locked():
            for slot in self._state.faults:
                slot.remaining = 0

    def allow_writes(self, permission: Permission) -> None:
        """Say who may write clocks from now on."""
        with self.locked():
            self._state.permission = permission

    def unload_driver(self) -> None:
        """Take the driver away: inits fail, and calls of who had it answer UNKNOWN."""
        with self.locked():
            self._state.loaded = 0

    def reload_driver(self) -> None:
        """Load the driver anew: locks and energy counters are gone, old handles useless."""
        with self.locked():
            self._state.loaded = 1
            self._state.generation += 1
            for gpu in self._state.gpus:
                gpu.lock_minimum_mhz = gpu.lock_maximum_mhz = 0
                gpu.energy_joules = 0.0

    def advance(self, seconds: float) -> None:
        """Let virtual time pass."""
        with self.locked():
            self._state.time_seconds += seconds

    def calls_count(self, function: str) -> int:
        """How often a function was called, by whichever process; hanging calls count."""
        with self.locked():
            for entry in self._state.functions:
                if entry.function == function.encode():
                    return int(entry.calls_count)
        return 0

    def writes(self) -> tuple[DriverWrite, ...]:
        """The last 4096 calls that would have written, in order."""
        with self.locked():
            count = self._state.writes_count
            kept = range(max(0, count - WRITES_LIMIT), count)
            return tuple(self._write(self._state.writes[n % WRITES_LIMIT]) for n in kept)

    def _write(self, entry: WriteLayout) -> DriverWrite:
        return DriverWrite(
            WriteKind(entry.kind),
            self._state.gpus[entry.gpu].uuid.decode(),
            entry.minimum,
            entry.maximum,
            entry.pid,
            entry.code,
            entry.time_seconds,
        )


class FakeGpuControl:
    """What a test sees of one GPU, and can do to it.

    A change of load or temperature counts from the last driver call before it.
    """

    def __init__(self, machine: FakeMachine, index: int, entry: GpuLayout) -> None:
        """Made by `FakeMachine.gpu` only."""
        self.index = index
        self._machine = machine
        self._entry = entry

    @property
    def lock_mhz(self) -> tuple[int, int] | None:
        """The lock in force, lower and upper end; None at default clocks."""
        with self._machine.locked():
            lock = (self._entry.lock_minimum_mhz, self._entry.lock_maximum_mhz)
        return lock if lock[1] else None

    @property
    def power_limit_watts(self) -> float:
        """The power limit in force."""
        return float(self._entry.power_limit_watts)

    def set_load(self, ratio: float) -> None:
        """Say how busy it is, 0 to 1."""
        self._set("load_ratio", ratio)

    def set_processes(self, *pids: int) -> None:
        """Say which processes have a context, up to 8; with one the clock stays up when idle."""
        with self._machine.locked():
            self._entry.processes_count = len(pids)
            for index, pid in enumerate(pids):
                self._entry.processes_pid[index] = pid

    def set_temperature(self, celsius: int) -> None:
        """Say how hot it is."""
        self._set("temperature_celsius", celsius)

    def set_power_limit(self, watts: float) -> None:
        """Cap the power, as an administrator would."""
        self._set("power_limit_watts", watts)

    def set_settle_seconds(self, seconds: float) -> None:
        """Say how long a clock takes to arrive."""
        self._set("settle_seconds", seconds)

    def set_ceiling(self, clock_mhz: int, reasons: int = 0) -> None:
        """Let the firmware allow no clock above one, for these event reasons; 0 MHz ends it."""
        with self._machine.locked():
            self._entry.ceiling_mhz, self._entry.ceiling_reasons = clock_mhz, reasons

    def set_application_clock(self, clock_mhz: int) -> None:
        """Set an application clock, as another tool would; 0 is the default."""
        self._set("application_clock_mhz", clock_mhz)

    def set_mig(self, *, enabled: bool) -> None:
        """Cut it into instances, or not."""
        self._set("mig_enabled", int(enabled))

    def set_persistence(self, *, enabled: bool) -> None:
        """Set persistence mode."""
        self._set("persistence", int(enabled))

    def set_module_power(self, watts: float) -> None:
        """Let MODULE scope be answered, with this much beside the GPU."""
        with self._machine.locked():
            self._entry.module_power, self._entry.module_watts = 1, watts

    def set_energy(self, joules: float, *, wrap_millijoules: float = 0.0) -> None:
        """Set the energy counter, and where it wraps (0: at 64 bits)."""
        with self._machine.locked():
            self._entry.energy_joules = joules
            self._entry.energy_wrap_millijoules = wrap_millijoules

    def lock_as_another_agent(self, minimum_mhz: int, maximum_mhz: int) -> None:
        """Lock the clocks behind everybody's back; nothing in NVML tells, but the clock."""
        with self._machine.locked():
            self._entry.lock_minimum_mhz = minimum_mhz
            self._entry.lock_maximum_mhz = maximum_mhz

    def lose(self) -> None:
        """Let it fall off the bus: every call about it answers GPU_IS_LOST."""
        self._set("lost", 1)

    def find(self) -> None:
        """Bring it back, at default clocks, as after a reboot."""
        with self._machine.locked():
            self._entry.lost = 0
            self._entry.lock_minimum_mhz = self._entry.lock_maximum_mhz = 0

    def _set(self, name: str, value: float) -> None:
        with self._machine.locked():
            setattr(self._entry, name, value)


def _describe(entry: GpuLayout, gpu: FakeGpu) -> None:
    profile = PROFILES[gpu.profile]
    low, high, default = profile.power_limits_watts
    entry.uuid, entry.name = gpu.uuid.encode(), profile.name.encode()
    entry.memory_clocks_count = len(profile.clocks_mhz)
    for index, (memory_mhz, clocks) in enumerate(profile.clocks_mhz.items()):
        entry.memory_clocks_mhz[index] = memory_mhz
        entry.clocks_count[index] = len(clocks)
        for position, clock in enumerate(reversed(clocks)):
            entry.clocks_mhz[index][position] = clock
    entry.application_clocks_code = 0 if profile.application_clocks else _DEPRECATED
    entry.mig_supported, entry.persistence = profile.mig_supported, 1
    entry.temperature_celsius = 35
    entry.compute_major, entry.compute_minor = profile.compute_capability
    entry.idle_watts, entry.context_watts = profile.idle_watts, profile.context_watts
    entry.busy_watts = 0.95 * default
    entry.power_limit_watts = entry.power_limit_default_watts = default
    entry.power_limit_minimum_watts, entry.power_limit_maximum_watts = low, high
