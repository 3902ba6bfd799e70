"""The pretended NVIDIA driver, for every folder of tests that needs one."""

from __future__ import annotations

import pytest

from throttle.actuation.fake_nvml.library import STATE_VARIABLE, build_library, load_here
from throttle.actuation.fake_nvml.machine import FakeGpu, FakeMachine


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory):
    """The fake library, built once with whatever compiler there is."""
    return build_library(tmp_path_factory.mktemp("fake-nvml"))


@pytest.fixture
def machine_of(tmp_path, nvml_library, monkeypatch):
    """Makes a machine from profiles, GPU-0 on, which this process and its children see."""
    load_here(nvml_library)
    made = []

    def make(*profiles, virtual_time=True):
        path = tmp_path / f"machine-{len(made)}"
        gpus = [FakeGpu(profile, f"GPU-{index}") for index, profile in enumerate(profiles)]
        machine = FakeMachine.create(path, gpus, virtual_time=virtual_time)
        made.append(machine)
        monkeypatch.setenv(STATE_VARIABLE, str(path))
        return machine

    yield make
    for machine in made:
        machine.clear_faults()
        machine.close()


@pytest.fixture
def nvml_backend_of():
    """Makes backends over the machine made last, and closes them."""
    from throttle.actuation.nvml import NvmlBackend  # noqa: PLC0415 - where it is asked for

    made = []

    def make(*arguments):
        backend = NvmlBackend(*arguments)
        made.append(backend)
        return backend

    yield make
    for backend in made:
        backend.close()
