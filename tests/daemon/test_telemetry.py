from __future__ import annotations

from throttle.actuation.backend import GpuReading
from throttle.daemon.telemetry import GpuMeter, GpuWindow


def meter(readings, clock=lambda: 0.0, uuids=("a",)):
    left = iter(readings)
    return GpuMeter(lambda _: next(left), uuids, clock)


def test_power_is_energy_over_the_counters_own_time():
    measured = meter([GpuReading(1200, 0.0, 100.0, 1.0), GpuReading(900, 0.0, 160.0, 1.5)])
    assert measured.window() == GpuWindow(900, 1200, 120.0, 60.0, 0.5)


def test_the_given_clock_serves_a_counter_without_time():
    ticks = iter([10.0, 12.0])
    measured = meter([GpuReading(1200, 0.0, 0.0), GpuReading(1200, 0.0, 50.0)], lambda: next(ticks))
    assert measured.window() == GpuWindow(1200, 1200, 25.0, 50.0, 2.0)


def test_several_gpus_add_energy_and_the_slowest_clock_counts():
    measured = meter(
        [
            GpuReading(1200, 0.0, 0.0, 0.0),
            GpuReading(1185, 0.0, 10.0, 0.0),
            GpuReading(1200, 0.0, 100.0, 1.0),
            GpuReading(1170, 0.0, 310.0, 1.0),
        ],
        uuids=("a", "b"),
    )
    assert measured.window() == GpuWindow(1170, 1185, 200.0, 400.0, 1.0)


def test_windows_follow_one_another_so_that_energy_adds_up():
    readings = [GpuReading(1200, 0.0, float(joules), joules / 100) for joules in (0, 30, 70, 200)]
    measured = meter(readings)
    assert sum(measured.window().energy_joules for _ in range(3)) == 200.0


def test_a_window_without_length_or_a_counter_that_restarted_tells_no_power():
    measured = meter(
        [
            GpuReading(1200, 0.0, 100.0, 1.0),
            GpuReading(1200, 0.0, 100.0, 1.0),
            GpuReading(1200, 0.0, 5.0, 2.0),
        ]
    )
    assert measured.window() == GpuWindow(1200, 1200)
    assert measured.window() == GpuWindow(1200, 1200)


def test_a_state_that_came_earlier_knows_the_clocks_only():
    assert GpuWindow(900, 1200, 120.0, 60.0, 0.5).without_energy() == GpuWindow(900, 1200)
