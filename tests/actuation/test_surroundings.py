from __future__ import annotations

import pytest

from throttle.actuation.surroundings import ClockOwner, Surroundings


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("effective", "capable"),
    [("0000000000000000", False), ("0000000000200000", True), ("000001ffffffffff", True)],
)
def test_the_capability_is_read_from_the_effective_set(tmp_path, effective, capable):
    write(tmp_path, "proc/self/status", f"Name:\tx\nCapEff:\t{effective}\nCapBnd:\tffffffff\n")
    assert Surroundings(tmp_path).has_sys_admin() is capable


def test_what_cannot_be_read_is_not_there(tmp_path):
    surroundings = Surroundings(tmp_path)
    assert not surroundings.has_sys_admin()
    assert not surroundings.in_initial_user_namespace()
    assert surroundings.environment(1) is None
    assert surroundings.clock_owners() == ()


@pytest.mark.parametrize(
    ("mapping", "initial"),
    [("         0          0 4294967295\n", True), ("         0     100000      65536\n", False)],
)
def test_the_user_namespace_is_told_by_its_map(tmp_path, mapping, initial):
    write(tmp_path, "proc/self/uid_map", mapping)
    assert Surroundings(tmp_path).in_initial_user_namespace() is initial


def test_the_environment_of_a_process_is_split(tmp_path):
    write(tmp_path, "proc/7/environ", "A=1\0B=x=y\0\0")
    assert Surroundings(tmp_path).environment(7) == {"A": "1", "B": "x=y"}


def test_programs_that_set_clocks_are_found_running_and_remembered(tmp_path):
    write(tmp_path, "proc/10/comm", "nv-hostengine\n")
    write(tmp_path, "proc/10/cmdline", "/usr/bin/nv-hostengine\0")
    write(tmp_path, "proc/11/comm", "nvidia-smi\n")
    write(tmp_path, "proc/11/cmdline", "nvidia-smi\0-i\0000\0-lgc\000210,1410\0")
    write(tmp_path, "proc/12/comm", "nvidia-smi\n")
    write(tmp_path, "proc/12/cmdline", "nvidia-smi\0-q\0-lgcx\0")
    unit = "[Service]\nExecStart=/usr/bin/nvidia-smi --lock-gpu-clocks=1500\n"
    write(tmp_path, "etc/systemd/system/lock.service", unit)
    write(tmp_path, "lib/systemd/system/lock.service", unit)
    write(tmp_path, "etc/systemd/system/other.service", "ExecStart=/usr/bin/nvidia-smi -pm 1\n")
    write(tmp_path, "etc/rc.local", "nvidia-smi -pl 300\n")
    owners = Surroundings(tmp_path).clock_owners()
    assert owners[0].where == "process 10 (nv-hostengine)"
    assert owners[1:] == (
        ClockOwner("process 11", "runs `nvidia-smi -i 0 -lgc`"),
        ClockOwner("/etc/systemd/system/lock.service", "says `nvidia-smi --lock-gpu-clocks`"),
        ClockOwner("/etc/rc.local", "says `nvidia-smi -pl`"),
    )
