"""What the doctor finds, on pretended GPUs in pretended surroundings."""

from __future__ import annotations

import pytest

from throttle.actuation.examination import CONTEXT_WATTS, Severity, examine
from throttle.actuation.fake_nvml.machine import WriteKind
from throttle.actuation.surroundings import Surroundings
from throttle.simulation.parameters import gpu_names, gpu_table


@pytest.fixture
def root(tmp_path):
    """Surroundings of a process that may set clocks."""
    base = tmp_path / "root"
    (base / "proc/self").mkdir(parents=True)
    (base / "proc/self/status").write_text("CapEff:\t000001ffffffffff\n")
    (base / "proc/self/uid_map").write_text("0 0 4294967295\n")
    return base


@pytest.fixture
def look(root, nvml_backend_of):
    """Examines, and gives the findings of a severity as text."""

    def look(*severities):
        findings = examine(Surroundings(root), nvml_backend_of, lambda: None)
        chosen = [f for f in findings if not severities or f.severity in severities]
        return "\n".join(f"{f.gpu_uuid} {f.check}: {f.text} -> {f.remedy}" for f in chosen)

    return look


BAD = (Severity.WARNING, Severity.BLOCKING)


def test_a_sound_machine_has_nothing_to_complain_of_and_is_not_written(machine_of, look):
    machine = machine_of("h100", "b200")
    for uuid in ("GPU-0", "GPU-1"):
        machine.gpu(uuid).set_load(0.5)
    assert look(*BAD) == ""
    text = look()
    assert "GPU-0 model: NVIDIA H100 80GB HBM3, as h100-sxm; 110 clocks from 345 to 1980" in text
    assert "GPU-1 model: NVIDIA B200, as b200; 247 clocks from 120 to 1965" in text
    assert "NVIDIA driver 580.105.08, nvidia-ml-py" in text
    assert machine.writes() == ()


def test_a_machine_without_a_driver_is_told_what_to_install(machine_of, look):
    machine_of("h100").unload_driver()
    assert "driver: NVML cannot be initialized: Driver Not Loaded; load" in look(Severity.BLOCKING)


def test_without_the_capability_nothing_can_be_set(machine_of, look, root):
    machine_of("h100")
    (root / "proc/self/status").write_text("CapEff:\t0000000000000000\n")
    text = look(Severity.BLOCKING)
    assert "no CAP_SYS_ADMIN" in text
    assert "--cap-add SYS_ADMIN" in text
    (root / "proc/self/status").write_text("CapEff:\t000001ffffffffff\n")
    (root / "proc/self/uid_map").write_text("0 100000 65536\n")
    assert "user namespace of its own" in look(Severity.BLOCKING)


@pytest.mark.parametrize(
    ("change", "severity", "expected"),
    [
        (lambda gpu: gpu.set_mig(enabled=True), Severity.BLOCKING, "MIG: GPU GPU-0 is in MIG mode"),
        (lambda gpu: gpu.set_persistence(enabled=False), Severity.WARNING, "-pm 1"),
        (lambda gpu: gpu.set_power_limit(500.0), Severity.WARNING, "500 W of 700 W"),
        (lambda gpu: gpu.set_application_clock(1200), Severity.WARNING, "set to 1200 MHz"),
        (lambda gpu: gpu.set_ceiling(900, 0x40), Severity.WARNING, "cooling and power supply"),
        (
            lambda gpu: gpu.lock_as_another_agent(345, 1200),
            Severity.WARNING,
            "runs at 1200 of 1980 MHz and the driver gives no reason",
        ),
    ],
)
def test_what_is_amiss_with_a_gpu_is_found(machine_of, look, change, severity, expected):
    gpu = machine_of("h100").gpu("GPU-0")
    gpu.set_load(0.5)
    assert expected not in look(severity)
    change(gpu)
    assert expected in look(severity)


def test_a_lower_clock_that_the_driver_explains_is_no_lock(machine_of, look):
    gpu = machine_of("h100").gpu("GPU-0")
    gpu.set_load(1.0)
    gpu.set_power_limit(300.0)
    assert "somebody locked" not in look()


def test_an_idle_gpu_cannot_show_a_lock(machine_of, look):
    machine_of("h100").gpu("GPU-0").lock_as_another_agent(345, 600)
    assert "a lock by someone else would not show" in look(Severity.NOTE)


def test_a_gpu_that_is_lost_does_not_keep_the_others_from_being_examined(machine_of, look):
    machine = machine_of("h100", "h100")
    machine.gpu("GPU-0").lose()
    text = look()
    assert "the GPU at index 0 cannot be used" in text
    assert "GPU-1 model" in text


def test_a_gpu_that_cannot_be_read_is_said_to_be_that(machine_of, look):
    machine_of("h100").inject("nvmlDeviceGetClockInfo", code=999)
    assert "clock, power or energy cannot be read" in look(Severity.BLOCKING)


def test_missing_meters_are_said(machine_of, look):
    machine = machine_of("h100")
    machine.inject("nvmlDeviceGetTotalEnergyConsumption", code=3)
    for function in ("FieldValue186", "FieldValue185", "nvmlDeviceGetPowerUsage"):
        machine.inject(function, code=3)
    text = look(Severity.WARNING)
    assert "no energy counter" in text
    assert "does not tell its power" in text


def test_a_driver_without_application_clocks_is_not_asked_for_them_in_vain(machine_of, look):
    machine_of("l40s").gpu("GPU-0").set_load(0.5)
    assert look(*BAD) == ""


def test_parking_is_estimated_from_the_measured_idle_power(machine_of, look):
    machine = machine_of("h100")
    assert "72 W without an engine; an idle one would add about 50 W (estimate" in look()
    machine.gpu("GPU-0").set_processes(4711)
    text = look(Severity.NOTE)
    assert "122 W (measured) at 1980 MHz; parked at 345 MHz it would save about 50 W" in text
    assert "437 kWh in a year" in text
    assert "CUDA_DISABLE_PERF_BOOST=1 in the engine's environment (process 4711)" in text


def test_an_engine_that_lets_its_clock_fall_already_is_not_told_to(machine_of, look, root):
    machine_of("h100").gpu("GPU-0").set_processes(4711)
    (root / "proc/4711").mkdir()
    (root / "proc/4711/environ").write_text("CUDA_DISABLE_PERF_BOOST=1\0")
    assert "CUDA_DISABLE_PERF_BOOST=1 is set already" in look(Severity.NOTE)


def test_a_driver_that_does_not_heed_the_variable_is_not_told_of_it(machine_of, look):
    machine_of("a100").gpu("GPU-0").set_processes(4711)
    text = look(Severity.NOTE)
    assert "it would save about 26 W" in text
    assert "CUDA_DISABLE" not in text


def test_a_gpu_that_is_parked_has_nothing_left_to_save(machine_of, look):
    gpu = machine_of("h100").gpu("GPU-0")
    gpu.set_processes(4711)
    gpu.lock_as_another_agent(345, 345)
    assert "idle at 345 MHz: nothing to save" in look(Severity.GOOD)


def test_another_owner_is_named(machine_of, look, root):
    machine_of("h100")
    (root / "proc/77").mkdir()
    (root / "proc/77/comm").write_text("zeusd\n")
    assert "process 77 (zeusd)" in look(Severity.WARNING)


def test_the_context_power_is_that_of_the_simulated_gpus():
    for name in set(CONTEXT_WATTS) & set(gpu_names()):
        assert CONTEXT_WATTS[name][0] == gpu_table(name)["idle"]["step_watts"]


def test_an_examination_never_tries_to_write(machine_of, look):
    machine = machine_of("a100", "l40s")
    look()
    assert not [write for write in machine.writes() if write.kind in set(WriteKind)]
