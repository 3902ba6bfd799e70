"""What an operator may tell the actuator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

#: Where the records of real GPUs lie; emptied at boot, as locks are.
STATE_DIRECTORY = Path("/run/throttle-actuator")
#: In the state directory; while it exists, every GPU is held at default clocks.
KILL_SWITCH_NAME = "default-clocks"


@dataclass(frozen=True, slots=True)
class ActuationSettings:
    """How clocks are set, and how soon they are given back.

    Attributes:
        state_directory: Where it is recorded who holds each GPU and what must be undone; every
            daemon of a machine must use the same. Empty means /run/throttle-actuator, or beside
            the file of simulated GPUs. While it holds a file named default-clocks, every GPU is
            held at default clocks.
        controller_user: User that everything but the actuator runs as, when started by root; empty
            keeps the user and drops the capabilities alone.
        lease_seconds: How long GPUs stay throttled when the controller does not renew.
        floor_clock_mhz: No clock below it is ever set; 0 allows every clock of the GPU.
        ceiling_clock_mhz: No clock above it is ever set, default clocks apart; 0 for no ceiling.
        lowering_interval_seconds: Least time between two lowerings of one GPU. Raising and
            returning to default clocks are never delayed.
        raises_per_second: Raises that an engine may ask for in the long run; one too many goes to
            default clocks.
        settle_seconds: How long after a write the clock is read back.
        call_deadline_seconds: A driver call that takes longer makes its GPU unhealthy.
        answer_wait_seconds: How long an answer to an engine waits for the GPUs to be told; one that
            goes out earlier says the clock before.
    """

    state_directory: Path | None = None
    controller_user: str = ""
    lease_seconds: float = 3.0
    floor_clock_mhz: int = 0
    ceiling_clock_mhz: int = 0
    lowering_interval_seconds: float = 0.25
    raises_per_second: float = 5.0
    settle_seconds: float = 1.0
    call_deadline_seconds: float = 2.0
    answer_wait_seconds: float = 0.01

    def problems(self) -> list[str]:
        """Values that cannot be used, one line each."""
        found = []
        for name, value, least, most in (
            ("lease_seconds", self.lease_seconds, 0.5, 60.0),
            ("floor_clock_mhz", self.floor_clock_mhz, 0, 100_000),
            ("ceiling_clock_mhz", self.ceiling_clock_mhz, 0, 100_000),
            ("lowering_interval_seconds", self.lowering_interval_seconds, 0.0, 60.0),
            ("raises_per_second", self.raises_per_second, 0.1, 1e6),
            ("settle_seconds", self.settle_seconds, 0.05, 60.0),
            ("call_deadline_seconds", self.call_deadline_seconds, 0.1, 60.0),
            ("answer_wait_seconds", self.answer_wait_seconds, 0.0, 60.0),
        ):
            if not (math.isfinite(value) and least <= value <= most):
                found.append(f"{name} is {value}; allowed: {least:g} to {most:g}")
        if 0 < self.ceiling_clock_mhz < self.floor_clock_mhz:
            found.append(
                f"ceiling_clock_mhz is {self.ceiling_clock_mhz}; allowed: 0, or the floor "
                f"({self.floor_clock_mhz}) and above"
            )
        return found
