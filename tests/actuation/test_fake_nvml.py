"""The fake library against the unmodified binding."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pynvml
import pytest

from throttle.actuation.fake_nvml.layout import STRUCTURES
from throttle.actuation.fake_nvml.library import (
    STATE_VARIABLE,
    build_library,
    environment,
    find_compiler,
    load_here,
)
from throttle.actuation.fake_nvml.machine import (
    FakeGpu,
    FakeMachine,
    Permission,
    WriteKind,
)
from throttle.actuation.fake_nvml.profiles import PROFILES
from throttle.errors import InvalidInputError, NotFoundError, ThrottleError

LOST, NO_PERMISSION, UNKNOWN, NO_DRIVER = 15, 4, 999, 9


@pytest.fixture
def opened(machine_of):
    """A machine with one H100, the binding initialized, and its handle."""
    machine = machine_of("h100")
    pynvml.nvmlInit()
    yield machine, pynvml.nvmlDeviceGetHandleByUUID("GPU-0")
    pynvml.nvmlShutdown()


def sm_clock(handle):
    return pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)


def test_the_binding_is_the_unmodified_one():
    assert Path(pynvml.__file__).parent.name == "site-packages"


def test_the_structures_are_laid_out_as_their_mirrors_and_the_bindings(nvml_library):
    library = load_here(nvml_library)
    for name, mirror in STRUCTURES.items():
        assert library.fakeNvmlStructureBytes(name.encode()) == ctypes.sizeof(mirror), name
    for name, theirs in (
        ("Temperature", pynvml.c_nvmlTemperature_v1_t),
        ("FieldValue", pynvml.c_nvmlFieldValue_t),
        ("ProcessInfo", pynvml.c_nvmlProcessInfo_v3_t),
        ("Utilization", pynvml.c_nvmlUtilization_t),
    ):
        assert library.fakeNvmlStructureBytes(name.encode()) == ctypes.sizeof(theirs), name


@pytest.mark.parametrize(
    ("profile", "memory_mhz", "expected"),
    [
        ("a100", 1215, (81, 210, 1410, {15})),
        ("h100", 2619, (110, 345, 1980, {15})),
        ("h200", 3201, (110, 345, 1980, {15})),
        ("b200", 3996, (247, 120, 1965, {7, 8})),
        ("l40s", 9001, (155, 210, 2520, {15})),
        ("l40s", 405, (14, 210, 405, {15})),
    ],
)
def test_profiles_have_the_clocks_of_the_captures(machine_of, profile, memory_mhz, expected):
    machine_of(profile)
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        assert pynvml.nvmlDeviceGetName(handle) == PROFILES[profile].name
        clocks = pynvml.nvmlDeviceGetSupportedGraphicsClocks(handle, memory_mhz)
    finally:
        pynvml.nvmlShutdown()
    steps = {upper - lower for upper, lower in itertools.pairwise(clocks)}
    assert (len(clocks), clocks[-1], clocks[0], steps) == expected


def test_a_lock_holds_the_clock_and_snaps_down(opened):
    machine, handle = opened
    machine.gpu("GPU-0").set_load(0.5)
    assert sm_clock(handle) == 1980
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 345, 1000)
    assert sm_clock(handle) == 990
    pynvml.nvmlDeviceResetGpuLockedClocks(handle)
    assert sm_clock(handle) == 1980
    assert [write.kind for write in machine.writes()] == [WriteKind.LOCK, WriteKind.RESET]


def test_symbolic_limits_cannot_be_mixed_with_numbers_and_both_unlimited_is_a_reset(opened):
    machine, handle = opened
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 345, 990)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceSetGpuLockedClocks(handle, 345, 0xFFFFFF02)
    assert machine.gpu("GPU-0").lock_mhz == (345, 990)
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 0xFFFFFF02, 0xFFFFFF02)
    assert machine.gpu("GPU-0").lock_mhz is None


def test_a_clock_takes_its_time_to_settle(opened):
    machine, handle = opened
    gpu = machine.gpu("GPU-0")
    gpu.set_load(1.0)
    gpu.set_settle_seconds(0.2)
    machine.advance(1.0)
    sm_clock(handle)
    machine.advance(1.0)
    assert sm_clock(handle) == 1980
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 345, 990)
    machine.advance(0.19)
    assert sm_clock(handle) == 1980
    machine.advance(0.02)
    assert sm_clock(handle) == 990


def test_a_power_cap_lowers_the_clock_and_says_so(opened):
    machine, handle = opened
    gpu = machine.gpu("GPU-0")
    gpu.set_load(1.0)
    gpu.set_power_limit(400.0)
    assert sm_clock(handle) < 1800
    assert pynvml.nvmlDeviceGetPowerUsage(handle) <= 400_000
    assert pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle) == 0x4
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 345, 900)
    assert sm_clock(handle) == 900
    assert pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle) == 0


def test_the_energy_counter_agrees_with_the_power(opened):
    machine, handle = opened
    machine.gpu("GPU-0").set_load(0.7)
    before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3
    machine.advance(100.0)
    joules = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3
    assert joules == pytest.approx(100.0 * watts, rel=1e-4)
    (field,) = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_POWER_INSTANT])
    assert field.value.uiVal == pytest.approx(watts * 1e3, abs=1)


def test_an_idle_gpu_with_a_context_stays_at_its_highest_clock_and_draws_more(opened):
    machine, handle = opened
    assert sm_clock(handle) == 345
    bare = pynvml.nvmlDeviceGetPowerUsage(handle)
    machine.gpu("GPU-0").set_processes(4711)
    assert sm_clock(handle) == 1980
    assert pynvml.nvmlDeviceGetPowerUsage(handle) - bare == 49_900
    assert [info.pid for info in pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)] == [4711]


def test_faults_come_as_often_as_asked_on_the_gpu_asked(machine_of):
    machine = machine_of("h100", "h100")
    pynvml.nvmlInit()
    try:
        first, second = (pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(2))
        machine.inject("nvmlDeviceGetPowerUsage", code=UNKNOWN, times=1, gpu_uuid="GPU-1")
        pynvml.nvmlDeviceGetPowerUsage(first)
        with pytest.raises(pynvml.NVMLError_Unknown):
            pynvml.nvmlDeviceGetPowerUsage(second)
        pynvml.nvmlDeviceGetPowerUsage(second)
        missing = machine.inject("nvmlDeviceGetTotalEnergyConsumption", code=13)
        for _ in range(2):
            with pytest.raises(pynvml.NVMLError_FunctionNotFound):
                pynvml.nvmlDeviceGetTotalEnergyConsumption(first)
        missing.remove()
        pynvml.nvmlDeviceGetTotalEnergyConsumption(first)
    finally:
        pynvml.nvmlShutdown()


def test_a_call_that_hangs_holds_up_neither_other_threads_nor_other_calls(opened):
    machine, handle = opened
    hang = machine.inject("nvmlDeviceSetGpuLockedClocks", hang=True)
    thread = threading.Thread(target=pynvml.nvmlDeviceSetGpuLockedClocks, args=(handle, 345, 990))
    thread.start()
    while machine.calls_count("nvmlDeviceSetGpuLockedClocks") == 0:
        assert thread.is_alive()
    assert sm_clock(handle) == 345
    assert thread.is_alive()
    hang.remove()
    thread.join(10)
    assert machine.gpu("GPU-0").lock_mhz == (345, 990)


def test_a_lost_gpu_answers_nothing_and_comes_back_without_its_lock(opened):
    machine, handle = opened
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 345, 990)
    machine.gpu("GPU-0").lose()
    with pytest.raises(pynvml.NVMLError_GpuIsLost):
        sm_clock(handle)
    machine.gpu("GPU-0").find()
    assert machine.gpu("GPU-0").lock_mhz is None
    sm_clock(handle)


def test_a_driver_reload_takes_locks_counters_and_handles(opened):
    machine, handle = opened
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 345, 990)
    machine.advance(10.0)
    assert pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) > 0
    machine.reload_driver()
    with pytest.raises(pynvml.NVMLError_Unknown):
        sm_clock(handle)
    pynvml.nvmlShutdown()
    pynvml.nvmlInit()
    assert machine.gpu("GPU-0").lock_mhz is None
    assert pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) == 0


def test_without_a_driver_or_a_machine_init_says_so(machine_of, monkeypatch, tmp_path):
    machine_of("h100").unload_driver()
    with pytest.raises(pynvml.NVMLError_DriverNotLoaded):
        pynvml.nvmlInit()
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(pynvml.NVMLError_DriverNotLoaded):
        pynvml.nvmlInit()


def test_another_agents_lock_shows_in_the_clock_alone(opened):
    machine, handle = opened
    gpu = machine.gpu("GPU-0")
    gpu.set_load(1.0)
    gpu.lock_as_another_agent(345, 510)
    assert sm_clock(handle) == 510
    assert pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle) == 0
    assert machine.writes() == ()


@pytest.mark.parametrize("permission", [Permission.NOBODY, Permission.PRIVILEGED])
def test_writes_need_the_permission(opened, permission):
    machine, handle = opened
    machine.allow_writes(permission)
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("CapEff:"))
    capable = int(line.split()[1], 16) >> 21 & 1
    if permission is Permission.PRIVILEGED and capable:
        pynvml.nvmlDeviceSetGpuLockedClocks(handle, 345, 990)
        return
    with pytest.raises(pynvml.NVMLError_NoPermission):
        pynvml.nvmlDeviceSetGpuLockedClocks(handle, 345, 990)
    assert machine.gpu("GPU-0").lock_mhz is None
    assert [write.code for write in machine.writes()] == [NO_PERMISSION]


LOCK_AND_WAIT = """
import pynvml, sys
pynvml.nvmlInit()
pynvml.nvmlDeviceSetGpuLockedClocks(pynvml.nvmlDeviceGetHandleByUUID("GPU-0"), 345, 510)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_lock_outlives_its_killed_process_and_another_resets_it(machine_of, nvml_library):
    machine = machine_of("a100", virtual_time=False)
    child = subprocess.Popen(
        [sys.executable, "-c", LOCK_AND_WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | environment(nvml_library, machine.path),
    )
    with child:
        assert child.stdout.readline() == b"locked\n"
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    assert machine.gpu("GPU-0").lock_mhz == (345, 510)
    assert machine.writes()[0].pid == child.pid
    pynvml.nvmlInit()
    pynvml.nvmlDeviceResetGpuLockedClocks(pynvml.nvmlDeviceGetHandleByUUID("GPU-0"))
    pynvml.nvmlShutdown()
    assert machine.gpu("GPU-0").lock_mhz is None


FORKED = """
import os, pynvml
pynvml.nvmlInit()
child = os.fork()
if child == 0:
    try:
        pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError_Uninitialized:
        os._exit(7)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_must_initialize_anew(machine_of, nvml_library):
    machine = machine_of("a100")
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        env=os.environ | environment(nvml_library, machine.path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "7\n"


def test_a_machine_is_checked(tmp_path):
    with pytest.raises(InvalidInputError, match=r"gpus\.profile is 'h999'; allowed: a100, h100"):
        FakeMachine.create(tmp_path / "m", [FakeGpu("h999", "GPU-0")])
    with pytest.raises(InvalidInputError, match="each once"):
        FakeMachine.create(tmp_path / "m", [FakeGpu("h100", "GPU-0")] * 2)
    with pytest.raises(NotFoundError):
        FakeMachine(tmp_path / "none")
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(InvalidInputError, match="1 bytes"):
        FakeMachine(tmp_path / "short")


def test_a_compiler_that_fails_or_is_not_there_is_an_error_never_a_skip(tmp_path, monkeypatch):
    with pytest.raises(ThrottleError, match="cannot build the fake NVML"):
        build_library(tmp_path, [sys.executable, "-c", "import sys; sys.exit('no compiler')"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() == (sys.executable, "-m", "ziglang", "cc")
    monkeypatch.setitem(sys.modules, "ziglang", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="pip install ziglang"):
        find_compiler()


def test_the_compiler_of_the_wheel_builds_the_same_library(tmp_path, machine_of):
    machine = machine_of("b200")
    library = build_library(tmp_path, (sys.executable, "-m", "ziglang", "cc"))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import pynvml; pynvml.nvmlInit(); print(pynvml.nvmlSystemGetDriverVersion())",
        ],
        env=os.environ | environment(library, machine.path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == PROFILES["b200"].driver_version


SET_OFTEN = """
import pynvml, sys
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByUUID("GPU-0")
for _ in range(500):
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, int(sys.argv[1]), int(sys.argv[1]))
"""


def test_processes_that_write_at_once_neither_lose_nor_mix_writes(machine_of, nvml_library):
    machine = machine_of("h100", virtual_time=False)
    environ = os.environ | environment(nvml_library, machine.path)
    clocks = (600, 900, 1200)
    children = [
        subprocess.Popen([sys.executable, "-c", SET_OFTEN, str(clock)], env=environ)
        for clock in clocks
    ]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    writes = machine.writes()
    assert len(writes) == machine.calls_count("nvmlDeviceSetGpuLockedClocks") == 1500
    assert {(write.minimum, write.maximum) for write in writes} == {(c, c) for c in clocks}
    assert machine.gpu("GPU-0").lock_mhz == (writes[-1].minimum, writes[-1].maximum)
