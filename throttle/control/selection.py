"""From slack and power to one clock, with its reason: up at once, down slowly."""

from __future__ import annotations

import enum
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from throttle.control.slack import Slo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.advice import Advice


#: What a clock is judged by among those that keep every limit: the long-run average power at the
#: present load; the clock itself; the energy of the work at hand; the same above idle power.
Objective = Literal["long-run", "lowest-clock", "energy", "energy-above-idle"]
OBJECTIVES: Final[tuple[Objective, ...]] = get_args(Objective)


class Reason(enum.IntEnum):
    """Why a clock was chosen (values and meanings as in the protocol)."""

    CRUISE = 1
    SLACK = 2
    HELD = 3
    INFEASIBLE = 4
    PARKED = 5
    KV_PRESSURE = 6
    OUT_OF_ENVELOPE = 7
    POOR_INFORMATION = 8
    RECORDING = 9
    FAULT = 10
    RELEASED = 11
    LEASE_EXPIRED = 12
    EXPLORATION = 13
    BREAKER_OPEN = 14


# Values as plain numbers: compiled code takes them for constants.
_CRUISE, _SLACK, _HELD = int(Reason.CRUISE), int(Reason.SLACK), int(Reason.HELD)
_INFEASIBLE, _POOR_INFORMATION = int(Reason.INFEASIBLE), int(Reason.POOR_INFORMATION)
_TPOT = int(Slo.TPOT)
_LONG_RUN, _LOWEST_CLOCK = OBJECTIVES.index("long-run"), OBJECTIVES.index("lowest-clock")
_ENERGY = OBJECTIVES.index("energy")


@dataclass(frozen=True, slots=True)
class Binding:
    """The limit with the least slack at the chosen clock."""

    slo: Slo
    request_number: int
    slack_seconds: float


@dataclass(frozen=True, slots=True)
class Decision:
    """A clock and why; what is predicted is of the next iteration unless it says otherwise.

    Attributes:
        target_clock_mhz: Clock to apply; 0 means the GPU's default.
        reason: Why.
        binding: The limit that binds; None when none does.
        predicted_iteration_seconds: Expected duration at the target; 0 when nothing runs.
        predicted_iteration_upper_seconds: Its calibrated upper bound.
        predicted_power_watts: Expected power of all GPUs of the engine.
        predicted_default_iteration_seconds: The same at the default (fastest) clock.
        predicted_default_power_watts: The same at the default (fastest) clock.
        cruise_clock_mhz: Clock of least long-run power; 0 while the load is not known.
        lost_requests_count: Requests that no clock can save.
        long_run_power_watts: Average power of all GPUs of the engine at the present load, idle time
            included, if work is always done at this clock; 0 while the load is not known.
        default_long_run_power_watts: The same, had the GPUs always been at default clocks: what is
            saved is the difference. Fewer requests are batched there, so more iterations are run.
        advice: On what is not decided here; None where the engine did not ask.
    """

    target_clock_mhz: int
    reason: Reason
    binding: Binding | None = None
    predicted_iteration_seconds: float = 0.0
    predicted_iteration_upper_seconds: float = 0.0
    predicted_power_watts: float = 0.0
    predicted_default_iteration_seconds: float = 0.0
    predicted_default_power_watts: float = 0.0
    cruise_clock_mhz: int = 0
    lost_requests_count: int = 0
    long_run_power_watts: float = 0.0
    default_long_run_power_watts: float = 0.0
    advice: Advice | None = None


@dataclass(frozen=True, slots=True)
class Hysteresis:
    """What keeps clocks from chattering.

    Attributes:
        dwell_seconds: Age of the last change from which a lower clock needs no more than the least
            gain. Sooner it needs more, by the square of what is lacking: a change is worth its cost
            when it saves much, or for long.
        least_dwell_seconds: Least time between the last change and a lower clock.
        least_gain_ratio: Share of long-run power that a change must save.
        raise_step_ratio: Least relative step upwards when slack forces it, so that a shrinking
            slack is answered once and not one clock at a time.
    """

    dwell_seconds: float
    least_dwell_seconds: float
    least_gain_ratio: float
    raise_step_ratio: float


class Selector:
    """Chooses among clocks and remembers only what hysteresis needs.

    Args:
        clocks_mhz: Candidate clocks, rising, (C,).
        hysteresis: How reluctantly to change.
    """

    def __init__(self, clocks_mhz: NDArray[np.int64], hysteresis: Hysteresis) -> None:
        self._clocks_mhz = clocks_mhz
        self._reluctance = astuple(hysteresis)
        self._current = len(clocks_mhz) - 1
        self._changed_seconds = -np.inf

    @property
    def current(self) -> int:
        """Index of the clock last chosen."""
        return self._current

    def jump(self, index: int, now_seconds: float) -> int:
        """Take a clock past every dwell: guards, parking and waking."""
        if index != self._current:
            self._current = index
            self._changed_seconds = now_seconds
        return index

    def choose(
        self,
        feasible: NDArray[np.bool_],
        long_run_power_watts: NDArray[np.float64] | None,
        now_seconds: float,
        weight_ratio: NDArray[np.float64] | None = None,
    ) -> tuple[int, Reason]:
        """Choose a feasible clock of least long-run power, weighed by what it risks.

        Args:
            feasible: Which clocks keep every limit, (C,).
            long_run_power_watts: Power at the equilibrium of each clock, infinite where the load is
                not carried, (C,); None while the load is not known.
            now_seconds: Engine time.
            weight_ratio: What power is multiplied with for what each clock risks, 1 or more, (C,).

        Returns:
            The clock's index and the reason. A clock that is not feasible is returned only when
            none is, and then it is the fastest.
        """
        ones = np.ones(len(self._clocks_mhz))
        index, reason = select_clock(
            feasible,
            ones if long_run_power_watts is None else long_run_power_watts,
            ones if weight_ratio is None else weight_ratio,
            long_run_power_watts is not None,
            *self.standing(now_seconds),
        )
        return self.jump(index, now_seconds), Reason(reason)

    def standing(self, now_seconds: float) -> tuple[Any, ...]:
        """What `select_clock` takes of the selector: clocks, where it stands, its hysteresis."""
        elapsed = now_seconds - self._changed_seconds
        return self._clocks_mhz, self._current, elapsed, self._reluctance


def select_clock(  # noqa: PLR0917 - as it is compiled
    feasible: NDArray[np.bool_],
    power_watts: NDArray[np.float64],
    weight_ratio: NDArray[np.float64],
    load_known: bool,  # noqa: FBT001
    clocks_mhz: NDArray[np.int64],
    current: int,
    elapsed_seconds: float,
    reluctance: tuple[float, float, float, float],
) -> tuple[int, int]:
    """What `Selector.choose` chooses, and the value of the reason; compiled as it stands.

    Args:
        feasible: As there.
        power_watts: As there; anything while the load is not known.
        weight_ratio: As there.
        load_known: Whether it is.
        clocks_mhz: Candidates, rising, (C,).
        current: Index of the clock last chosen.
        elapsed_seconds: Engine time since the last change.
        reluctance: The fields of `Hysteresis`, in order.
    """
    dwell_seconds, least_dwell_seconds, least_gain_ratio, raise_step_ratio = reluctance
    fastest = len(feasible) - 1
    if not feasible.any():
        return fastest, _INFEASIBLE
    fastest_feasible = int(np.flatnonzero(feasible)[-1])
    if not load_known:
        return fastest_feasible, _POOR_INFORMATION
    cost = np.where(feasible, power_watts * weight_ratio, np.inf)
    best = int(np.argmin(cost))
    if not np.isfinite(cost[best]):
        # The load is more than any feasible clock carries in the long run.
        return fastest_feasible, _INFEASIBLE
    reason = _CRUISE if best == np.argmin(power_watts) else _SLACK
    if not np.isfinite(cost[current]):
        if best >= current:  # at least one raise step up
            wanted = clocks_mhz[current] * (1.0 + raise_step_ratio)
            stepped = min(max(best, int(np.searchsorted(clocks_mhz, wanted))), fastest)
            if feasible[stepped]:
                best = stepped
    elif best != current:
        # held where the gain is too small, or a lower clock comes too soon
        too_soon = best < current and elapsed_seconds < least_dwell_seconds
        if best < current and not too_soon and elapsed_seconds < dwell_seconds:
            least_gain_ratio *= (dwell_seconds / elapsed_seconds) ** 2
        if too_soon or 1.0 - cost[best] / cost[current] < least_gain_ratio:
            best, reason = current, _HELD
    return best, reason


def clock_costs(  # noqa: PLR0917 - as it is compiled
    objective: int,
    clocks_mhz: NDArray[np.int64],
    joules: NDArray[np.float64],
    seconds: NDArray[np.float64],
    refund_watts: float,
    current: int,
    carried: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """What each clock costs but for lateness, positive, (C,); compiled as it stands.

    By default the power of computing the horizon, per second of the present clock, with time
    refunded at the rate that it is worth at this load. Where the batch is the one that the load
    settles at, the least of it is the cruise clock; on the way there, and when work runs out, it is
    not.

    Args:
        objective: Place in `OBJECTIVES`.
        clocks_mhz: Candidates, (C,).
        joules: Energy of one GPU over the horizon, (C,).
        seconds: Duration of the horizon, (C,).
        refund_watts: What a second less of computing is worth.
        current: Index of the clock last chosen.
        carried: Clocks that may be chosen and carry the load, (C,).
    """
    if objective == _LOWEST_CLOCK:
        return clocks_mhz.astype(np.float64)
    if objective == _ENERGY:
        return joules
    cost = refund_watts + (joules - refund_watts * seconds) / seconds[current]
    return np.where(carried, cost, np.inf) if objective == _LONG_RUN else cost


def binding_limit(  # noqa: PLR0917 - as it is compiled
    index: int,
    slack_seconds: NDArray[np.float64],
    slos: NDArray[np.int64],
    request_numbers: NDArray[np.int64],
    late_known: bool,  # noqa: FBT001
    late_ratio: NDArray[np.float64],
    late_target_ratio: float,
    late_request_number: int,
    late_slack_seconds: NDArray[np.float64],
) -> tuple[int, int, float]:
    """What forbids the next lower clock; where nothing does, what has the least slack.

    Compiled as it stands.

    Args:
        index: Of the chosen clock.
        slack_seconds: Of every limit, (M, C).
        slos: Kind of each, (M,).
        request_numbers: Whose, (M,).
        late_known: Whether answers that each clock makes late are known.
        late_ratio: Their share beyond that at the fastest clock, (C,).
        late_target_ratio: The share to keep to.
        late_request_number: Whose answer is the foremost among them.
        late_slack_seconds: What is left to its limit, (C,).

    Returns:
        Kind of the limit, 0 for none; whose; seconds left to it at the chosen clock.
    """
    lower = max(index - 1, 0)
    kind, number, left, broken = 0, 0, np.inf, False
    for row in range(len(slos)):
        if row == 0 or slack_seconds[row, index] < left:
            kind, number, left = slos[row], request_numbers[row], slack_seconds[row, index]
        broken = broken or slack_seconds[row, lower] < 0.0
    if late_known and not broken and (kind == 0 or late_ratio[lower] > late_target_ratio):
        return _TPOT, late_request_number, late_slack_seconds[index]
    return kind, number, left
