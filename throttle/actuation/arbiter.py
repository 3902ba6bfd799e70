"""Leases on one side, one hand per GPU on the other: the whole of what may slow a GPU.

Nothing here waits for a driver. Used by the privileged process, and in one process by tests and
tools through `LocalActuator`. Thread safe.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from throttle.actuation.hand import Hand
from throttle.actuation.leases import (
    DEFAULT_CLOCKS,
    UNKNOWN_CLOCKS,
    LeaseTable,
    allowed_clocks_mhz,
)
from throttle.errors import ActuationError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from throttle.actuation.backend import ClockDriver
    from throttle.actuation.hand import ClockChange
    from throttle.actuation.journal import Record
    from throttle.actuation.leases import Grant
    from throttle.actuation.settings import ActuationSettings


@dataclass(frozen=True, slots=True)
class Pending:
    """Orders that were given and may not have been carried out yet.

    Attributes:
        orders: Hands and the numbers of their orders.
        held: Whether the wish was not followed: too soon after the last lowering, or GPUs that
            must stay at default clocks.
    """

    orders: tuple[tuple[Hand, int], ...]
    held: bool = False

    @property
    def done(self) -> bool:
        """Whether every order has been carried out, replaced, or has failed."""
        return all(hand.done_number >= number for hand, number in self.orders)

    @property
    def failure(self) -> str:
        """Why orders failed; empty when none did."""
        return "; ".join(hand.failure for hand, _ in self.orders if hand.failure)

    @property
    def clock_mhz(self) -> int:
        """What the GPUs were last told: the lowest, 0 when all are at default, -1 if unknown."""
        told = [hand.target_mhz for hand, _ in self.orders]
        if UNKNOWN_CLOCKS in told:
            return UNKNOWN_CLOCKS
        return min((each for each in told if each != DEFAULT_CLOCKS), default=DEFAULT_CLOCKS)


class Arbiter:
    """Grants leases and orders clocks."""

    def __init__(
        self,
        backend: ClockDriver,
        records: Mapping[str, Record],
        settings: ActuationSettings,
        clock: Callable[[], float],
        *,
        tell: Callable[[ClockChange], None] = lambda _: None,
        tell_ended: Callable[[Grant, str], None] = lambda _grant, _why: None,
        kill_switch: Path | None = None,
    ) -> None:
        """Take charge of GPUs; each hand's first order is to go to default clocks.

        Args:
            backend: The driver.
            records: The GPUs that may be written, and the journal of each.
            settings: Bounds and times.
            clock: Monotonic seconds.
            tell: Told of every write, on the thread that made it.
            tell_ended: Told of every lease that ends otherwise than by its owner, and why.
            kill_switch: While this file exists, every GPU stays at default clocks.

        Raises:
            NotFoundError: The backend does not see a GPU.
            InvalidInputError: No clock of a GPU lies within the bounds.
        """
        self._clock = clock
        self._tell_ended = tell_ended
        self._kill_switch = kill_switch
        self._lock = threading.Lock()  # never held across a driver call
        seen = backend.uuids()
        for uuid in records:
            if uuid not in seen:
                raise NotFoundError(
                    f"GPU {uuid!r} is not on this machine; there are: {', '.join(seen) or 'none'}"
                )
        self._leases = LeaseTable(
            {
                uuid: allowed_clocks_mhz(backend.supported_clocks_mhz(uuid), settings)
                for uuid in records
            },
            settings,
        )
        self.hands = {
            uuid: Hand(uuid, backend, record, settings=settings, clock=clock, tell=tell)
            for uuid, record in records.items()
        }
        self._killed = self._kill_switch_is_set()

    def hand(self, uuid: str) -> Hand:
        """The hand of a GPU.

        Raises:
            NotFoundError: It is not among the configured ones.
        """
        self._leases.owner(uuid)
        return self.hands[uuid]

    def common_clocks_mhz(self, uuids: Iterable[str]) -> tuple[int, ...]:
        """Clocks that may be set on every one of these GPUs, MHz, rising."""
        return self._leases.common_clocks_mhz(uuids)

    def owner(self, uuid: str) -> str:
        """Who holds the GPU; empty when it is free."""
        with self._lock:
            return self._leases.owner(uuid)

    def claim(self, owner: str, uuids: Iterable[str]) -> tuple[Grant, Pending]:
        """Lease all of these GPUs, or none; they are ordered to default clocks.

        Raises:
            NotFoundError: A GPU is not among the configured ones.
            ConflictError: A GPU is held; the message names its holder.
            ActuationError: A GPU cannot be relied on.
        """
        with self._lock:
            grant = self._leases.claim(owner, uuids, self._clock())
            if problem := self._problem(grant.gpu_uuids):
                self._leases.end(grant.epoch)
                raise ActuationError(problem)
            return grant, self._order(grant, "claim")

    def set_clock(self, epoch: int, clock_mhz: int, why: str) -> Pending:
        """Order a clock for every GPU of a lease.

        Raises:
            ConflictError: The lease is no longer in force.
            ActuationError: A GPU cannot be relied on: all were ordered to default clocks.
        """
        with self._lock:
            now = self._clock()
            grant = self._leases.grant(epoch)
            hands = [self.hands[uuid] for uuid in grant.gpu_uuids]
            if problem := self._problem(grant.gpu_uuids):
                self._to_default(grant, "unhealthy")
                raise ActuationError(problem)
            self._killed = self._kill_switch_is_set()
            if self._killed or any(hand.stays_at_default(now) for hand in hands):
                held = self._to_default(grant, "kill_switch" if self._killed else "drifted")
                return Pending(held.orders, held=clock_mhz != DEFAULT_CLOCKS)
            targets = self._leases.order(epoch, clock_mhz, now)
            if targets is None:
                return Pending(tuple((hand, hand.done_number) for hand in hands), held=True)
            return self._order(grant, why, targets)

    def renew(self) -> None:
        """The controller is alive: put off the end of every lease."""
        with self._lock:
            self._leases.renew(self._clock())

    def release(self, epoch: int, why: str = "release") -> Pending:
        """End a lease and order its GPUs to default clocks; nothing if it has ended before."""
        with self._lock:
            grant = self._leases.end(epoch)
            return Pending(()) if grant is None else self._order(grant, why)

    def settle(self, pending: Pending, epoch: int) -> str:
        """Take note of orders that are done: if one failed, the whole lease goes to default clocks.

        Returns:
            Why they failed; empty when they did not.
        """
        failure = pending.failure
        if failure:
            with self._lock:
                grant = next((each for each in self._leases.grants if each.epoch == epoch), None)
                if grant is not None:
                    self._to_default(grant, "group_failed")
        return failure

    def reset_all(self, why: str) -> Pending:
        """Order every GPU to default clocks, also those that seem to be there; leases stay."""
        with self._lock:
            for grant in self._leases.grants:
                grant.target_mhz = DEFAULT_CLOCKS
            return Pending(
                tuple(
                    (hand, hand.want(DEFAULT_CLOCKS, self._leases.owner(uuid), why, force=True))
                    for uuid, hand in self.hands.items()
                )
            )

    def tick(self) -> None:
        """Do what time alone asks for: end leases, obey the kill switch, watch for hung calls."""
        with self._lock:
            now = self._clock()
            for grant in self._leases.expired(now):
                self._end(grant, "expired")
            self._killed = self._kill_switch_is_set()
            for grant in self._leases.grants:
                if self._killed and grant.target_mhz != DEFAULT_CLOCKS:
                    self._to_default(grant, "kill_switch")
            for grant in self._leases.grants:
                if any(self.hands[uuid].hung_seconds(now) for uuid in grant.gpu_uuids):
                    self._end(grant, "hung_call")

    def problems(self) -> dict[str, str]:
        """GPUs in trouble, and why; those that can only be read are in none."""
        now = self._clock()
        found = {uuid: _trouble(hand, now) for uuid, hand in self.hands.items()}
        return {uuid: problem for uuid, problem in found.items() if problem}

    def _end(self, grant: Grant, why: str) -> None:
        self._leases.end(grant.epoch)
        self._order(grant, why)
        self._tell_ended(grant, why)

    def _to_default(self, grant: Grant, why: str) -> Pending:
        grant.target_mhz = DEFAULT_CLOCKS
        return self._order(grant, why)

    def _order(self, grant: Grant, why: str, targets: Mapping[str, int] | None = None) -> Pending:
        return Pending(
            tuple(
                (hand, hand.want(targets[uuid] if targets else DEFAULT_CLOCKS, grant.owner, why))
                for uuid in grant.gpu_uuids
                for hand in (self.hands[uuid],)
            )
        )

    def _problem(self, uuids: Iterable[str]) -> str:
        now = self._clock()
        hands = [self.hands[uuid] for uuid in uuids]
        return "; ".join(filter(None, (_trouble(hand, now) or hand.denial for hand in hands)))

    def _kill_switch_is_set(self) -> bool:
        return self._kill_switch is not None and self._kill_switch.exists()


def _trouble(hand: Hand, now_seconds: float) -> str:
    if hung := hand.hung_seconds(now_seconds):
        return f"GPU {hand.uuid}: a driver call has been hanging {hung:.1f} s beyond its deadline"
    return hand.problem
