"""Clocks that never change: maximum clock, and one chosen beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from throttle.control.state import IterationState


class MaximumClock:
    """Never touches the GPU: what NVIDIA's driver does with a busy GPU by default."""

    name = "max"

    def clock_mhz(self, state: IterationState) -> int:  # noqa: ARG002 - of the protocol
        """No lock."""
        return 0


class FixedClock:
    """Locks the GPU to one clock for good.

    Args:
        clock_mhz: That clock.
        name: Name in tables; empty for `fixed-<clock>`.
    """

    def __init__(self, clock_mhz: int, name: str = "") -> None:
        self._clock_mhz = clock_mhz
        self.name = name or f"fixed-{clock_mhz}"

    def clock_mhz(self, state: IterationState) -> int:  # noqa: ARG002 - of the protocol
        """Always the same clock."""
        return self._clock_mhz
