from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from throttle.daemon.metrics import GpuCollector
from throttle.daemon.telemetry import Telemetry, TelemetrySettings


@pytest.fixture
def scrape(registry, metrics, actuator):
    """Registers a collector over some telemetry, and gives what Prometheus would be told."""

    def scrape(telemetry):
        registry.register(GpuCollector(actuator, telemetry))
        return generate_latest(registry).decode()

    return scrape


def test_gpus_tell_clock_power_and_energy_by_engine(scrape, telemetry, gpus):
    def publish(seconds, joules):
        gpus.write_telemetry(
            "GPU-a",
            sm_clock_mhz=900,
            power_watts=250.0,
            energy_joules=joules,
            gpu_time_seconds=seconds,
        )

    publish(1.0, 100.0)
    telemetry.read("GPU-a")
    publish(2.0, 350.0)
    telemetry.open("some-engine", ["GPU-a"])
    publish(3.0, 450.0)
    text = scrape(telemetry)
    assert 'throttle_observed_sm_clock_hertz{gpu="GPU-a"} 9e+08' in text
    assert 'throttle_power_watts{gpu="GPU-a"} 250.0' in text
    assert 'throttle_energy_joules_total{gpu="GPU-a"} 350.0' in text
    assert 'throttle_unattributed_energy_joules_total{gpu="GPU-a"} 250.0' in text
    assert 'throttle_engine_energy_joules_total{engine="some-engine"} 100.0' in text
    assert 'throttle_gpu_readable{gpu="GPU-a"} 1.0' in text


def test_a_gpu_that_cannot_be_read_keeps_its_target_and_says_so(scrape, actuator, clock):
    telemetry = Telemetry(
        actuator.read, actuator.uuids(), clock, TelemetrySettings(), when_asked=False
    )
    text = scrape(telemetry)
    assert 'throttle_gpu_readable{gpu="GPU-a"} 0.0' in text
    assert 'throttle_target_sm_clock_hertz{gpu="GPU-a"} 0.0' in text
    assert "throttle_observed_sm_clock_hertz{" not in text


def test_reasons_and_temperature_come_from_the_driver(
    scrape, machine_of, nvml_backend_of, actuator, clock
):
    machine = machine_of("h100")
    machine.gpu("GPU-0").set_temperature(61)
    backend = nvml_backend_of()
    telemetry = Telemetry(
        lambda _: backend.read("GPU-0"), actuator.uuids(), clock, TelemetrySettings(),
        when_asked=True,
    )  # fmt: skip
    text = scrape(telemetry)
    assert 'throttle_temperature_celsius{gpu="GPU-a"} 61.0' in text
    assert 'throttle_clock_event_reason{gpu="GPU-a",reason="idle"} 1.0' in text
