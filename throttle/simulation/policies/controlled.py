"""Our own controller as a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from throttle.control.controller import Controller

if TYPE_CHECKING:
    from throttle.control.settings import ControlSettings
    from throttle.control.state import IterationState
    from throttle.simulation.policies.policy import PolicyInputs


class Throttle:
    """`throttle.control`'s controller in process, as the daemon runs it.

    Args:
        inputs: What it may know.
        settings: What the operator tunes.
    """

    name = "throttle"

    def __init__(self, inputs: PolicyInputs, settings: ControlSettings) -> None:
        self._readings = inputs.readings
        self._controller = Controller(inputs.profile, inputs.predictor, settings)
        self._seen = (0.0, 0.0)  # engine time and energy counter at the state before

    def clock_mhz(self, state: IterationState) -> int:
        """Observe, then decide."""
        now, joules = state.engine_time_seconds, self._readings.energy_joules
        seconds, spent = now - self._seen[0], joules - self._seen[1]
        self._seen = (now, joules)
        power = spent / seconds if seconds > 0.0 else None
        self._controller.observe(state, self._readings.clock_mhz, power)
        return self._controller.decide(state).target_clock_mhz
