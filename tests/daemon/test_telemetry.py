from __future__ import annotations

import random

import pytest

from throttle.actuation.backend import GpuReading
from throttle.control.state import EventKind, IterationState, Phase, RequestEvent, RequestProgress
from throttle.daemon.telemetry import GpuMeter, GpuWindow, Telemetry, TelemetrySettings
from throttle.errors import ActuationError


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


def test_power_is_the_mean_over_the_least_time_and_no_energy_is_lost_on_the_way():
    readings = [GpuReading(900 + n, 0.0, 30.0 * n, 0.2 * n) for n in range(7)]
    left = iter(readings)
    measured = GpuMeter(lambda _: next(left), ["a"], None, least_seconds=0.5)
    windows = [measured.window() for _ in range(6)]
    assert [window.clock_mhz for window in windows] == [901, 902, 903, 904, 905, 906]
    assert [window.previous_clock_mhz for window in windows] == [900, 901, 902, 903, 904, 905]
    assert [window.energy_joules for window in windows] == [None, None, 90.0, None, None, 90.0]
    assert windows[2].power_watts == pytest.approx(150.0)


def test_a_state_that_came_earlier_knows_the_clocks_only():
    assert GpuWindow(900, 1200, 120.0, 60.0, 0.5).without_energy() == GpuWindow(900, 1200)


@pytest.mark.parametrize(
    ("interval", "stale", "problem"),
    [
        (0.1, 2.0, ""),
        (0.0, 2.0, "interval_seconds is 0.0; allowed: 0.01 to 10"),
        (1.0, 0.5, "stale_seconds is 0.5; allowed: more than interval_seconds"),
        (1.0, float("nan"), "stale_seconds is nan"),
    ],
)
def test_settings_are_checked(interval, stale, problem):
    found = TelemetrySettings(interval, stale).problems()
    assert problem in "".join(found)
    assert TelemetrySettings(power_window_seconds=-1.0).problems()
    assert bool(found) == bool(problem)


def test_a_simulated_gpu_is_read_when_asked_and_its_own_time_counts():
    readings = iter([GpuReading(1200, 0.0, 0.0, 5.0), *[GpuReading(900, 0.0, 60.0, 6.0)] * 3])
    telemetry = Telemetry(
        lambda _: next(readings), ["a"], lambda: 0.0, TelemetrySettings(), when_asked=True
    )
    meter = telemetry.open("e", ["a"])
    assert meter.window() == GpuWindow(900, 900)
    assert telemetry.book.engines() == {"e": 60.0}
    assert telemetry.read("a").time_seconds == 6.0
    meter.close()
    assert telemetry.book.engines() == {"e": 60.0}


def test_an_engine_whose_gpu_cannot_be_read_is_refused_and_leaves_no_trace():
    telemetry = Telemetry(
        lambda _: GpuReading(900, 0.0, 0.0), ["a"], lambda: 0.0, TelemetrySettings(),
        when_asked=False,
    )  # fmt: skip
    with pytest.raises(ActuationError, match="GPU a has no reading"):
        telemetry.open("e", ["a"])
    assert telemetry.book.engines() == {}


def test_over_an_hour_of_a_fake_h100_the_parts_are_what_the_driver_counted(
    machine_of, nvml_backend_of
):
    """Ten readings a second of a load that comes and goes, with iterations of any length."""
    machine = machine_of("h100")
    gpu = machine.gpu("GPU-0")
    gpu.set_processes(1)
    seconds = [0.0]

    def clock():
        return seconds[0]

    backend = nvml_backend_of(clock)
    told = []
    telemetry = Telemetry(
        backend.read,
        backend.uuids(),
        clock,
        TelemetrySettings(),
        when_asked=False,
        on_request=told.append,
    )
    telemetry._sampler.sample_once("GPU-0")
    counter = backend.ask("GPU-0", "nvmlDeviceGetTotalEnergyConsumption")
    meter = telemetry.open("e", ["GPU-0"])
    draw = random.Random(7)
    first, tokens, number = 1, 0, 0
    while seconds[0] < 3600.0:
        gpu.set_load(draw.choice([0.0, 0.0, 0.4, 0.8]))
        busy_until = seconds[0] + draw.uniform(1.0, 20.0)
        while seconds[0] < busy_until:
            seconds[0] += 0.1
            machine.advance(0.1)
            telemetry._sampler.sample_once("GPU-0")
            number, tokens = number + 1, tokens + draw.randrange(3)
            ends = draw.random() < 0.01
            progress = RequestProgress((first, first + 1), (100, 50), (tokens, tokens))
            events = tuple(
                RequestEvent(EventKind.FINISHED, each, generated_tokens=tokens)
                for each in (first, first + 1)
            )
            meter.note(
                [
                    IterationState(
                        number,
                        Phase.COMPLETED,
                        seconds[0],
                        draw.uniform(0.01, 0.2),
                        progress=progress,
                        request_events=events if ends else (),
                    )
                ]
            )
            first += 2 * ends
    energy = meter.energy()
    counted = (backend.ask("GPU-0", "nvmlDeviceGetTotalEnergyConsumption") - counter) / 1e3
    assert counted > 3600.0 * 100.0
    assert energy.total_joules == pytest.approx(counted, rel=1e-5)
    assert energy.pending_joules < 1e-3 * counted
    assert energy.requests_joules > 0.1 * counted
    assert energy.idle_joules > 0.1 * counted
    assert energy.requests_count == len(told) > 100
    given = sum(request.energy_joules for request in told)
    assert 0.9 * energy.requests_joules < given <= energy.requests_joules * (1 + 1e-9)
    assert telemetry.book.gpu("GPU-0").counted_joules == pytest.approx(counted, rel=1e-5)
