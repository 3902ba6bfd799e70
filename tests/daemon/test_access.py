from __future__ import annotations

import hashlib

import pytest

from throttle.daemon.access import (
    AuthenticationError,
    CallerLookup,
    ForbiddenError,
    Identity,
    read_access_list,
)
from throttle.errors import ThrottleError

TOKEN = "a-token-that-must-not-be-seen"
SHA256 = hashlib.sha256(TOKEN.encode()).hexdigest()


class Call:
    """What gRPC knows of a call."""

    def __init__(self, peer="ipv4:127.0.0.1:5", token="", names=()):
        self._peer = peer
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        self._auth = {"x509_common_name": [name.encode() for name in names]} if names else {}

    def peer(self):
        return self._peer

    def invocation_metadata(self):
        return self._metadata

    def auth_context(self):
        return self._auth


@pytest.fixture
def access_file(tmp_path):
    def write(text, mode=0o600):
        path = tmp_path / "access.toml"
        path.write_text(text)
        path.chmod(mode)
        return path

    return write


@pytest.fixture
def lookup(access_file):
    def make(text):
        return CallerLookup(read_access_list(access_file(text)))

    return make


def test_without_an_access_list_whoever_gets_through_may_use_every_gpu():
    assert CallerLookup()(Call("unix:")) == Identity("local", None)
    assert CallerLookup()(Call(names=["engine-0"])) == Identity("engine-0", None)


def test_a_token_names_its_caller_and_the_callers_gpus(lookup):
    identify = lookup(f'[tenant]\ntoken_sha256 = "{SHA256}"\ngpus = ["GPU-a"]')
    assert identify(Call(token=TOKEN)) == Identity("tenant", frozenset({"GPU-a"}))
    assert identify(Call("unix:", TOKEN)).name == "tenant"


@pytest.mark.parametrize("call", [Call(), Call("unix:"), Call(token="other"), Call(names=["x"])])
def test_whom_the_list_does_not_name_is_refused(lookup, call):
    identify = lookup(f'[tenant]\ntoken_sha256 = "{SHA256}"\ngpus = ["GPU-a"]')
    with pytest.raises(AuthenticationError):
        identify(call)


def test_a_wrong_token_is_refused_even_where_none_was_needed(lookup):
    identify = lookup('[local]\ngpus = ["*"]\n[tenant]\ncertificate = "engine-0"\n')
    assert identify(Call("unix:")).gpus is None
    assert identify(Call(names=["engine-0"])).gpus == frozenset()
    with pytest.raises(AuthenticationError):
        identify(Call("unix:", "wrong"))
    with pytest.raises(AuthenticationError):
        identify(Call(token="wrong", names=["engine-0"]))


def test_local_is_the_socket_alone(lookup):
    with pytest.raises(AuthenticationError):
        lookup('[local]\ngpus = ["*"]')(Call("ipv4:127.0.0.1:5"))


def test_where_token_and_certificate_are_listed_both_are_needed(lookup):
    identify = lookup(f'[tenant]\ntoken_sha256 = "{SHA256}"\ncertificate = "engine-0"')
    assert identify(Call(token=TOKEN, names=["engine-0"])).name == "tenant"
    for call in (Call(token=TOKEN), Call(names=["engine-0"]), Call(token=TOKEN, names=["x"])):
        with pytest.raises(AuthenticationError):
            identify(call)


def test_an_identity_speaks_for_its_own_gpus_only():
    identity = Identity("tenant", frozenset({"GPU-a"}))
    identity.require(["GPU-a"])
    with pytest.raises(ForbiddenError, match="tenant may not speak for GPU GPU-b; allowed: GPU-a"):
        identity.require(["GPU-a", "GPU-b"])
    assert not identity.may_use(["GPU-b"])


@pytest.mark.parametrize(
    "text",
    [
        f'[tenant]\ntoken_sha256 = "{TOKEN}"',
        f'[tenant]\ntoken = "{TOKEN}"',
        f'token = "{TOKEN}"',
        f'[tenant]\ntoken_sha256 = "{TOKEN}',
        f'[tenant]\ncertificate = ["{TOKEN}"]',
        f'[tenant]\ngpus = ["{TOKEN}"]',
        f'["name with {TOKEN[:0]} spaces"]\ncertificate = "x"',
        f'[a]\ntoken_sha256 = "{SHA256}"\n[b]\ntoken_sha256 = "{SHA256}"',
        '[a]\ncertificate = "x"\n[b]\ncertificate = "x"',
    ],
)
def test_an_unusable_list_is_refused_without_repeating_what_it_holds(access_file, text):
    with pytest.raises(ThrottleError) as raised:
        read_access_list(access_file(text))
    assert TOKEN not in str(raised.value)
    assert SHA256 not in str(raised.value)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o666])
def test_a_list_that_others_may_read_or_write_is_refused(access_file, mode):
    with pytest.raises(ThrottleError, match=f"has mode {mode:04o}; allowed: nothing for others"):
        read_access_list(access_file("", mode))


def test_a_missing_list_is_refused(tmp_path):
    with pytest.raises(ThrottleError, match="No such file"):
        read_access_list(tmp_path / "access.toml")
