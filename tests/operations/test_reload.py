"""A running daemon takes changes, or keeps what it has and says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import urllib.request

import grpc
import pytest

from tests.integration.engines import DEADLINE_SECONDS, registration, state
from tests.operations.conftest import TOKENS, logged, wait_until
from throttle.v1 import throttle_service_pb2


@pytest.fixture
def configured(start_daemon, tmp_path, unused_port, bundles):
    """A daemon with a file of its own and bundles that may be damaged, and one engine."""
    path, own = tmp_path / "throttle.toml", tmp_path / "bundles"
    path.write_text("[control]\ndwell_seconds = 1.0\n")
    shutil.copytree(bundles, own)
    daemon = start_daemon(
        "--config", path, "--bundles", own, "--metrics-address", f"127.0.0.1:{unused_port}"
    )
    stream = daemon.stream(registration())
    stream.accepted()
    stream.decide(state(1))
    return daemon, stream, path, own, f"http://127.0.0.1:{unused_port}"


def get(url):
    with urllib.request.urlopen(url, timeout=DEADLINE_SECONDS) as answer:
        return answer.read().decode()


def test_a_changed_policy_is_taken_and_engines_register_again(configured):
    daemon, stream, path, _, url = configured
    path.write_text("[control]\ndwell_seconds = 2.0\n")  # no signal: the change is seen
    assert stream.error().code() is grpc.StatusCode.UNAVAILABLE
    assert 'throttle_reloads_total{outcome="applied"} 1.0' in get(f"{url}/metrics")
    again = daemon.stream(registration())
    again.accepted()
    assert again.decide(state(1)).applied
    again.close()


def test_sighup_reloads_at_once(configured):
    daemon, stream, _, _, _ = configured
    daemon.process.send_signal(signal.SIGHUP)
    assert stream.error().code() is grpc.StatusCode.UNAVAILABLE
    assert logged(daemon, "reloaded")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[control]\ndwell_seconds = -1\n", "dwell_seconds"),
        ("[control\n", "is not TOML"),
        ("engines_limit = 3\n", "engines_limit changed, which needs a restart"),
    ],
)
def test_a_bad_file_keeps_the_old_and_is_counted_and_shown(configured, text, problem):
    daemon, stream, path, _, url = configured
    path.write_text(text)
    wait_until(lambda: logged(daemon, "reload_refused"))
    assert problem in json.loads(get(f"{url}/status.json"))["reload_problem"]
    metrics = get(f"{url}/metrics")
    assert 'throttle_reloads_total{outcome="refused"} 1.0' in metrics
    assert "throttle_reload_refused 1.0" in metrics
    assert stream.decide(state(2)).applied
    path.write_text("[control]\ndwell_seconds = 1.0\n")
    assert stream.error().code() is grpc.StatusCode.UNAVAILABLE
    assert json.loads(get(f"{url}/status.json"))["reload_problem"] == ""


def test_a_damaged_bundle_is_refused_and_its_engine_may_even_come_back(configured):
    daemon, stream, _, bundles, url = configured
    (folder,) = bundles.iterdir()
    with (folder / "latency.ubj").open("ab") as model:
        model.write(b"x")
    os.utime(folder / "manifest.json")
    wait_until(lambda: logged(daemon, "reload_refused"))
    assert "sha256 of latency.ubj" in json.loads(get(f"{url}/status.json"))["reload_problem"]
    assert stream.decide(state(2)).applied
    stream.close()
    again = daemon.stream(registration())
    assert again.accepted().bundle == folder.name
    assert again.decide(state(1)).applied
    again.close()


def test_a_caller_taken_off_the_access_list_is_disconnected(start_daemon, access_file):
    daemon = start_daemon("--access", access_file)
    headers = (("authorization", f"Bearer {TOKENS['one']}"),)
    call = daemon.stub.StreamIterations(
        iter([_first(registration())]), metadata=headers, timeout=DEADLINE_SECONDS
    )
    assert next(call).accepted.registration_id
    access_file.write_text("[two]\n" + access_file.read_text().partition("[two]\n")[2])
    wait_until(lambda: logged(daemon, "reloaded"))
    again = daemon.stub.StreamIterations(
        iter([_first(registration())]), metadata=headers, timeout=DEADLINE_SECONDS
    )
    with pytest.raises(grpc.RpcError) as raised:
        next(again)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


def _first(message):
    return throttle_service_pb2.StreamIterationsRequest(registration=message)
