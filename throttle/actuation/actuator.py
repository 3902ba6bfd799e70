"""What sessions know of actuation: lease GPUs, set their clocks, give them back.

`RemoteActuator` does it through the privileged process, `LocalActuator` in one's own.
Every failure goes towards the default (fast) clocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from throttle.actuation.backend import GpuReading
    from throttle.actuation.hand import ClockState


@dataclass(frozen=True, slots=True)
class ClockAnswer:
    """What came of a wish for a clock.

    Attributes:
        clock_mhz: What the GPUs are known to have been told last, MHz; 0 for default clocks.
        applied: Whether that is the wish, brought within what may be set. It is not when the wish
            came too soon after the last lowering, when the GPUs must stay at default clocks, and
            when they have not yet been told.
    """

    clock_mhz: int
    applied: bool


class Lease(Protocol):
    """The right of one owner to set the clocks of its GPUs, until it is released or taken away."""

    @property
    def owner(self) -> str:
        """Whose it is."""
        ...

    @property
    def gpu_uuids(self) -> tuple[str, ...]:
        """Its GPUs, sorted."""
        ...

    @property
    def released(self) -> bool:
        """Whether it has been given back or taken away."""
        ...

    def set_clock(self, clock_mhz: int, why: str = "") -> ClockAnswer:
        """Forbid clocks above this one on every GPU of the lease.

        Snaps down to a supported clock, or up to the lowest one. A clock that is already in force
        is not written again. Raising and resetting are never delayed; lowering may be.

        Args:
            clock_mhz: MHz; 0 returns to default clocks and keeps the lease.
            why: For the audit log, in one word.

        Raises:
            ConflictError: The lease is no longer in force.
            ActuationError: A GPU did not obey; all of the lease go to default clocks.
        """
        ...

    def release(self) -> None:
        """Return the GPUs to default clocks and give them back; a second call does nothing.

        Raises:
            ActuationError: A GPU could not be reset. It is given back all the same, and reset again
                until it obeys.
        """
        ...


class Actuator(Protocol):
    """Leases GPUs. Thread safe; a driver call that hangs holds up its own GPU only."""

    def uuids(self) -> tuple[str, ...]:
        """GPUs that may be written."""
        ...

    def name(self, uuid: str) -> str:
        """The GPU's model."""
        ...

    def supported_clocks_mhz(self, uuids: Sequence[str]) -> tuple[int, ...]:
        """Clocks that may be set on every one of these GPUs, MHz, rising."""
        ...

    def read(self, uuid: str) -> GpuReading:
        """Read one GPU; anyone may, with or without a lease."""
        ...

    def target_mhz(self, uuid: str) -> int:
        """What the GPU was told last: MHz, 0 for default clocks, -1 when nothing is known."""
        ...

    def clock_state(self, uuid: str) -> ClockState:
        """What became of that."""
        ...

    def owner(self, uuid: str) -> str:
        """Who holds the GPU; empty when it is free."""
        ...

    def acquire(self, owner: str, uuids: Sequence[str]) -> Lease:
        """Lease all of these GPUs, or none; they are at default clocks then.

        Raises:
            NotFoundError: A GPU is not among the configured ones.
            ConflictError: A GPU is held; the message names its holder.
            ActuationError: A GPU cannot be relied on.
        """
        ...

    def reset_all(self) -> None:
        """Return every allowed GPU to default clocks, leased or not; leases stay in force.

        Raises:
            ActuationError: Some GPU did not obey; all were tried.
        """
        ...

    def renew(self) -> None:
        """Say that this process is alive; leases end without it."""
        ...

    def problems(self) -> dict[str, str]:
        """GPUs that cannot be relied on now, and why; under "" what concerns them all."""
        ...

    def close(self) -> None:
        """End every lease and let the GPUs go."""
        ...
