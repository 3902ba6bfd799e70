from __future__ import annotations

import pytest

from throttle.control.arrivals import _Dispersion


@pytest.mark.parametrize("leap_seconds", [1e6, 1e15, 1e300])
def test_a_leap_of_the_engines_clock_costs_no_time_and_forgets_what_was_counted(leap_seconds):
    dispersion = _Dispersion(memory_intervals=60.0)
    for second in range(100):
        dispersion.add(float(second), 7 * (second % 3))
    assert dispersion.ratio() > 1.0
    dispersion.add(leap_seconds, 3)
    assert dispersion.ratio() == 1.0


def test_a_clock_that_starts_far_from_zero_costs_no_time():
    dispersion = _Dispersion(memory_intervals=60.0)
    for _ in range(3):
        dispersion.add(1e300, 3)
    assert dispersion.ratio() >= 1.0
