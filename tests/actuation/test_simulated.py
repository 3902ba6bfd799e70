from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from throttle.actuation.backend import GpuReading
from throttle.actuation.simulated import SimulatedBackend, SimulatedGpu, SimulatedGpuFile
from throttle.errors import ActuationError, InvalidInputError, NotFoundError

CLOCKS = (345, 600, 1200, 1980)


@pytest.fixture
def file(tmp_path):
    gpus = [SimulatedGpu("GPU-a", "h200-sxm", CLOCKS), SimulatedGpu("GPU-b", "h100-sxm", (900,))]
    with SimulatedGpuFile.create(tmp_path / "gpus", gpus) as file:
        yield file


def test_a_new_file_holds_its_gpus_at_default_clocks(file):
    assert file.uuids() == ("GPU-a", "GPU-b")
    assert file.name("GPU-b") == "h100-sxm"
    assert file.supported_clocks_mhz("GPU-a") == CLOCKS
    assert file.read_lock_mhz("GPU-a") == 0
    assert file.read_telemetry("GPU-a") == GpuReading(1980, 0.0, 0.0, 0.0)


def test_a_lock_set_in_one_process_is_seen_in_another_and_outlives_it(file, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from throttle.actuation.simulated import SimulatedGpuFile\n"
        "SimulatedGpuFile.open(Path(sys.argv[1])).write_lock('GPU-a', 1200)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "gpus"], check=True)
    assert file.read_lock_mhz("GPU-a") == 1200
    assert file.read_lock_mhz("GPU-b") == 0
    assert file.read_write_count("GPU-a") == 1


def test_a_clock_that_is_not_supported_is_refused_and_changes_nothing(file):
    with pytest.raises(ActuationError, match="does not support 1000 MHz"):
        file.write_lock("GPU-a", 1000)
    assert file.read_lock_mhz("GPU-a") == 0
    assert file.read_write_count("GPU-a") == 0


def test_an_unknown_gpu_is_named_with_those_there_are(file):
    with pytest.raises(NotFoundError, match=r"'GPU-x'.*GPU-a, GPU-b"):
        file.read_lock_mhz("GPU-x")
    with pytest.raises(NotFoundError, match="'GPU-x'"):
        file.gpu("GPU-x")


def test_the_backend_locks_resets_and_reads(file):
    backend = SimulatedBackend(file)
    port = file.gpu("GPU-a")
    backend.set_maximum_clock("GPU-a", 600)
    assert port.lock_mhz() == 600
    port.publish(600.0, 250.5, 1000.25, 4.5)
    assert backend.read("GPU-a") == GpuReading(600, 250.5, 1000.25, 4.5)
    backend.reset_clock("GPU-a")
    assert port.lock_mhz() == 0
    with pytest.raises(ActuationError, match="0 MHz is not a clock"):
        backend.set_maximum_clock("GPU-a", 0)


def test_counters_go_on_when_another_process_takes_the_gpu_over(file):
    file.gpu("GPU-a").publish(345.0, 100.0, 50.0, 0.5)
    successor = file.gpu("GPU-a")
    assert file.gpu("GPU-b").counted_joules == 0.0
    for seconds in (1.0, 2.0):
        successor.publish(345.0, 100.0, 100.0 * seconds, seconds)
    assert file.read_telemetry("GPU-a") == GpuReading(345, 100.0, 250.0, 2.5)


def test_telemetry_is_never_a_mix_of_two_writes(file, tmp_path):
    stop = threading.Event()

    def write():
        port, value = file.gpu("GPU-a"), 0.0
        while not stop.is_set():
            value += 1.0
            port.publish(345.0, value, value, value)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with SimulatedGpuFile.open(tmp_path / "gpus") as reader:
            for _ in range(3000):
                reading = reader.read_telemetry("GPU-a")
                assert reading.power_watts == reading.energy_joules == reading.time_seconds
    finally:
        stop.set()
        writer.join()


def test_telemetry_that_was_left_half_written_is_an_error_until_it_is_written_anew(file):
    version_index = (64 + 144) // 8  # past the header, in the first record
    file._int64[version_index] = 7
    with pytest.raises(ActuationError, match="half written"):
        file.read_telemetry("GPU-a")
    file.gpu("GPU-a").publish(345.0, 1.0, 2.0, 3.0)
    assert file.read_telemetry("GPU-a").power_watts == 1.0


def test_creating_replaces_an_old_file(file, tmp_path):
    with SimulatedGpuFile.create(tmp_path / "gpus", [SimulatedGpu("GPU-c", "x", CLOCKS)]) as new:
        assert new.uuids() == ("GPU-c",)
    assert [path.name for path in tmp_path.iterdir()] == ["gpus"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SimulatedGpu("", "x", CLOCKS),
        lambda: SimulatedGpu("GPU-a" * 20, "x", CLOCKS),
        lambda: SimulatedGpu("GPU-\u00e9", "x", CLOCKS),
        lambda: SimulatedGpu("GPU-a", "x", ()),
        lambda: SimulatedGpu("GPU-a", "x", (600, 600)),
        lambda: SimulatedGpu("GPU-a", "x", (0, 600)),
        lambda: SimulatedGpu("GPU-a", "x", tuple(range(1, 514))),
    ],
)
def test_a_gpu_that_the_file_cannot_hold_is_refused(make):
    with pytest.raises(InvalidInputError, match="allowed"):
        make()


def test_no_gpu_or_one_twice_is_refused(tmp_path):
    gpu = SimulatedGpu("GPU-a", "x", CLOCKS)
    for gpus in ([], [gpu, gpu]):
        with pytest.raises(InvalidInputError, match="1 to 64 GPUs, each once"):
            SimulatedGpuFile.create(tmp_path / "gpus", gpus)


@pytest.mark.parametrize("content", [b"", b"x" * 200, b"SIMGPUS\0" + b"\2" * 100])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match="a file of simulated GPUs"):
        SimulatedGpuFile.open(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"nowhere.*No such file"):
        SimulatedGpuFile.open(tmp_path / "nowhere")
