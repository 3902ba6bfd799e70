"""What a decision in one compiled call comes to: a row of numbers."""

from __future__ import annotations

import enum


class Outcome(enum.IntEnum):
    """Places in the row, in the order in which `Controller` reads it."""

    DECIDED = 0  # 1 if it was; 0 where the steps have to be taken one by one
    INDEX = 1  # of the clock that was chosen, before the operator's ceiling
    REASON = 2
    BINDING = 3  # kind of the limit; 0 for none
    BINDING_REQUEST = 4
    BINDING_SECONDS = 5
    SECONDS = 6  # of the next iteration, at the clock to apply
    UPPER_SECONDS = 7
    WATTS = 8
    FASTEST_SECONDS = 9  # the same at the fastest clock
    FASTEST_WATTS = 10
    LOST = 11  # requests that no clock can save
    LATE_KNOWN = 12  # 1 if the share of late answers is
    LATE_RATIO = 13  # that share, beyond the one at the fastest clock
