"""Who may set which GPU's clock: one owner per GPU, all of an engine's GPUs or none.

Every failure goes towards the default (fast) clocks. A lease carries an epoch: once it is released
or taken away, whatever it still asks for is refused, so a late thread cannot slow a GPU that has
been given back.
"""

from __future__ import annotations

import bisect
import dataclasses
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from throttle.errors import ActuationError, ConflictError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from throttle.actuation.backend import GpuBackend, GpuReading

#: Default clocks, as a target.
DEFAULT_CLOCKS = 0

#: Target of a GPU that nothing is known about: a lock cannot be read back.
UNKNOWN_CLOCKS = -1


@dataclass(frozen=True, slots=True)
class ClockChange:
    """One write to one GPU that changed its target.

    Attributes:
        owner: Whose lease it was; empty for a reset without a lease.
        gpu_uuid: The GPU.
        from_mhz: Target before; 0 means default clocks, -1 unknown.
        to_mhz: Target now; 0 means default clocks.
        duration_seconds: How long the write took.
    """

    owner: str
    gpu_uuid: str
    from_mhz: int
    to_mhz: int
    duration_seconds: float


@dataclass(slots=True)
class _Gpu:
    """State of one GPU; `lock` is held across its driver calls, and by nobody for two GPUs."""

    uuid: str
    clocks_mhz: tuple[int, ...]
    lock: threading.Lock = field(default_factory=threading.Lock)
    owner: str = ""
    epoch: int = 0
    target_mhz: int = UNKNOWN_CLOCKS


class Actuator:
    """The only writer of GPU clocks.

    Thread safe. A driver call that hangs blocks its own GPU only.
    """

    def __init__(
        self,
        backend: GpuBackend,
        allowed_uuids: Iterable[str],
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[ClockChange], None] = lambda _: None,
    ) -> None:
        """Take charge of some GPUs; touches none of them.

        Args:
            backend: The driver.
            allowed_uuids: GPUs that may be written; every other is left alone.
            clock: Monotonic seconds, for the duration of writes.
            on_change: Told of every change, on the thread that made it.

        Raises:
            NotFoundError: The backend does not see an allowed GPU.
        """
        self._backend = backend
        self._clock = clock
        self._on_change = on_change
        self._ownership = threading.Lock()  # of every `owner`; never held across a driver call
        self._epochs = 0
        seen = backend.uuids()
        self._gpus: dict[str, _Gpu] = {}
        for uuid in allowed_uuids:
            if uuid not in seen:
                raise NotFoundError(
                    f"GPU {uuid!r} is not on this machine; there are: {', '.join(seen) or 'none'}"
                )
            self._gpus[uuid] = _Gpu(uuid, backend.supported_clocks_mhz(uuid))

    def uuids(self) -> tuple[str, ...]:
        """GPUs that may be written."""
        return tuple(self._gpus)

    def name(self, uuid: str) -> str:
        """The GPU's model."""
        return self._backend.name(self._gpu(uuid).uuid)

    def supported_clocks_mhz(self, uuids: Sequence[str]) -> tuple[int, ...]:
        """Clocks that every one of these GPUs supports, MHz, rising."""
        common = set.intersection(*(set(self._gpu(uuid).clocks_mhz) for uuid in uuids))
        return tuple(sorted(common))

    def read(self, uuid: str) -> GpuReading:
        """Read one GPU; anyone may, with or without a lease."""
        return self._backend.read(self._gpu(uuid).uuid)

    def target_mhz(self, uuid: str) -> int:
        """What the GPU was told last: MHz, 0 for default clocks, -1 when nothing is known."""
        return self._gpu(uuid).target_mhz

    def owner(self, uuid: str) -> str:
        """Who holds the GPU; empty when it is free."""
        return self._gpu(uuid).owner

    def acquire(self, owner: str, uuids: Sequence[str]) -> Lease:
        """Lease all of these GPUs, or none; they are at default clocks then.

        Raises:
            NotFoundError: A GPU is not among the allowed ones.
            ConflictError: A GPU is held; the message names its holder.
            ActuationError: A GPU whose state was unknown could not be reset.
        """
        gpus = sorted({self._gpu(uuid).uuid for uuid in uuids})
        with self._ownership:
            for uuid in gpus:
                if holder := self._gpus[uuid].owner:
                    raise ConflictError(
                        f"GPU {uuid} is held by {holder!r}; stop that engine or run "
                        f"`throttle release {holder}` first"
                    )
            self._epochs += 1
            lease = Lease(self, owner, self._epochs, tuple(gpus))
            for uuid in gpus:
                self._gpus[uuid].owner = owner
                self._gpus[uuid].epoch = lease.epoch
        try:
            for uuid in gpus:
                self._write(uuid, lease, DEFAULT_CLOCKS)
        except ActuationError:
            lease.release()
            raise
        return lease

    def reset_all(self) -> None:
        """Return every allowed GPU to default clocks, leased or not; leases stay in force.

        Raises:
            ActuationError: Some GPU did not obey; all were tried.
        """
        failures = []
        for gpu in self._gpus.values():
            with gpu.lock:
                before, gpu.target_mhz = gpu.target_mhz, UNKNOWN_CLOCKS  # so that it is written
                try:
                    change = self._write_locked(gpu, DEFAULT_CLOCKS)
                except ActuationError as error:
                    failures.append(str(error))
                    change = None
            if change is not None and before != DEFAULT_CLOCKS:
                self._tell(dataclasses.replace(change, from_mhz=before))
        if failures:
            raise ActuationError("; ".join(failures))

    def _set(self, lease: Lease, clock_mhz: int) -> int:
        applied = []
        try:
            for uuid in lease.gpu_uuids:
                clock = _snap_down(clock_mhz, self._gpus[uuid].clocks_mhz)
                self._write(uuid, lease, clock)
                applied.append(clock)
        except ActuationError:
            # one GPU of a group slower than the others serves nobody
            for uuid in lease.gpu_uuids:
                self._reset_quietly(uuid, lease)
            raise
        return min(applied)

    def _release(self, lease: Lease) -> None:
        failures = []
        for uuid in lease.gpu_uuids:
            gpu = self._gpus[uuid]
            with gpu.lock:
                if gpu.epoch != lease.epoch:
                    continue
                # fenced before the reset: a set that waits for the lock must find itself too late
                gpu.epoch = 0
                try:
                    change = self._write_locked(gpu, DEFAULT_CLOCKS)
                except ActuationError as error:
                    failures.append(str(error))
                    change = None
                with self._ownership:
                    gpu.owner = ""
            self._tell(change)
        if failures:
            raise ActuationError("; ".join(failures))

    def _reset_quietly(self, uuid: str, lease: Lease) -> None:
        try:
            self._write(uuid, lease, DEFAULT_CLOCKS)
        except (ActuationError, ConflictError):
            return  # the caller raises the error that brought us here

    def _write(self, uuid: str, lease: Lease, clock_mhz: int) -> None:
        gpu = self._gpus[uuid]
        with gpu.lock:
            if gpu.epoch != lease.epoch:
                raise ConflictError(
                    f"the lease of {lease.owner!r} on GPU {uuid} is no longer in force"
                )
            change = self._write_locked(gpu, clock_mhz)
        self._tell(change)

    def _write_locked(self, gpu: _Gpu, clock_mhz: int) -> ClockChange | None:
        before = gpu.target_mhz
        if before == clock_mhz:
            return None
        started = self._clock()
        gpu.target_mhz = UNKNOWN_CLOCKS  # until the write is known to have worked
        if clock_mhz == DEFAULT_CLOCKS:
            self._backend.reset_clock(gpu.uuid)
        else:
            self._backend.set_maximum_clock(gpu.uuid, clock_mhz)
        gpu.target_mhz = clock_mhz
        return ClockChange(gpu.owner, gpu.uuid, before, clock_mhz, self._clock() - started)

    def _tell(self, change: ClockChange | None) -> None:
        if change is None or (change.from_mhz, change.to_mhz) == (UNKNOWN_CLOCKS, DEFAULT_CLOCKS):
            return  # a reset to be sure is not a change
        self._on_change(change)

    def _gpu(self, uuid: str) -> _Gpu:
        try:
            return self._gpus[uuid]
        except KeyError:
            raise NotFoundError(
                f"GPU {uuid!r} is not among the configured ones: {', '.join(self._gpus) or 'none'}"
            ) from None


class Lease:
    """The right of one owner to set the clocks of its GPUs, until it is released."""

    def __init__(
        self, actuator: Actuator, owner: str, epoch: int, gpu_uuids: tuple[str, ...]
    ) -> None:
        """Made by `Actuator.acquire` only."""
        self.owner = owner
        self.epoch = epoch
        self.gpu_uuids = gpu_uuids
        self._actuator = actuator
        self._released = False

    @property
    def released(self) -> bool:
        """Whether the lease has been given back."""
        return self._released

    def set_clock(self, clock_mhz: int) -> int:
        """Forbid clocks above this one on every GPU of the lease.

        Snaps down to a supported clock, or up to the lowest one. A clock that is already in force
        is not written again.

        Args:
            clock_mhz: MHz; 0 returns to default clocks and keeps the lease.

        Returns:
            The clock in force now, MHz; 0 for default clocks.

        Raises:
            ConflictError: The lease is no longer in force.
            ActuationError: A GPU did not obey; all of the lease were returned to default clocks.
        """
        if self._released:
            raise ConflictError(f"the lease of {self.owner!r} was released")
        return self._actuator._set(self, clock_mhz)  # noqa: SLF001 - two halves of one class

    def release(self) -> None:
        """Return the GPUs to default clocks and give them back; a second call does nothing.

        Raises:
            ActuationError: A GPU could not be reset. It is given back all the same, and reset again
                when it is next leased.
        """
        self._released = True
        self._actuator._release(self)  # noqa: SLF001 - two halves of one class


def _snap_down(clock_mhz: int, clocks_mhz: Sequence[int]) -> int:
    if clock_mhz == DEFAULT_CLOCKS:
        return DEFAULT_CLOCKS
    return clocks_mhz[max(0, bisect.bisect_right(clocks_mhz, clock_mhz) - 1)]
