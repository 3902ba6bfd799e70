"""`throttle profile-engine`: a daemon that explores, with an engine on its stream."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from predictors.dataset import read_records
from tests.integration.processes import daemon_parts
from throttle.actuation.simulated import SimulatedGpuFile
from throttle.cli import main
from throttle.commands.playing import Play, gpu_entries
from throttle.commands.profile_engine import record
from throttle.control.state import Mode, Slos
from throttle.daemon.config import DaemonConfig
from throttle.errors import InvalidInputError
from throttle.simulation.plant import Plant
from throttle.simulation.profiling import SweepingLoad, profiling_points

UUID = "GPU-simulated-0"
PLANT = Plant.load("h200-qwen3-30b-a3b")


@pytest.fixture
def gpus(tmp_path):
    with SimulatedGpuFile.create(tmp_path / "gpus", gpu_entries(PLANT, [UUID])) as file:
        yield file


def _config(tmp_path):
    return DaemonConfig(
        socket=tmp_path / "throttle.sock",
        simulated_gpus=tmp_path / "gpus",
        recordings=tmp_path / "out",
    )


def _recorded(tmp_path, gpus, mode):
    """Play half a simulated minute against the command's daemon, then end it."""
    stopped, restored = threading.Event(), []
    thread = threading.Thread(
        target=lambda: restored.append(record(_config(tmp_path), lambda: stopped.wait(120.0)))
    )
    thread.start()
    try:
        load = SweepingLoad(profiling_points(100_000, 2048), 1.0, random.Random(3), 30.0)
        play = Play(PLANT, UUID, 3, "real", mode, Slos())
        play.run(gpus, f"unix:{tmp_path / 'throttle.sock'}", load, lambda *_: None)
    finally:
        stopped.set()
        thread.join(60.0)
    assert restored == [True]
    assert gpus.read_lock_mhz(UUID) == 0
    return read_records([tmp_path / "out"]).frame


def test_an_engine_that_may_be_throttled_is_recorded_over_many_clocks(tmp_path, gpus):
    frame = _recorded(tmp_path, gpus, Mode.ACT)
    assert frame["clock_target_mhz"].nunique() > 20
    assert frame["clock_observed_mhz"].nunique() > 20


def test_an_engine_that_only_records_is_observed_at_its_own_clock(tmp_path, gpus):
    frame = _recorded(tmp_path, gpus, Mode.RECORD)
    assert (frame["clock_target_mhz"] == 0).all()
    assert frame["clock_observed_mhz"].max() == 1980  # below it only where the power limit binds
    assert frame["clock_observed_mhz"].median() == 1980


def test_a_configuration_that_records_nothing_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="recordings is None; allowed: a folder"):
        record(replace(_config(tmp_path), recordings=None), lambda: None)


def test_a_time_that_never_ends_is_refused(capsys):
    assert main(["profile-engine", "--minutes", "inf"]) == 1
    assert "--minutes is inf" in capsys.readouterr().err


@pytest.mark.usefixtures("gpus")
def test_it_ends_by_itself_and_on_sigterm(tmp_path):
    command = [sys.executable, "-m", "throttle.cli", "profile-engine"]
    command += ["--socket", str(tmp_path / "throttle.sock"), "--simulated-gpus"]
    command += [str(tmp_path / "gpus"), "--recordings", str(tmp_path / "out")]
    soon = subprocess.run([*command, "--minutes", "0.001"], timeout=60, check=False)
    assert soon.returncode == 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert any(b"serving" in line for line in process.stdout)  # ends with the process
        assert set(daemon_parts(process.pid)) == {"supervisor", "controller", "actuator"}
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
