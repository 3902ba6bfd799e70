from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import structlog

from throttle.daemon.config import DaemonConfig
from throttle.daemon.credentials import TlsSettings, read_secret, tls_credentials
from throttle.daemon.logs import configure_logs
from throttle.errors import ThrottleError

SECRET = "s3cr3t-value"
KEY = f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----"


@pytest.fixture(params=["json", "console"])
def written(request):
    """What is logged in each format."""
    stream = io.StringIO()
    before = structlog.get_config()
    configure_logs("debug", request.param, stream)
    yield stream.getvalue
    structlog.configure(**before)


@pytest.mark.parametrize(
    "fields",
    [
        {"token": SECRET},
        {"authorization": f"Bearer {SECRET}"},
        {"error": f"metadata was authorization: bearer {SECRET}, which is wrong"},
        {"metadata": [("authorization", f"Bearer {SECRET}")]},
        {"metadata": {"x": {"api_token": SECRET}}},
        {"text": KEY},
    ],
)
def test_a_secret_is_not_logged_whatever_carries_it(written, fields):
    structlog.get_logger().info("event", engine_id="kept", **fields)
    assert "kept" in written()
    assert SECRET not in written()
    assert "[redacted]" in written()


def test_a_secret_in_an_error_is_not_logged(written):
    error = ValueError(f"bad header Bearer {SECRET}")
    structlog.get_logger().error("internal_error", exc_info=error)
    assert "bad header" in written()
    assert SECRET not in written()


def test_what_is_no_secret_is_logged_as_it_is():
    stream = io.StringIO()
    before = structlog.get_config()
    configure_logs("info", "json", stream)
    structlog.get_logger().info("event", gpu_uuids=("GPU-a",), seconds=1.5)
    structlog.configure(**before)
    line = json.loads(stream.getvalue())
    assert (line["gpu_uuids"], line["seconds"]) == (["GPU-a"], 1.5)


def test_a_key_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "key.pem"
    path.write_text(KEY)
    path.chmod(0o644)
    with pytest.raises(ThrottleError, match="has mode 0644; allowed: nothing for others"):
        read_secret(path, "tls.key")
    path.chmod(0o440)
    assert read_secret(path, "tls.key") == KEY.encode()


def test_files_that_hold_something_else_are_refused_without_repeating_it(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.write_text(SECRET)
    key.write_text(SECRET)
    key.chmod(0o600)
    with pytest.raises(ThrottleError, match="holds no private key") as raised:
        tls_credentials(TlsSettings(certificate, key))
    assert SECRET not in str(raised.value)


CERTIFICATES = TlsSettings(Path("certificate"), Path("key"))


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, True),
        ({"tls": CERTIFICATES}, True),  # anybody could call
        ({"access": Path("access")}, True),  # tokens would travel in the clear
        ({"tls": CERTIFICATES, "access": Path("access")}, False),
        ({"tls": TlsSettings(Path("certificate"), Path("key"), Path("ca"))}, False),
        ({"tcp_allow_remote": True}, False),
    ],
)
def test_tcp_for_other_machines_must_be_encrypted_and_ask_who_calls(changes, refused):
    config = DaemonConfig(tcp_address="0.0.0.0:7077", simulated_gpus=Path("gpus"), **changes)
    problems = [problem for problem in config.problems() if "tcp_address" in problem]
    assert bool(problems) == refused
    loopback = DaemonConfig(tcp_address="127.0.0.1:7077", simulated_gpus=Path("gpus"), **changes)
    assert not loopback.problems()


def test_half_a_tls_configuration_is_refused():
    for tls in (TlsSettings(certificate=Path("c")), TlsSettings(client_ca=Path("ca"))):
        assert DaemonConfig(simulated_gpus=Path("gpus"), tls=tls).problems()


@pytest.mark.parametrize("mode", ["0666", "0661", "777", "rw", ""])
def test_a_socket_for_everybody_is_refused(mode):
    (problem,) = DaemonConfig(simulated_gpus=Path("gpus"), socket_mode=mode).problems()
    assert problem.startswith(f"socket_mode is {mode!r}; allowed: octal")
