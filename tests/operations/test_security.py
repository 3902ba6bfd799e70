"""One test per threat of docs/security.md, against a real daemon."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.engines import (
    DEADLINE_SECONDS,
    EngineStream,
    idle,
    park,
    registration,
    state,
)
from tests.operations.conftest import TOKENS, logged, wait_until
from throttle.v1 import engine_pb2, throttle_service_pb2, throttle_service_pb2_grpc

CODE = grpc.StatusCode


class Caller(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Sends one token with every call."""

    def __init__(self, token):
        self._token = token

    def intercept_unary_unary(self, continuation, details, request):
        return continuation(self._details(details), request)

    def intercept_stream_stream(self, continuation, details, requests):
        return continuation(self._details(details), requests)

    def _details(self, details):
        return details._replace(metadata=[("authorization", f"Bearer {self._token}")])


@pytest.fixture
def stub_of():
    """Stubs of callers by name, or with any token."""

    def make(daemon, name):
        channel = grpc.intercept_channel(daemon.channel, Caller(TOKENS.get(name, name)))
        return throttle_service_pb2_grpc.ThrottleServiceStub(channel)

    return make


def call_every_method(stub):
    """The status code of each of the service's methods."""

    def code(call):
        with pytest.raises(grpc.RpcError) as raised:
            call()
        return raised.value.code()

    service = throttle_service_pb2
    return {
        code(lambda: stub.GetStatus(service.GetStatusRequest(), timeout=DEADLINE_SECONDS)),
        code(lambda: stub.Evaluate(service.EvaluateRequest(), timeout=DEADLINE_SECONDS)),
        code(
            lambda: stub.ReleaseControl(service.ReleaseControlRequest(), timeout=DEADLINE_SECONDS)
        ),
        code(lambda: EngineStream(stub, registration()).accepted()),
    }


def tcp_port(daemon):
    return logged(daemon, "serving")[0]["tcp_port"]


def secure_channel(daemon, certificates, client=None):
    credentials = grpc.ssl_channel_credentials(
        certificates.ca.read_bytes(),
        client.key.read_bytes() if client else None,
        client.certificate.read_bytes() if client else None,
    )
    return grpc.secure_channel(f"localhost:{tcp_port(daemon)}", credentials)


def tls_flags(certificates):
    return (
        "--tcp-address", "127.0.0.1:0",
        "--tls-certificate", certificates.server.certificate,
        "--tls-key", certificates.server.key,
    )  # fmt: skip


def status_code(channel):
    """The code of GetStatus; OK if it is answered."""
    try:
        throttle_service_pb2_grpc.ThrottleServiceStub(channel).GetStatus(
            throttle_service_pb2.GetStatusRequest(), timeout=10.0
        )
    except grpc.RpcError as error:
        return error.code()
    return CODE.OK


@pytest.fixture
def group():
    """A group of this process, another than its own where it may choose."""
    before = os.getgroups()
    if os.geteuid() != 0:
        yield (before or [os.getgid()])[0]
        return
    os.setgroups([*before, 1])
    yield 1
    os.setgroups(before)


def test_the_socket_has_the_configured_mode_and_group(start_daemon, group):
    daemon = start_daemon("--socket-mode", "0600", "--socket-group", group)
    status = Path(daemon.target.removeprefix("unix:")).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_gid == group


def test_a_call_without_a_known_token_is_refused(start_daemon, access_file, stub_of):
    daemon = start_daemon("--access", access_file)
    assert call_every_method(daemon.stub) == {CODE.UNAUTHENTICATED}
    assert call_every_method(stub_of(daemon, "guessed")) == {CODE.UNAUTHENTICATED}
    reflection = reflection_pb2_grpc.ServerReflectionStub(daemon.channel)
    with pytest.raises(grpc.RpcError) as raised:
        next(
            reflection.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]),
                timeout=DEADLINE_SECONDS,
            )
        )
    assert raised.value.code() is CODE.UNAUTHENTICATED
    answer = health_pb2_grpc.HealthStub(daemon.channel).Check(
        health_pb2.HealthCheckRequest(), timeout=DEADLINE_SECONDS
    )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_caller_claims_its_own_gpus_only(start_daemon, access_file, stub_of, gpus):
    daemon = start_daemon("--access", access_file)
    for uuids in (["GPU-b"], ["GPU-a", "GPU-b"]):
        refused = EngineStream(stub_of(daemon, "one"), registration("e", uuids)).error()
        assert refused.code() is CODE.PERMISSION_DENIED
        assert "one may not speak for GPU GPU-b; allowed: GPU-a" in refused.details()
        with pytest.raises(grpc.RpcError) as raised:
            stub_of(daemon, "one").Evaluate(
                throttle_service_pb2.EvaluateRequest(
                    registration=registration("e", uuids), state=state(1)
                ),
                timeout=DEADLINE_SECONDS,
            )
        assert raised.value.code() is CODE.PERMISSION_DENIED
    stream = EngineStream(stub_of(daemon, "one"), registration("e", ["GPU-a"]))
    stream.accepted()
    park(stream)
    assert gpus.file.read_lock_mhz("GPU-a") > 0
    assert gpus.file.read_lock_mhz("GPU-b") == 0


def test_a_caller_sees_and_releases_its_own_engines_only(start_daemon, access_file, stub_of, gpus):
    daemon = start_daemon("--access", access_file)
    streams = {}
    for name, uuid in (("one", "GPU-a"), ("two", "GPU-b")):
        streams[name] = EngineStream(stub_of(daemon, name), registration(f"of-{name}", [uuid]))
        streams[name].accepted()
        park(streams[name])

    def status(name):
        return stub_of(daemon, name).GetStatus(
            throttle_service_pb2.GetStatusRequest(), timeout=DEADLINE_SECONDS
        )

    def release(name, engine_id):
        return stub_of(daemon, name).ReleaseControl(
            throttle_service_pb2.ReleaseControlRequest(engine_id=engine_id),
            timeout=DEADLINE_SECONDS,
        )

    assert [engine.engine_id for engine in status("one").engines] == ["of-one"]
    assert [gpu.gpu_uuid for gpu in status("one").gpus] == ["GPU-a"]
    assert len(status("operator").engines) == 2
    with pytest.raises(grpc.RpcError) as raised:
        release("one", "of-two")
    assert raised.value.code() is CODE.NOT_FOUND
    assert "of-two'" in raised.value.details()
    assert "there: of-one" in raised.value.details()
    assert release("one", "").released_gpu_uuids == ["GPU-a"]
    assert gpus.file.read_lock_mhz("GPU-b") > 0
    assert release("operator", "").released_gpu_uuids == ["GPU-b"]


def test_tls_keeps_plain_and_unverified_connections_out(start_daemon, certificates):
    daemon = start_daemon(*tls_flags(certificates), "--tls-client-ca", certificates.ca)
    with grpc.insecure_channel(f"localhost:{tcp_port(daemon)}") as channel:
        assert status_code(channel) is CODE.UNAVAILABLE
    with secure_channel(daemon, certificates) as channel:
        assert status_code(channel) is CODE.UNAVAILABLE
    with secure_channel(daemon, certificates, certificates.forged) as channel:
        assert status_code(channel) is CODE.UNAVAILABLE
    with secure_channel(daemon, certificates, certificates.client) as channel:
        assert status_code(channel) is CODE.OK


def test_a_certificate_that_the_list_does_not_name_is_refused(
    start_daemon, certificates, access_file
):
    with access_file.open("a") as file:
        file.write('\n[engine]\ncertificate = "engine-0"\ngpus = ["GPU-c"]\n')
    daemon = start_daemon(
        *tls_flags(certificates), "--tls-client-ca", certificates.ca, "--access", access_file
    )
    with secure_channel(daemon, certificates, certificates.unlisted) as channel:
        assert status_code(channel) is CODE.UNAUTHENTICATED
    with secure_channel(daemon, certificates, certificates.client) as channel:
        stub = throttle_service_pb2_grpc.ThrottleServiceStub(channel)
        answer = stub.GetStatus(throttle_service_pb2.GetStatusRequest(), timeout=DEADLINE_SECONDS)
        assert [gpu.gpu_uuid for gpu in answer.gpus] == ["GPU-c"]


def test_a_renewed_certificate_serves_without_a_restart(start_daemon, certificates, tmp_path):
    files = {}
    for name, source in (("certificate", certificates.server.certificate),
                         ("key", certificates.server.key)):  # fmt: skip
        files[name] = tmp_path / name
        files[name].write_bytes(source.read_bytes())
        files[name].chmod(0o600)
    daemon = start_daemon(
        "--tcp-address", "127.0.0.1:0",
        "--tls-certificate", files["certificate"], "--tls-key", files["key"],
    )  # fmt: skip
    with secure_channel(daemon, certificates) as channel:
        assert status_code(channel) is CODE.OK
    files["key"].write_text("half written")
    with secure_channel(daemon, certificates) as channel:
        assert status_code(channel) is CODE.OK
    renamed = certificates.issue("renewed.example")
    files["certificate"].write_bytes(renamed.certificate.read_bytes())
    files["key"].write_bytes(renamed.key.read_bytes())
    with secure_channel(daemon, certificates) as channel:
        assert status_code(channel) is CODE.UNAVAILABLE  # no longer a certificate for localhost
    options = [("grpc.ssl_target_name_override", "renewed.example")]
    credentials = grpc.ssl_channel_credentials(certificates.ca.read_bytes())
    target = f"localhost:{tcp_port(daemon)}"
    with grpc.secure_channel(target, credentials, options=options) as channel:
        assert status_code(channel) is CODE.OK


def test_a_message_beyond_the_limit_ends_its_own_call_only(start_daemon):
    daemon = start_daemon("--limits-message-bytes", "20000")
    other = daemon.stream(registration("other", ["GPU-b"]))
    other.accepted()
    stream = daemon.stream(registration())
    stream.accepted()
    park(stream)
    stream.send(
        engine_pb2.IterationState(
            sequence_number=3,
            phase=engine_pb2.ITERATION_PHASE_HEARTBEAT,
            engine_time_seconds=200.0,
            progress=engine_pb2.RequestProgress(request_numbers=range(2**40, 2**40 + 5000)),
        )
    )
    assert stream.error().code() in {CODE.RESOURCE_EXHAUSTED, CODE.CANCELLED}
    wait_until(lambda: len(daemon.status().engines) == 1)
    assert other.decide(state(1)).sequence_number == 1


def test_a_caller_that_calls_too_often_is_refused_and_others_are_served(
    start_daemon, access_file, stub_of
):
    daemon = start_daemon("--access", access_file, "--limits-calls-per-second", "1")
    request = throttle_service_pb2.GetStatusRequest()
    flooding, other = stub_of(daemon, "one"), stub_of(daemon, "two")
    calls = (flooding.GetStatus(request, timeout=DEADLINE_SECONDS) for _ in range(200))
    with pytest.raises(grpc.RpcError) as raised:
        list(calls)
    assert raised.value.code() is CODE.RESOURCE_EXHAUSTED
    assert other.GetStatus(request, timeout=DEADLINE_SECONDS).version


def test_an_engine_that_floods_is_disconnected_and_its_gpus_are_given_back(start_daemon, gpus):
    daemon = start_daemon("--limits-states-per-second", "5")
    stream = daemon.stream(registration())
    stream.accepted()
    park(stream)
    assert gpus.file.read_lock_mhz("GPU-a") > 0
    for number in range(3, 200):
        stream.send(idle(number, 100.0 + number))
    with pytest.raises(grpc.RpcError) as raised:
        list(stream.call)
    assert raised.value.code() is CODE.RESOURCE_EXHAUSTED
    wait_until(lambda: gpus.file.read_lock_mhz("GPU-a") == 0)


def test_streams_that_never_register_cannot_keep_engines_out(start_daemon):
    daemon = start_daemon("--limits-registration-seconds", "0.5", "--engines-limit", "1")
    silent = [daemon.stream(None) for _ in range(9)]  # every call that may run at once
    for stream in silent:
        assert stream.error().code() in {CODE.CANCELLED, CODE.RESOURCE_EXHAUSTED}
    stream = daemon.stream(registration())
    stream.accepted()
    stream.close()


def test_refusals_are_counted_and_do_not_fill_the_log(start_daemon, access_file):
    daemon = start_daemon("--access", access_file)
    for _ in range(100):
        assert status_code(daemon.channel) is CODE.UNAUTHENTICATED
    assert 1 <= len(logged(daemon, "call_refused")) < 50


def test_no_token_reaches_the_log(start_daemon, access_file, stub_of):
    daemon = start_daemon("--access", access_file, "--log-level", "debug")
    stub_of(daemon, "operator").GetStatus(throttle_service_pb2.GetStatusRequest())
    call_every_method(stub_of(daemon, "a-guessed-token"))
    daemon.terminate()
    text = daemon.log_text()
    assert "call_refused" in text
    assert "a-guessed-token" not in text
    assert not any(token in text for token in TOKENS.values())


def test_an_engine_id_cannot_forge_a_log_line_or_leave_the_recordings(start_daemon, tmp_path):
    daemon = start_daemon("--recordings", tmp_path / "records")
    refused = daemon.stream(registration('x\n{"event": "forged"}')).error()
    assert refused.code() is CODE.INVALID_ARGUMENT
    name = '../../x", "event": "forged'
    stream = daemon.stream(registration(name))
    stream.accepted()
    stream.decide(idle(1, 0.0))
    stream.close()
    wait_until(lambda: logged(daemon, "recording_closed"))
    assert not logged(daemon, "forged")
    assert logged(daemon, "engine_registered")[0]["engine_id"] == name
    (path,) = (tmp_path / "records").rglob("*")
    assert path.parent == tmp_path / "records"


def test_the_commands_speak_tls_with_a_token_of_throttle_token(
    start_daemon, certificates, tmp_path
):
    def throttle(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "throttle.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )

    access, token = tmp_path / "access.toml", tmp_path / "token"
    access.write_text(throttle("token", "engine-0", "--gpu", "GPU-a", "--out", token).stdout)
    access.chmod(0o600)
    assert token.read_text() not in access.read_text()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    daemon = start_daemon(*tls_flags(certificates), "--access", access)
    ask = ("status", "--target", f"localhost:{tcp_port(daemon)}", "--ca", certificates.ca)
    assert throttle(*ask).stderr.startswith("throttle: UNAUTHENTICATED")
    answer = throttle(*ask, "--token-file", token)
    assert "gpu GPU-a" in answer.stdout
    assert "GPU-b" not in answer.stdout
