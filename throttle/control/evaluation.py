"""What a decision was chosen from, clock by clock, for people who ask why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.control.selection import Binding, Decision
from throttle.control.slack import Slo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from throttle.control.cruise import Equilibrium
    from throttle.control.forecast import Forecast


@dataclass(frozen=True, slots=True)
class ClockRow:
    """One clock of the what-if table; power is that of all GPUs of the engine.

    `late_ratio` is the share of answers whose mean gap would miss its limit because the clock is
    not the fastest; None while that is not known. The slack of TPOT is that of one answer and tells
    a reader only: feasible is what keeps the other slacks and the budget of late answers.
    """

    clock_mhz: int
    iteration_seconds: float
    iteration_upper_seconds: float
    power_watts: float
    long_run_power_watts: float | None
    late_ratio: float | None
    feasible: bool
    slacks: tuple[Binding, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A decision and the table it was taken from."""

    decision: Decision
    rows: tuple[ClockRow, ...]


def judge_clocks(
    forecast: Forecast,
    clocks_mhz: NDArray[np.int64],
    feasible: NDArray[np.bool_],
    equilibrium: Equilibrium | None,
    gpus_count: int,
) -> tuple[ClockRow, ...]:
    """The what-if table of one forecast, slowest clock first.

    Args:
        forecast: What each clock would bring.
        clocks_mhz: Candidate clocks, (C,).
        feasible: Which of them keep every limit, (C,).
        equilibrium: What each settles at; None while the load is not known.
        gpus_count: GPUs of the engine.
    """
    rows = []
    for index, clock_mhz in enumerate(clocks_mhz):
        late_ratio = None if forecast.lateness is None else forecast.lateness.excess_ratio[index]
        long_run = None
        if equilibrium is not None and np.isfinite(equilibrium.power_watts[index]):
            long_run = float(equilibrium.power_watts[index]) * gpus_count
        rows.append(
            ClockRow(
                clock_mhz=int(clock_mhz),
                iteration_seconds=float(forecast.latency_seconds[index]),
                iteration_upper_seconds=float(forecast.latency_upper_seconds[index]),
                power_watts=float(forecast.power_watts[index]),
                long_run_power_watts=long_run,
                late_ratio=None if late_ratio is None else float(late_ratio),
                feasible=bool(feasible[index]),
                slacks=tuple(_slacks(forecast, index)),
            )
        )
    return tuple(rows)


def _slacks(forecast: Forecast, index: int) -> Iterator[Binding]:
    """The least slack of each kind of limit at one clock."""
    slack, lateness = forecast.slack, forecast.lateness
    for slo in Slo:
        rows = np.flatnonzero(slack.slos == slo)
        if len(rows):
            row = rows[np.argmin(slack.slack_seconds[rows, index])]
            number = int(slack.request_numbers[row])
            yield Binding(slo, number, float(slack.slack_seconds[row, index]))
    if lateness is not None and lateness.request_number:
        left = float(lateness.request_slack_seconds[index])
        yield Binding(Slo.TPOT, lateness.request_number, left)
