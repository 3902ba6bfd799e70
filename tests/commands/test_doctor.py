from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from throttle.actuation.fake_nvml.library import environment
from throttle.cli import main


@pytest.fixture
def doctor(nvml_library):
    """Runs the command as a process of its own on a machine, or on one without a driver."""

    def run(*arguments, machine=None):
        variables = dict(environment(nvml_library, machine.path)) if machine else {}
        return subprocess.run(
            [sys.executable, "-m", "throttle.cli", "doctor", "--watch-seconds", "0", *arguments],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_cut_up_gpu_blocks_and_the_exit_status_says_so(doctor, machine_of):
    machine = machine_of("h100")
    machine.gpu("GPU-0").set_mig(enabled=True)
    done = doctor(machine=machine)
    assert done.returncode == 1, done.stderr
    assert "GPU-0\nok      model: NVIDIA H100 80GB HBM3" in done.stdout
    assert "BLOCKS  MIG: GPU GPU-0 is in MIG mode" in done.stdout
    assert done.stdout.endswith("something blocks: no clock can be set here yet\n")


def test_the_document_holds_every_finding(doctor, machine_of):
    machine = machine_of("h100", "b200")
    done = doctor("--json", machine=machine)
    document = json.loads(done.stdout)
    assert done.returncode == int(document["blocking"])
    assert {finding["gpu_uuid"] for finding in document["findings"]} == {"", "GPU-0", "GPU-1"}
    assert all(
        set(finding) == {"severity", "check", "gpu_uuid", "text", "remedy"}
        for finding in document["findings"]
    )
    assert machine.writes() == ()


def test_a_machine_without_a_driver_is_told_so(doctor, machine_of):
    machine = machine_of("h100")
    machine.unload_driver()
    done = doctor("--json", machine=machine)
    (driver,) = (f for f in json.loads(done.stdout)["findings"] if f["check"] == "driver")
    assert driver["severity"] == "blocking"
    assert "load the NVIDIA driver" in driver["text"]
    assert done.returncode == 1


def test_a_driver_that_hangs_is_a_finding_and_does_not_hang_the_command(doctor, machine_of):
    machine = machine_of("h100")
    machine.inject("nvmlDeviceGetClockInfo", hang=True)
    done = doctor("--timeout-seconds", "0.5", machine=machine)
    assert done.returncode == 1
    assert "BLOCKS  driver: it has not answered for 0.5 s: a call hangs" in done.stdout


def test_an_examination_that_fails_unforeseen_is_not_a_clean_bill(monkeypatch):
    def fail(*_):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("throttle.commands.doctor.examine", fail)
    with pytest.raises(RuntimeError, match="unforeseen"):
        main(["doctor"])
