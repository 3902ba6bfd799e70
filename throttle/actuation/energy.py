"""Energy counters of devices, made to rise for ever."""

from __future__ import annotations

from typing import Final

#: Some firmware counts millijoules in 32 bits although the driver hands out 64.
_WRAP_JOULES: Final = 2.0**32 / 1e3
#: Above its limit a GPU may go for milliseconds; a jump beyond this much is no energy.
_POWER_MARGIN: Final = 1.5
#: What may pass between the counter's update and ours, seconds.
_UPDATE_SECONDS: Final = 1.0


class EnergyCounter:
    """Joules since the first reading, from a counter that may wrap or start anew.

    A counter that falls has wrapped at 32 bits of millijoules if the energy that this would mean
    is possible in the time that passed. Otherwise it started anew, with the driver: what it shows
    now is counted, again if it is possible, and what it had not shown before is lost.
    """

    def __init__(self, highest_watts: float) -> None:
        """Nothing read yet.

        Args:
            highest_watts: Power limit of the device, what it may draw for long.
        """
        self._highest_watts = highest_watts
        self._raw_joules: float | None = None
        self._seconds = 0.0
        self.joules = 0.0
        self.restarts_count = 0

    def update(self, raw_joules: float, seconds: float) -> float:
        """Take in a reading.

        Args:
            raw_joules: What the device shows.
            seconds: When, on a clock that never falls.

        Returns:
            Joules since the first reading.
        """
        before, self._raw_joules = self._raw_joules, raw_joules
        elapsed, self._seconds = seconds - self._seconds, seconds
        if before is None:
            return self.joules
        gained = raw_joules - before
        if gained < 0:
            possible = _POWER_MARGIN * self._highest_watts * (elapsed + _UPDATE_SECONDS)
            wrapped = gained + _WRAP_JOULES
            if 0 <= wrapped <= possible:
                gained = wrapped
            else:
                self.restarts_count += 1
                gained = raw_joules if raw_joules <= possible else 0.0
        self.joules += gained
        return self.joules


class SummedPower:
    """Joules from power readings, for a device without a counter: the trapezoid between them."""

    def __init__(self) -> None:
        self._power_watts: float | None = None
        self._seconds = 0.0
        self.joules = 0.0

    def update(self, power_watts: float, seconds: float) -> float:
        """Take in a reading; returns joules since the first."""
        if self._power_watts is not None:
            mean = 0.5 * (self._power_watts + power_watts)
            self.joules += mean * max(0.0, seconds - self._seconds)
        self._power_watts, self._seconds = power_watts, seconds
        return self.joules
