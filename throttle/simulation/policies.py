"""Clock policies that run beside the engine, without a daemon: the baselines of experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from throttle.control.state import IterationState
    from throttle.simulation.gpu import InProcessLock


class Policy(Protocol):
    """A rule that picks a clock after each state."""

    @property
    def name(self) -> str:
        """Name in tables and reports."""
        ...

    def clock_mhz(self, state: IterationState) -> int:
        """Clock to lock the GPU to, MHz; 0 leaves it at its default."""
        ...


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
    """

    def __init__(self, clock_mhz: int) -> None:
        self._clock_mhz = clock_mhz
        self.name = f"fixed-{clock_mhz}"

    def clock_mhz(self, state: IterationState) -> int:  # noqa: ARG002 - of the protocol
        """Always the same clock."""
        return self._clock_mhz


def locking(policy: Policy, lock: InProcessLock) -> Callable[[IterationState], None]:
    """The `decide` function of an experiment: asks the policy and sets the lock."""

    def decide(state: IterationState) -> None:
        lock.set_mhz(policy.clock_mhz(state))

    return decide
