"""What every policy is and what it is given: one small interface for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from predictors.prediction import Predictor
    from throttle.control.state import EngineProfile, IterationState
    from throttle.simulation.gpu import InProcessLock


class Policy(Protocol):
    """A rule that picks a clock after each state."""

    @property
    def name(self) -> str:
        """Name in tables and reports."""
        ...

    def clock_mhz(self, state: IterationState) -> int:
        """Clock to lock the GPU to, MHz; 0 leaves it at its default.

        Called once for each state, in order.
        """
        ...


class GpuReadings(Protocol):
    """What a driver tells of one GPU, and nothing of the plant behind it."""

    @property
    def clock_mhz(self) -> int:
        """SM clock now."""
        ...

    @property
    def energy_joules(self) -> float:
        """Energy counter of one GPU."""
        ...


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """What a policy may know: the same for every policy.

    Attributes:
        profile: Who the engine is, with the limits that the policy is told to keep.
        predictor: The bundle's predictions.
        readings: Clock and energy counter of the engine's first GPU.
    """

    profile: EngineProfile
    predictor: Predictor
    readings: GpuReadings


def locking(policy: Policy, lock: InProcessLock) -> Callable[[IterationState], None]:
    """The `decide` function of an experiment: asks the policy and sets the lock."""

    def decide(state: IterationState) -> None:
        lock.set_mhz(policy.clock_mhz(state))

    return decide
