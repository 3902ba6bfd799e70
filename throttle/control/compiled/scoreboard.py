"""The one part of `throttle.control.scoreboard` that touches every request, compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from throttle.control.compiled.compiler import compiled
from throttle.control.scoreboard import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Columns as plain numbers: compiled code takes them for constants.
_PROMPT = int(Column.PROMPT)
_TARGET = int(Column.TARGET)
_COMPUTED = int(Column.COMPUTED)
_GENERATED = int(Column.GENERATED)
_FIRST_TOKEN = int(Column.FIRST_TOKEN)
_FIRST_GENERATED = int(Column.FIRST_GENERATED)
_FIRST_FASTEST = int(Column.FIRST_FASTEST)


@compiled
def advance(
    rows: NDArray[np.float64],
    running: NDArray[np.int64],
    computed: NDArray[np.int64],
    generated: NDArray[np.int64],
    now_seconds: float,
    fastest_seconds: float,
) -> None:
    """As `throttle.control.scoreboard.advance`."""
    for position in range(len(running)):
        row = rows[running[position]]
        count = generated[position]
        row[_COMPUTED] = computed[position]
        row[_GENERATED] = count
        if row[_PROMPT] + count > row[_TARGET]:
            row[_TARGET] = row[_PROMPT]
        if count >= 1 and np.isnan(row[_FIRST_TOKEN]) and not np.isnan(now_seconds):
            row[_FIRST_TOKEN] = now_seconds
            row[_FIRST_FASTEST] = fastest_seconds
            row[_FIRST_GENERATED] = count
