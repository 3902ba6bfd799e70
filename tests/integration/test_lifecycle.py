from __future__ import annotations

import json
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.integration.engines import DEADLINE_SECONDS, idle, park, registration, state
from throttle.client import ReconnectBackoff, ThrottleClient
from throttle.v1 import decision_pb2, engine_pb2, throttle_service_pb2


@pytest.fixture
def parked(start_daemon, gpus):
    """A daemon with one engine whose GPU is parked."""
    daemon = start_daemon()
    stream = daemon.stream(registration())
    stream.accepted()
    park(stream)
    assert gpus.file.read_lock_mhz("GPU-a") > 0
    return daemon, stream


def run_throttle(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "throttle.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_daemon_restores_clocks_ends_streams_and_exits_0(parked, gpus, number):
    daemon, stream = parked
    started = time.monotonic()
    assert daemon.terminate(number) == 0
    assert time.monotonic() - started < 5.0
    assert gpus.file.read_lock_mhz("GPU-a") == 0
    assert stream.error().code() is grpc.StatusCode.UNAVAILABLE
    assert '"clocks_restored": true' in daemon.log_text()


def test_health_turns_before_the_daemon_goes(start_daemon):
    daemon = start_daemon("--drain-seconds", "0.5")
    watch = health_pb2_grpc.HealthStub(daemon.channel).Watch(
        health_pb2.HealthCheckRequest(service="throttle.v1.ThrottleService"),
        timeout=DEADLINE_SECONDS,
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    daemon.process.send_signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert daemon.process.wait(DEADLINE_SECONDS) == 0


def test_a_killed_daemons_clocks_are_restored_by_the_next_one(parked, gpus, start_daemon):
    daemon, _ = parked
    daemon.kill()
    assert gpus.file.read_lock_mhz("GPU-a") > 0  # as a real driver would keep it
    start_daemon()
    assert gpus.file.read_lock_mhz("GPU-a") == 0


def test_a_dead_daemons_socket_is_taken_over(parked, bundles, gpus, start_daemon):
    daemon, _ = parked
    daemon.kill()
    again = start_daemon("--socket", daemon.target.removeprefix("unix:"))
    assert again.status().version


CLIENT = """
import sys
from throttle.client import ThrottleClient
from throttle.v1 import engine_pb2
registration = engine_pb2.EngineRegistration.FromString(bytes.fromhex(sys.argv[1]))
client = ThrottleClient(registration, sys.argv[2])
assert client.wait_until_connected(30)
for number, seconds in ((1, 0.0), (2, 100.0)):
    client.submit(engine_pb2.IterationState(
        sequence_number=number, phase=3, engine_time_seconds=seconds))
    decision = client.wait_for_decision(number, 30)
print(decision.applied_clock_mhz, flush=True)
sys.stdin.read()
"""


def test_a_killed_engine_returns_its_gpus_to_default_clocks(start_daemon, gpus):
    daemon = start_daemon()
    engine = subprocess.Popen(
        [sys.executable, "-c", CLIENT, registration().SerializeToString().hex(), daemon.target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert int(engine.stdout.readline()) == gpus.file.read_lock_mhz("GPU-a") > 0
    engine.kill()
    engine.communicate()
    # the daemon learns of it by the end of the connection: ask until its GPU is free
    deadline = time.monotonic() + DEADLINE_SECONDS
    while daemon.status().engines:
        assert time.monotonic() < deadline
    assert gpus.file.read_lock_mhz("GPU-a") == 0


def test_the_client_finds_a_restarted_daemon_and_tells_it_of_live_requests(start_daemon):
    daemon = start_daemon()
    backoff = ReconnectBackoff(0.01, 0.1)
    with ThrottleClient(registration(), daemon.target, backoff=backoff) as client:
        client.submit(state(1))
        assert client.wait_for_decision(1, DEADLINE_SECONDS).applied
        daemon.kill()
        start_daemon("--socket", daemon.target.removeprefix("unix:"))
        assert wait_for_reconnect(client)
        client.submit(state(2))
        decision = client.wait_for_decision(2, DEADLINE_SECONDS)
        assert decision.applied
        assert decision.binding_limit.slo != decision_pb2.SLO_KIND_UNSPECIFIED


def wait_for_reconnect(client):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while client.statistics.reconnects_count == 0:
        if time.monotonic() > deadline:
            return False
        client.wait_until_connected(0.05)
    return True


def test_a_socket_in_use_is_refused_and_its_daemon_goes_on(start_daemon, gpus):
    daemon = start_daemon("--gpus", "GPU-a")
    path = daemon.target.removeprefix("unix:")
    second = run_throttle(
        "serve", "--socket", path, "--simulated-gpus", gpus.path, "--gpus", "GPU-b"
    )
    assert second.returncode == 1
    assert (
        f"throttle: socket '{path}' is in use by a running server; stop it or choose another "
        "with --socket"
    ) in second.stderr.splitlines()
    assert daemon.status().version


def test_a_second_daemon_on_the_same_gpus_is_refused_whatever_its_socket(parked, gpus, tmp_path):
    daemon, _ = parked
    (tmp_path / "same-gpus").symlink_to(gpus.path)
    for path in (gpus.path, tmp_path / "same-gpus"):
        second = run_throttle("serve", "--socket", tmp_path / "other", "--simulated-gpus", path)
        assert second.returncode == 1
        assert (
            f"throttle: GPU GPU-a is held by `throttle serve`, process {daemon.process.pid} at "
            f"{daemon.target.removeprefix('unix:')}; stop it, or name other GPUs with --gpus"
        ) in second.stderr.splitlines()
    assert gpus.file.read_lock_mhz("GPU-a") > 0  # the first goes on undisturbed
    assert daemon.status().version


def test_the_supervisor_has_one_thread(start_daemon, monkeypatch):
    """Another one, of a library, would be hit by the signals that the first waits for."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    supervisor = start_daemon("--gpus", "GPU-a").parts()["supervisor"]
    assert len(list(Path(f"/proc/{supervisor}/task").iterdir())) == 1


def test_a_file_that_is_no_socket_is_left_alone(gpus, tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    result = run_throttle("serve", "--socket", path, "--simulated-gpus", gpus.path)
    assert result.returncode == 1
    assert "is a file of another kind" in result.stderr
    assert path.read_text() == "precious"


def test_the_socket_is_for_owner_and_group(start_daemon):
    path = start_daemon().target.removeprefix("unix:")
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o660


def test_a_port_in_use_is_refused(start_daemon, gpus, tmp_path):
    daemon = start_daemon("--tcp-address", "127.0.0.1:0", "--gpus", "GPU-a")
    port = next(
        int(line.split('"tcp_port": ')[1].split(",")[0])
        for line in daemon.log_text().splitlines()
        if '"serving"' in line
    )
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        grpc.channel_ready_future(channel).result(DEADLINE_SECONDS)
    second = run_throttle(
        "serve", "--socket", tmp_path / "s", "--simulated-gpus", gpus.path,
        "--tcp-address", f"127.0.0.1:{port}", "--gpus", "GPU-b",
    )  # fmt: skip
    assert second.returncode == 1
    assert f"tcp_address 127.0.0.1:{port} cannot be had" in second.stderr


def test_a_damaged_bundle_is_told_and_other_engines_are_served(start_daemon, bundles, tmp_path):
    name = next(path.name for path in bundles.iterdir())
    shutil.copytree(bundles / name, tmp_path / name)
    daemon = start_daemon("--bundles", tmp_path, "--recordings", tmp_path / "records")
    with (tmp_path / name / "latency.ubj").open("ab") as model:
        model.write(b"x")
    (tmp_path / name / "manifest.json").touch()
    error = daemon.stream(registration()).error()
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "sha256 of latency.ubj" in error.details()
    recorded = daemon.stream(registration(mode=engine_pb2.CONTROL_MODE_RECORD))
    recorded.accepted()
    assert recorded.decide(idle(1, 0.0)).sequence_number == 1
    recorded.close()


def test_metrics_are_served_when_asked_for(start_daemon, unused_port):
    daemon = start_daemon("--metrics-address", f"127.0.0.1:{unused_port}")
    stream = daemon.stream(registration())
    stream.accepted()
    park(stream)
    url = f"http://127.0.0.1:{unused_port}/metrics"
    with urllib.request.urlopen(url, timeout=DEADLINE_SECONDS) as answer:
        text = answer.read().decode()
    assert 'throttle_decisions_total{outcome="applied",reason="parked"} 1.0' in text
    assert 'throttle_target_sm_clock_hertz{gpu="GPU-a"} 3.45e+08' in text
    assert 'throttle_energy_joules_total{gpu="GPU-b"}' in text
    assert "throttle_build_info" in text
    stream.close()


@pytest.fixture
def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_operators_commands_ask_the_daemon(parked):
    daemon, _ = parked
    status = run_throttle("status", "--target", daemon.target)
    assert status.returncode == 0
    assert "gpu GPU-a: target 345 MHz" in status.stdout
    assert "engine engine: act" in status.stdout
    document = run_throttle("status", "--json", "--target", daemon.target).stdout
    parsed = json_format.Parse(document, throttle_service_pb2.GetStatusResponse())
    assert parsed.engines[0].engine_id == "engine"
    assert json.loads(document)["engines"][0]["bundle"] == parsed.engines[0].bundle
    assert run_throttle("health", "--target", daemon.target).stdout == "SERVING\n"
    assert run_throttle("release", "--target", daemon.target).stdout == "GPU-a\n"
    unknown = run_throttle("release", "nobody", "--target", daemon.target)
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("throttle: NOT_FOUND: engine 'nobody' is not connected")


def test_asking_an_absent_daemon_is_one_line(tmp_path):
    for command in ("status", "health", "release"):
        result = run_throttle(command, "--target", f"unix:{tmp_path}/none.sock")
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert "no daemon answers at" in result.stderr


def test_check_config_reports_everything_at_once_or_prints_every_setting(tmp_path):
    bad = run_throttle("check-config", "--backend", "other", "--engines-limit", "0")
    assert bad.returncode == 1
    assert len(bad.stderr.splitlines()) == 3
    good = run_throttle(
        "check-config", "--simulated-gpus", tmp_path, "--control-dwell-seconds", "3"
    )
    assert good.returncode == 0
    assert "control.dwell_seconds = 3.0" in good.stdout


def test_serve_names_a_missing_gpu_file_and_a_gpu_that_is_not_there(gpus, tmp_path):
    missing = run_throttle(
        "serve", "--socket", tmp_path / "s", "--simulated-gpus", tmp_path / "none"
    )
    assert missing.returncode == 1
    assert "cannot be opened: No such file" in missing.stderr
    absent = run_throttle(
        "serve", "--socket", tmp_path / "s", "--simulated-gpus", gpus.path, "--gpus", "GPU-x"
    )
    assert absent.returncode == 1
    assert "'GPU-x' is not on this machine; there are: GPU-a" in absent.stderr


def test_version_and_usage():
    assert run_throttle("--version").stdout.startswith("throttle 0.")
    assert run_throttle("nonsense").returncode == 2
    assert "--control-dwell-seconds" in run_throttle("serve", "--help").stdout
