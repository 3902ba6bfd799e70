"""What follows from an equilibrium for all decisions until the next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.cruise import Equilibrium


@dataclass(frozen=True, slots=True)
class LongRun:
    """Of one equilibrium.

    Attributes:
        equilibrium: Of the present load.
        carried: Clocks that may be chosen and carry the load, (C,).
        cruise_clock_mhz: That of least average power among them; 0 where there is none.
        average_watts: Of all GPUs at the present load, working at each clock, (C,).
        default_average_watts: The same, never throttled and not parked either: what is never
            throttled idles at its default clocks.
    """

    equilibrium: Equilibrium
    carried: NDArray[np.bool_]
    cruise_clock_mhz: int
    average_watts: list[float]
    default_average_watts: float

    @classmethod
    def of(
        cls,
        equilibrium: Equilibrium,
        clocks_mhz: NDArray[np.int64],
        allowed: NDArray[np.bool_],
        idle_power_watts: NDArray[np.float64],
        gpus_count: int,
        *,
        parking: bool,
    ) -> LongRun:
        """Work it out.

        Args:
            equilibrium: What each clock settles at.
            clocks_mhz: Candidates, (C,).
            allowed: Clocks that may be chosen, (C,).
            idle_power_watts: Power of one idle GPU at each clock, (C,).
            gpus_count: The engine's GPUs.
            parking: Whether idle GPUs go to their lowest clock.
        """
        carried = allowed & np.isfinite(equilibrium.power_watts)
        power = np.where(carried, equilibrium.power_watts, np.inf)
        cruise = int(clocks_mhz[int(np.argmin(power))]) if carried.any() else 0
        default = float(equilibrium.power_watts[-1])
        if parking:
            idle = idle_power_watts
            default += float((1.0 - equilibrium.busy_ratio[-1]) * (idle[-1] - idle[0]))
        average: list[float] = (equilibrium.power_watts * gpus_count).tolist()
        return cls(equilibrium, carried, cruise, average, default * gpus_count)

    def average_power_watts(self, clock_index: int) -> tuple[float, float]:
        """Working at a clock, and never throttled; 0 both where one carries less than the load."""
        average = self.average_watts[clock_index]
        if not math.isfinite(average + self.default_average_watts):
            return 0.0, 0.0
        return average, self.default_average_watts
