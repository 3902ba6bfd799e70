"""The NVML backend against the fake driver."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from throttle.actuation.backend import EventReason, PowerScope
from throttle.actuation.backends import make_backend
from throttle.actuation.fake_nvml.machine import Permission, WriteKind
from throttle.actuation.gpu_names import bundle_gpu_name
from throttle.actuation.nvml_clocks import import_binding
from throttle.actuation.simulated import SimulatedBackend, SimulatedGpu, SimulatedGpuFile
from throttle.errors import (
    ActuationError,
    DriverError,
    GpuDeniedError,
    GpuLostError,
    GpuPermissionError,
    InvalidInputError,
    NotFoundError,
    NotSupportedError,
)


@pytest.fixture
def h100(machine_of, nvml_backend_of):
    """A machine with one H100 under load, and a backend whose clock is the machine's."""
    machine = machine_of("h100")
    gpu = machine.gpu("GPU-0")
    gpu.set_load(0.5)
    seconds = [0.0]

    def advance(by):
        seconds[0] += by
        machine.advance(by)

    return machine, gpu, nvml_backend_of(lambda: seconds[0]), advance


def test_gpus_are_named_by_uuid_with_their_models_and_clocks_rising(machine_of, nvml_backend_of):
    machine_of("a100", "h100", "h200", "b200", "l40s")
    backend = nvml_backend_of()
    uuids = backend.uuids()
    assert uuids == tuple(f"GPU-{index}" for index in range(5))
    assert [backend.name(uuid) for uuid in uuids] == [
        "a100-sxm",
        "h100-sxm",
        "h200-sxm",
        "b200",
        "l40s",
    ]
    clocks = {uuid: backend.supported_clocks_mhz(uuid) for uuid in uuids}
    assert all(list(each) == sorted(each) for each in clocks.values())
    assert [len(each) for each in clocks.values()] == [81, 110, 110, 247, 155]
    assert clocks["GPU-3"][:4] == (120, 127, 135, 142)


@pytest.mark.parametrize(
    ("driver_name", "word"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L20", "l20"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("Tesla T4", "t4"),
        ("", "unknown"),
    ],
)
def test_names_become_the_words_of_bundles(driver_name, word):
    assert bundle_gpu_name(driver_name) == word


@pytest.mark.parametrize(
    ("asked", "locked"), [(900, 900), (1000, 990), (1979, 1965), (9999, 1980), (1, 345)]
)
def test_locks_reach_from_the_lowest_clock_to_the_target_snapped_down(h100, asked, locked):
    machine, gpu, backend, _ = h100
    backend.set_maximum_clock("GPU-0", asked)
    assert gpu.lock_mhz == (345, locked)
    assert backend.read("GPU-0").clock_mhz == locked
    backend.reset_clock("GPU-0")
    assert gpu.lock_mhz is None
    assert {write.kind for write in machine.writes()} == {WriteKind.LOCK, WriteKind.RESET}


def test_the_uneven_steps_of_a_b200_snap_down_to_a_listed_clock(machine_of, nvml_backend_of):
    machine = machine_of("b200")
    backend = nvml_backend_of()
    backend.set_maximum_clock("GPU-0", 134)
    assert machine.gpu("GPU-0").lock_mhz == (120, 127)


def test_a_lock_outlives_the_backend(h100):
    _, gpu, backend, _ = h100
    backend.set_maximum_clock("GPU-0", 900)
    backend.close()
    backend.close()
    assert gpu.lock_mhz == (345, 900)


def test_a_reading_tells_clock_power_energy_temperature_and_reasons(h100):
    _, gpu, backend, advance = h100
    gpu.set_temperature(61)
    before = backend.read("GPU-0")
    advance(50.0)
    reading = backend.read("GPU-0")
    assert (reading.clock_mhz, reading.temperature_celsius) == (1980, 61)
    assert reading.power_scope is PowerScope.GPU
    assert reading.energy_counted
    assert reading.time_seconds is None
    gained = reading.energy_joules - before.energy_joules
    assert gained == pytest.approx(50.0 * reading.power_watts, rel=1e-4)
    gpu.set_power_limit(250.0)
    capped = backend.read("GPU-0")
    assert capped.event_reasons == EventReason.POWER_CAP
    assert capped.clock_mhz < 1980
    gpu.set_load(0.0)
    assert EventReason.IDLE in backend.read("GPU-0").event_reasons


def test_the_energy_goes_on_over_a_wrap_and_over_a_driver_that_counts_anew(h100):
    _, gpu, backend, advance = h100
    wrap = 2.0**32
    gpu.set_energy(wrap / 1e3 - 100.0, wrap_millijoules=wrap)
    watts = backend.read("GPU-0").power_watts
    start = backend.read("GPU-0").energy_joules
    advance(10.0)  # some 2 kJ: past the wrap
    wrapped = backend.read("GPU-0").energy_joules
    assert wrapped - start == pytest.approx(10.0 * watts, rel=1e-3)
    gpu.set_energy(0.0)
    advance(1.0)
    anew = backend.read("GPU-0").energy_joules
    assert anew - wrapped == pytest.approx(watts, rel=1e-2)


def test_without_a_counter_the_energy_is_summed_from_power_and_says_so(machine_of, nvml_backend_of):
    machine = machine_of("h100")
    machine.gpu("GPU-0").set_load(0.5)
    machine.inject("nvmlDeviceGetTotalEnergyConsumption", code=3)
    seconds = iter([0.0, 10.0])
    backend = nvml_backend_of(lambda: next(seconds))
    first, second = (backend.read("GPU-0") for _ in range(2))
    assert not second.energy_counted
    gained = second.energy_joules - first.energy_joules
    assert gained == pytest.approx(10.0 * second.power_watts)


@pytest.mark.parametrize(
    ("missing", "scope", "extra_watts"),
    [
        ((), PowerScope.GPU, 0.0),
        (("FieldValue186",), PowerScope.GPU, 0.0),
        (("FieldValue186", "FieldValue185"), PowerScope.GPU, 0.0),
        (("nvmlDeviceGetFieldValues",), PowerScope.GPU, 0.0),
        (("FieldValue186", "FieldValue185", "nvmlDeviceGetPowerUsage"), PowerScope.NONE, None),
    ],
)
def test_power_comes_from_the_best_source_there_is(
    machine_of, nvml_backend_of, missing, scope, extra_watts
):
    machine = machine_of("h100")
    for function in missing:
        machine.inject(function, code=3)
    reading = nvml_backend_of().read("GPU-0")
    assert reading.power_scope is scope
    assert reading.power_watts == (0.0 if extra_watts is None else 71.7)


def test_power_of_the_whole_module_is_said_to_be_that(machine_of, nvml_backend_of):
    machine = machine_of("h100")
    machine.gpu("GPU-0").set_module_power(150.0)
    assert nvml_backend_of().read("GPU-0").power_scope is PowerScope.GPU
    machine.inject("FieldValue186", code=3)
    machine.inject("FieldValue185", code=3)
    reading = nvml_backend_of().read("GPU-0")
    assert reading.power_scope is PowerScope.MODULE
    assert reading.power_watts == pytest.approx(221.7)


def test_a_reading_that_a_gpu_lacks_is_left_out_and_not_asked_for_again(h100):
    machine, _, backend, _ = h100
    machine.inject("nvmlDeviceGetTemperatureV", code=13)
    machine.inject("nvmlDeviceGetCurrentClocksEventReasons", code=3)
    for _ in range(3):
        reading = backend.read("GPU-0")
        assert reading.temperature_celsius is None
        assert reading.event_reasons == EventReason.NONE
    assert machine.calls_count("nvmlDeviceGetTemperatureV") == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (3, NotSupportedError),
        (4, GpuPermissionError),
        (13, NotSupportedError),
        (15, GpuLostError),
        (16, GpuLostError),
        (26, NotSupportedError),
        (10, ActuationError),
        (999, ActuationError),
    ],
)
def test_errors_come_in_classes_that_say_whether_another_try_helps(h100, code, kind):
    machine, gpu, backend, _ = h100
    machine.inject("nvmlDeviceSetGpuLockedClocks", code=code, times=1)
    with pytest.raises(ActuationError, match="GPU GPU-0: locking clocks at 900 MHz") as caught:
        backend.set_maximum_clock("GPU-0", 900)
    assert type(caught.value) is kind
    backend.set_maximum_clock("GPU-0", 900)
    assert gpu.lock_mhz == (345, 900)


def test_without_permission_the_error_says_what_it_takes(h100):
    machine, gpu, backend, _ = h100
    machine.allow_writes(Permission.NOBODY)
    with pytest.raises(GpuDeniedError, match="CAP_SYS_ADMIN"):
        backend.set_maximum_clock("GPU-0", 900)
    with pytest.raises(GpuDeniedError, match="CAP_SYS_ADMIN"):
        backend.reset_clock("GPU-0")
    assert gpu.lock_mhz is None


def test_a_gpu_in_mig_mode_is_never_locked_but_may_be_reset(h100):
    machine, gpu, backend, _ = h100
    gpu.lock_as_another_agent(345, 600)
    gpu.set_mig(enabled=True)
    assert "MIG mode" in backend.refusal("GPU-0")
    with pytest.raises(NotSupportedError, match=r"-mig 0 ends it"):
        backend.set_maximum_clock("GPU-0", 900)
    assert machine.writes() == ()
    backend.reset_clock("GPU-0")
    assert gpu.lock_mhz is None


def test_a_gpu_without_mig_is_not_refused(machine_of, nvml_backend_of):
    machine_of("l40s")
    assert nvml_backend_of().refusal("GPU-0") == ""


def test_a_lost_gpu_is_left_out_and_the_others_serve(machine_of, nvml_backend_of):
    machine = machine_of("h100", "h100")
    machine.gpu("GPU-0").lose()
    backend = nvml_backend_of()
    assert backend.uuids() == ("GPU-1",)
    assert "lost" in backend.problems["index 0"]
    with pytest.raises(NotFoundError, match="'GPU-0' is not on this machine; there are: GPU-1"):
        backend.read("GPU-0")


def test_a_clock_that_is_none_is_refused(h100):
    machine, _, backend, _ = h100
    with pytest.raises(ActuationError, match="0 MHz is not a clock"):
        backend.set_maximum_clock("GPU-0", 0)
    assert machine.writes() == ()


def test_the_memory_clock_and_the_power_limit_are_left_alone(h100):
    machine, _, backend, _ = h100
    for clock in backend.supported_clocks_mhz("GPU-0"):
        backend.set_maximum_clock("GPU-0", clock)
        backend.read("GPU-0")
    backend.reset_clock("GPU-0")
    assert {write.kind for write in machine.writes()} == {WriteKind.LOCK, WriteKind.RESET}


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(9, "load the NVIDIA driver"), (999, "start it anew"), (18, "reboot"), (4, "nvidiactl")],
)
def test_an_init_that_fails_says_what_to_do(machine_of, nvml_backend_of, code, remedy):
    machine_of("h100").inject("nvmlInitWithFlags", code=code)
    with pytest.raises(DriverError, match=remedy):
        nvml_backend_of()


def test_a_package_that_shadows_the_binding_is_refused(monkeypatch):
    shadow = types.ModuleType("pynvml")
    shadow.__path__ = ["/somewhere/pynvml"]
    monkeypatch.setitem(sys.modules, "pynvml", shadow)
    with pytest.raises(DriverError, match="pip uninstall pynvml"):
        import_binding()


def test_a_binding_that_is_too_old_or_missing_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", types.ModuleType("pynvml"))
    with pytest.raises(DriverError, match=r"lacks nvmlInit.*12\.570\.86"):
        import_binding()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(DriverError, match="install nvidia-ml-py"):
        import_binding()


def test_observing_reads_and_refuses_every_write_in_words(machine_of):
    machine = machine_of("h100")
    backend = make_backend("observe")
    try:
        assert backend.uuids() == ("GPU-0",)
        assert backend.name("GPU-0") == "h100-sxm"
        assert backend.read("GPU-0").clock_mhz == 345
        assert len(backend.supported_clocks_mhz("GPU-0")) == 110
        assert "only reads" in backend.refusal("GPU-0")
        with pytest.raises(GpuDeniedError, match=r"900 MHz was not set.*set backend to 'nvml'"):
            backend.set_maximum_clock("GPU-0", 900)
        with pytest.raises(GpuDeniedError, match="clocks were not reset"):
            backend.reset_clock("GPU-0")
        with pytest.raises(NotFoundError):
            backend.set_maximum_clock("GPU-9", 900)
    finally:
        backend.close()
    assert machine.writes() == ()


def test_backends_are_made_by_name(tmp_path, machine_of):
    machine_of("h100")
    backend = make_backend("nvml")
    backend.set_maximum_clock("GPU-0", 900)
    backend.close()
    SimulatedGpuFile.create(tmp_path / "gpus", [SimulatedGpu("GPU-s", "h200-sxm", (600, 900))])
    simulated = make_backend("simulated", tmp_path / "gpus")
    assert isinstance(simulated, SimulatedBackend)
    assert simulated.refusal("GPU-s") == ""
    simulated.close()
    with pytest.raises(InvalidInputError, match="simulated_gpus is ''"):
        make_backend("simulated")
    with pytest.raises(InvalidInputError, match="backend is 'amd'; allowed: simulated, nvml"):
        make_backend("amd")


def test_the_backend_imports_nothing_heavy():
    code = (
        "import sys, throttle.actuation.nvml, throttle.actuation.observe, pynvml\n"
        "heavy = {'numpy', 'grpc', 'google', 'pandas', 'xgboost', 'structlog'}\n"
        "found = heavy & {name.split('.')[0] for name in sys.modules}\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
