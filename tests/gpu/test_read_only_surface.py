"""What every GPU must answer that is read and not set: on a real one where there is one, and on the
fakes everywhere. Nothing here sets anything, on either."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from throttle.actuation.backend import PowerScope
from throttle.actuation.fake_nvml.library import STATE_VARIABLE, environment
from throttle.actuation.fake_nvml.machine import FakeGpu, FakeMachine
from throttle.actuation.fake_nvml.profiles import PROFILES

ROOT = Path(__file__).parents[2]
#: Exits with 0 where the driver is real and shows a GPU.
PROBE = "import pynvml; pynvml.nvmlInit(); raise SystemExit(pynvml.nvmlDeviceGetCount() < 1)"


def run_python(arguments, variables):
    environ = {name: value for name, value in os.environ.items() if name != STATE_VARIABLE}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def libraries():
    """The fakes, and the real driver where there is one; it is asked when tests are collected."""
    yield "fake"
    if run_python(["-c", PROBE], {}).returncode == 0:
        yield "real"


@pytest.fixture(scope="module", params=list(libraries()))
def surveyed(request, tmp_path_factory, nvml_library):
    """The survey of one library's GPUs."""
    variables, machine = {}, None
    if request.param == "fake":
        path = tmp_path_factory.mktemp("machine") / "state"
        gpus = [FakeGpu(profile, f"GPU-{profile}") for profile in PROFILES]
        machine = FakeMachine.create(path, gpus)
        for profile, load in zip(PROFILES, itertools.cycle([0.0, 0.5, 1.0]), strict=False):
            machine.gpu(f"GPU-{profile}").set_load(load)
        variables = environment(nvml_library, path)
    done = run_python(["tests/gpu/survey.py"], variables)
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout)
    if machine is not None:
        assert machine.writes() == ()
        machine.close()


@pytest.fixture
def gpus(surveyed):
    assert surveyed["gpus"]
    return surveyed["gpus"]


def test_gpus_are_told_apart_by_uuid(gpus):
    assert all(uuid.startswith("GPU-") for uuid in gpus)


def test_names_are_words_that_a_bundle_can_be_named_by(gpus):
    for gpu in gpus.values():
        assert gpu["name"] not in {"", "unknown"}
        assert set(gpu["name"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_clocks_rise_and_none_is_listed_twice(gpus):
    for gpu in gpus.values():
        clocks = gpu["clocks_mhz"]
        assert len(clocks) >= 2
        assert clocks[0] > 0
        assert all(lower < upper for lower, upper in itertools.pairwise(clocks))


def test_the_clock_in_force_lies_within_the_supported_ones(gpus):
    for gpu in gpus.values():
        for reading in gpu["readings"]:
            # an idle GPU may fall below the lowest clock that can be asked for
            assert 0 < reading["clock_mhz"] <= gpu["clocks_mhz"][-1]


def test_power_temperature_and_reasons_are_plausible(gpus):
    for gpu in gpus.values():
        for reading in gpu["readings"]:
            assert reading["power_scope"] in {scope.value for scope in PowerScope}
            assert (reading["power_watts"] > 0) == (reading["power_scope"] != "none")
            assert reading["power_watts"] < 3000
            assert reading["event_reasons"] >= 0
            celsius = reading["temperature_celsius"]
            assert celsius is None or 5 < celsius < 110


def test_energy_never_falls_and_agrees_with_the_power(gpus):
    for gpu in gpus.values():
        readings = gpu["readings"]
        energies = [reading["energy_joules"] for reading in readings]
        assert energies == sorted(energies)
        powers = [reading["power_watts"] for reading in readings]
        mean = (energies[-1] - energies[0]) / (readings[-1]["seconds"] - readings[0]["seconds"])
        # a counter moves every 20 to 100 ms, and an average power lags: within a factor of two
        assert 0.5 * min(powers) <= mean <= 2.0 * max(powers)


def test_an_unknown_gpu_is_not_found(surveyed):
    assert surveyed["unknown"] == "not found"


def test_observing_refuses_to_write(gpus):
    for gpu in gpus.values():
        assert (gpu["set_refused"], gpu["reset_refused"]) == ("denied", "denied")
