"""Files that hold secrets, the server's TLS, and keeping both out of logs."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - the settings' types are read at run time
from typing import TYPE_CHECKING, Any, Final, cast

import grpc

from throttle.errors import ThrottleError

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

#: What stands in a log in place of a secret.
REDACTED: Final = "[redacted]"

_SECRET_NAMES = re.compile(r"token|authorization|password|secret|private_key", re.IGNORECASE)
_SECRET_TEXTS = re.compile(
    r"(?i)(?<=bearer )[^\s'\",;)]+|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END|$)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """How TCP is encrypted. Files are read again when they change, for new connections.

    Attributes:
        certificate: The daemon's certificate chain, PEM; empty for no TLS.
        key: Its private key, PEM; others must not be able to read it.
        client_ca: Certificates, PEM, one of which must have signed the client's; empty asks clients
            for none.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None

    def problems(self) -> list[str]:
        """Values that do not fit together; one line each."""
        if (self.certificate is None) != (self.key is None):
            return ["tls.certificate and tls.key belong together; allowed: both or neither"]
        if self.client_ca is not None and self.certificate is None:
            return ["tls.client_ca is set without tls.certificate; allowed: with both others"]
        return []


def read_secret(path: Path, name: str) -> bytes:
    """The content of a file that is no one else's business.

    Args:
        path: The file.
        name: The setting, for messages.

    Raises:
        ThrottleError: It cannot be read, or others may read or write it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o007:
                raise ThrottleError(
                    f"{name} {path} has mode {mode:04o}; allowed: nothing for others, as after "
                    "chmod o-rwx"
                )
            return file.read()
    except OSError as error:
        raise ThrottleError(f"{name} {path} cannot be read: {error.strerror}") from None


def tls_credentials(settings: TlsSettings) -> grpc.ServerCredentials:
    """What a TCP port is opened with; certificates are read again for each new connection.

    Raises:
        ThrottleError: A file cannot be used.
    """
    current = _certificate_configuration(settings)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        try:
            return _certificate_configuration(settings)
        except ThrottleError:
            return None  # half written, perhaps: the last good one serves on

    # grpc's types leave out that None keeps the configuration; its documentation has it
    fetch = cast(
        "Callable[[], grpc.ServerCertificateConfiguration]", _unless_unchanged(settings, renewed)
    )
    return grpc.dynamic_ssl_server_credentials(current, fetch, settings.client_ca is not None)


def redact(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """A structlog processor: values that look like secrets, or are named so, are not written."""
    for name, value in event.items():
        event[name] = REDACTED if _SECRET_NAMES.search(name) else _redacted(value)
    return event


def _redacted(value: Any) -> Any:  # noqa: ANN401 - whatever is logged
    if isinstance(value, str):
        return _SECRET_TEXTS.sub(REDACTED, value)
    if isinstance(value, dict):
        return {
            key: REDACTED if _SECRET_NAMES.search(str(key)) else _redacted(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(each) for each in value]
    return value


def _certificate_configuration(settings: TlsSettings) -> grpc.ServerCertificateConfiguration:
    if settings.certificate is None or settings.key is None:
        raise ThrottleError("tls.certificate or tls.key is empty; check the configuration first")
    key = read_secret(settings.key, "tls.key")
    chain = _read(settings.certificate, "tls.certificate")
    roots = None if settings.client_ca is None else _read(settings.client_ca, "tls.client_ca")
    if b"PRIVATE KEY-----" not in key:
        raise ThrottleError(f"tls.key {settings.key} holds no private key in PEM")
    if b"BEGIN CERTIFICATE-----" not in chain:
        raise ThrottleError(f"tls.certificate {settings.certificate} holds no certificate in PEM")
    return grpc.ssl_server_certificate_configuration([(key, chain)], roots)


def _unless_unchanged(
    settings: TlsSettings, read: Callable[[], grpc.ServerCertificateConfiguration | None]
) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    """Asks `read` only when a file has changed: gRPC asks on every connection."""
    seen = _change_times(settings)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        now = _change_times(settings)
        if now == seen:
            return None
        fresh = read()
        if fresh is not None:
            seen = now
        return fresh

    return fetch


def _change_times(settings: TlsSettings) -> tuple[int, ...]:
    times = []
    for path in (settings.certificate, settings.key, settings.client_ca):
        try:
            times.append(path.stat().st_mtime_ns if path is not None else 0)
        except OSError:
            times.append(-1)
    return tuple(times)


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ThrottleError(f"{name} {path} cannot be read: {error.strerror}") from None
