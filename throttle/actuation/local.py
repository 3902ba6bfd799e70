"""The actuator in one's own process: for tests, profiling and other tools on simulated GPUs.

The rules are those of the privileged process. What it lacks is everything that process is for: no
journal unless one is given, no thread per GPU, and nobody left to reset the GPUs of a process that
is killed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from throttle.actuation.actuator import ClockAnswer
from throttle.actuation.arbiter import Arbiter, Pending
from throttle.actuation.journal import NoRecord
from throttle.actuation.leases import DEFAULT_CLOCKS, UNKNOWN_CLOCKS
from throttle.actuation.settings import ActuationSettings
from throttle.errors import ActuationError, ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from throttle.actuation.backend import GpuBackend, GpuReading
    from throttle.actuation.hand import ClockChange, ClockState
    from throttle.actuation.journal import Record
    from throttle.actuation.leases import Grant

#: A tool may change clocks as fast as it likes.
UNPACED = ActuationSettings(lowering_interval_seconds=0.0)


class LocalActuator:
    """An `Actuator` whose callers wait for the driver."""

    def __init__(
        self,
        backend: GpuBackend,
        allowed_uuids: Iterable[str],
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[ClockChange], None] = lambda _: None,
        *,
        settings: ActuationSettings = UNPACED,
        records: Mapping[str, Record] | None = None,
    ) -> None:
        """Take charge of some GPUs; touches none of them.

        Args:
            backend: The driver.
            allowed_uuids: GPUs that may be written; every other is left alone.
            clock: Monotonic seconds.
            on_change: Told of every write that changed a target, on the thread that made it.
            settings: Bounds and times.
            records: Journals; None to keep none.

        Raises:
            NotFoundError: The backend does not see an allowed GPU.
        """
        self._backend = backend
        self._on_change = on_change
        kept: Mapping[str, Record] = (
            records if records is not None else {uuid: NoRecord() for uuid in allowed_uuids}
        )
        self._arbiter = Arbiter(backend, kept, settings, clock, tell=self._tell)

    def uuids(self) -> tuple[str, ...]:
        """GPUs that may be written."""
        return tuple(self._arbiter.hands)

    def name(self, uuid: str) -> str:
        """The GPU's model."""
        return self._backend.name(self._arbiter.hand(uuid).uuid)

    def supported_clocks_mhz(self, uuids: Sequence[str]) -> tuple[int, ...]:
        """Clocks that may be set on every one of these GPUs, MHz, rising."""
        return self._arbiter.common_clocks_mhz(uuids)

    def read(self, uuid: str) -> GpuReading:
        """Read one GPU."""
        return self._backend.read(self._arbiter.hand(uuid).uuid)

    def target_mhz(self, uuid: str) -> int:
        """What the GPU was told last."""
        return self._arbiter.hand(uuid).target_mhz

    def clock_state(self, uuid: str) -> ClockState:
        """What became of that."""
        return self._arbiter.hand(uuid).clock_state

    def owner(self, uuid: str) -> str:
        """Who holds the GPU; empty when it is free."""
        return self._arbiter.owner(uuid)

    def acquire(self, owner: str, uuids: Sequence[str]) -> LocalLease:
        """Lease all of these GPUs, or none; one that could not be reset is tried again first."""
        for hand in map(self._arbiter.hand, uuids):
            if hand.problem:
                self._work(Pending(((hand, hand.want(DEFAULT_CLOCKS, "", "retry", force=True)),)))
        grant, pending = self._arbiter.claim(owner, uuids)
        try:
            self._carry_out(pending, grant.epoch)
        except ActuationError:
            self._work(self._arbiter.release(grant.epoch))
            raise
        return LocalLease(self, grant)

    def reset_all(self) -> None:
        """Return every allowed GPU to default clocks."""
        pending = self._arbiter.reset_all("reset_all")
        self._work(pending)
        if pending.failure:
            raise ActuationError(pending.failure)

    def renew(self) -> None:
        """Nothing: leases end with the process."""

    def problems(self) -> dict[str, str]:
        """GPUs that cannot be relied on now, and why."""
        return self._arbiter.problems()

    def close(self) -> None:
        """Nothing to free."""

    def set_clock(self, grant: Grant, clock_mhz: int, why: str) -> ClockAnswer:
        """What `LocalLease.set_clock` does."""
        pending = self._arbiter.set_clock(grant.epoch, clock_mhz, why)
        self._carry_out(pending, grant.epoch)
        return ClockAnswer(pending.clock_mhz, applied=not pending.held)

    def release(self, grant: Grant) -> None:
        """What `LocalLease.release` does."""
        pending = self._arbiter.release(grant.epoch)
        self._work(pending)
        if pending.failure:
            raise ActuationError(pending.failure)

    def _carry_out(self, pending: Pending, epoch: int) -> None:
        self._work(pending)
        if failure := self._arbiter.settle(pending, epoch):
            for hand, _ in pending.orders:
                hand.work()
            raise ActuationError(failure)

    def _work(self, pending: Pending) -> None:
        for hand, number in pending.orders:
            while hand.done_number < number:
                hand.work()

    def _tell(self, change: ClockChange) -> None:
        if change.to_mhz != UNKNOWN_CLOCKS and (change.from_mhz, change.to_mhz) not in {
            (UNKNOWN_CLOCKS, DEFAULT_CLOCKS),  # a reset to be sure is not a change
            (DEFAULT_CLOCKS, DEFAULT_CLOCKS),
        }:
            self._on_change(change)


class LocalLease:
    """A `Lease` of a `LocalActuator`."""

    def __init__(self, actuator: LocalActuator, grant: Grant) -> None:
        """Made by `LocalActuator.acquire` only."""
        self._actuator = actuator
        self._grant = grant
        self._released = False

    @property
    def owner(self) -> str:
        """Whose it is."""
        return self._grant.owner

    @property
    def gpu_uuids(self) -> tuple[str, ...]:
        """Its GPUs, sorted."""
        return self._grant.gpu_uuids

    @property
    def released(self) -> bool:
        """Whether it has been given back."""
        return self._released

    def set_clock(self, clock_mhz: int, why: str = "") -> ClockAnswer:
        """Forbid clocks above this one on every GPU of the lease."""
        if self._released:
            raise ConflictError(f"the lease of {self.owner!r} was released")
        return self._actuator.set_clock(self._grant, clock_mhz, why)

    def release(self) -> None:
        """Return the GPUs to default clocks and give them back."""
        self._released = True
        self._actuator.release(self._grant)
