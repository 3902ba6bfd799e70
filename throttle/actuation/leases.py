"""Who may set which GPU's clock, and to what: the rules, without threads, files or drivers.

Every method takes the time. Nothing here touches a GPU: what comes out is what must be done.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from throttle.errors import ConflictError, InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from throttle.actuation.settings import ActuationSettings

#: Default clocks, as a target.
DEFAULT_CLOCKS: Final = 0
#: Target of a GPU that nothing is known about: a lock cannot be read back.
UNKNOWN_CLOCKS: Final = -1

#: Raises that an engine may ask for at once. One beyond these and those earned since goes straight
#: to default clocks: not delayed, and the last for a while.
_RAISES_BURST: Final = 20.0


@dataclass(slots=True)
class Grant:
    """One owner's right to some GPUs.

    Attributes:
        epoch: Never given twice; what it fences is refused once the grant has ended.
        owner: The engine.
        gpu_uuids: Its GPUs, sorted.
        deadline_seconds: When it ends unless it is renewed.
        target_mhz: What its GPUs are to run at most.
        raises_left: Raises that it may still ask for.
        refilled_seconds: When they were counted last.
    """

    epoch: int
    owner: str
    gpu_uuids: tuple[str, ...]
    deadline_seconds: float
    target_mhz: int = DEFAULT_CLOCKS
    raises_left: float = _RAISES_BURST
    refilled_seconds: float = 0.0


def allowed_clocks_mhz(
    supported_mhz: Sequence[int], settings: ActuationSettings
) -> tuple[int, ...]:
    """The supported clocks within floor and ceiling, MHz, rising.

    Raises:
        InvalidInputError: None is.
    """
    ceiling = settings.ceiling_clock_mhz or math.inf
    allowed = tuple(
        clock for clock in sorted(supported_mhz) if settings.floor_clock_mhz <= clock <= ceiling
    )
    if not allowed:
        raise InvalidInputError(
            "actuation.floor_clock_mhz and ceiling_clock_mhz",
            (settings.floor_clock_mhz, settings.ceiling_clock_mhz),
            f"bounds with a supported clock between them: {min(supported_mhz)} to "
            f"{max(supported_mhz)} MHz",
        )
    return allowed


def snap(clock_mhz: int, clocks_mhz: Sequence[int]) -> int:
    """The highest of these clocks that is not above the one asked for, or the lowest of all."""
    if clock_mhz == DEFAULT_CLOCKS:
        return DEFAULT_CLOCKS
    return clocks_mhz[max(0, bisect.bisect_right(clocks_mhz, clock_mhz) - 1)]


class LeaseTable:
    """One owner per GPU, all of an engine's GPUs or none. Not thread safe."""

    def __init__(
        self, clocks_mhz: Mapping[str, tuple[int, ...]], settings: ActuationSettings
    ) -> None:
        """Start with every GPU free.

        Args:
            clocks_mhz: By UUID, the clocks that may be set, rising; no other GPU is ever granted.
            settings: Bounds and intervals.
        """
        self._clocks = dict(clocks_mhz)
        self._settings = settings
        self._grants: dict[int, Grant] = {}
        self._owners: dict[str, Grant] = {}
        self._lowered_seconds = dict.fromkeys(clocks_mhz, -math.inf)
        self._epochs = 0

    @property
    def grants(self) -> tuple[Grant, ...]:
        """Those in force."""
        return tuple(self._grants.values())

    def owner(self, uuid: str) -> str:
        """Who holds the GPU; empty when it is free."""
        grant = self._owners.get(self._known(uuid))
        return grant.owner if grant else ""

    def common_clocks_mhz(self, uuids: Iterable[str]) -> tuple[int, ...]:
        """Clocks that may be set on every one of these GPUs, MHz, rising."""
        each = [set(self._clocks[self._known(uuid)]) for uuid in uuids]
        return tuple(sorted(set.intersection(*each)))

    def claim(self, owner: str, uuids: Iterable[str], now_seconds: float) -> Grant:
        """Grant all of these GPUs, or none.

        Raises:
            NotFoundError: A GPU is not among the configured ones.
            ConflictError: A GPU is held; the message names its holder.
        """
        gpus = tuple(sorted({self._known(uuid) for uuid in uuids}))
        if not gpus:
            raise NotFoundError("no GPU is named; allowed: at least one")
        for uuid in gpus:
            if holder := self.owner(uuid):
                raise ConflictError(
                    f"GPU {uuid} is held by {holder!r}; stop that engine or run "
                    f"`throttle release {holder}` first"
                )
        self._epochs += 1
        grant = Grant(self._epochs, owner, gpus, now_seconds + self._settings.lease_seconds)
        grant.refilled_seconds = now_seconds
        self._grants[grant.epoch] = grant
        self._owners.update(dict.fromkeys(gpus, grant))
        return grant

    def grant(self, epoch: int) -> Grant:
        """The grant of an epoch.

        Raises:
            ConflictError: It has ended.
        """
        try:
            return self._grants[epoch]
        except KeyError:
            raise ConflictError(f"lease {epoch} is no longer in force") from None

    def order(self, epoch: int, clock_mhz: int, now_seconds: float) -> Mapping[str, int] | None:
        """What a wish for a clock comes to.

        Args:
            epoch: Whose wish.
            clock_mhz: MHz; 0 for default clocks.
            now_seconds: Monotonic.

        Returns:
            The clock to set by GPU, or None when a lowering comes too soon after the last one.

        Raises:
            ConflictError: The grant has ended.
        """
        grant = self.grant(epoch)
        targets = {uuid: snap(clock_mhz, self._clocks[uuid]) for uuid in grant.gpu_uuids}
        target = min(targets.values())
        if target == grant.target_mhz:
            return targets
        if _speed(target) < _speed(grant.target_mhz):
            last = max(self._lowered_seconds[uuid] for uuid in grant.gpu_uuids)
            if now_seconds - last < self._settings.lowering_interval_seconds:
                return None
            self._lowered_seconds.update(dict.fromkeys(grant.gpu_uuids, now_seconds))
        elif target != DEFAULT_CLOCKS and not self._may_raise(grant, now_seconds):
            targets = dict.fromkeys(grant.gpu_uuids, DEFAULT_CLOCKS)
            target = DEFAULT_CLOCKS
        grant.target_mhz = target
        return targets

    def _may_raise(self, grant: Grant, now_seconds: float) -> bool:
        earned = (now_seconds - grant.refilled_seconds) * self._settings.raises_per_second
        grant.raises_left = min(_RAISES_BURST, grant.raises_left + earned)
        grant.refilled_seconds = now_seconds
        if grant.raises_left < 1.0:
            return False
        grant.raises_left -= 1.0
        return True

    def renew(self, now_seconds: float) -> None:
        """Put off the end of every grant."""
        for grant in self._grants.values():
            grant.deadline_seconds = now_seconds + self._settings.lease_seconds

    def expired(self, now_seconds: float) -> tuple[Grant, ...]:
        """Grants that are past their end; they stay until `end`."""
        return tuple(each for each in self.grants if now_seconds >= each.deadline_seconds)

    def end(self, epoch: int) -> Grant | None:
        """End a grant; None when it had ended before. Its GPUs must go to default clocks."""
        grant = self._grants.pop(epoch, None)
        if grant is not None:
            for uuid in grant.gpu_uuids:
                del self._owners[uuid]
        return grant

    def _known(self, uuid: str) -> str:
        if uuid not in self._clocks:
            known = ", ".join(self._clocks) or "none"
            raise NotFoundError(f"GPU {uuid!r} is not among the configured ones: {known}")
        return uuid


def _speed(target_mhz: int) -> float:
    return math.inf if target_mhz == DEFAULT_CLOCKS else target_mhz
