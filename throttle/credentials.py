"""TLS and tokens from files, for clients of a daemon on TCP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from os import PathLike


def tls_credentials(
    ca_file: str | PathLike[str],
    certificate_file: str | PathLike[str] | None = None,
    key_file: str | PathLike[str] | None = None,
) -> grpc.ChannelCredentials:
    """Channel credentials for `ThrottleClient(credentials=...)`.

    Args:
        ca_file: PEM certificates that the daemon's is checked against.
        certificate_file: PEM certificate chain of this client, for a daemon that asks for one.
        key_file: PEM private key of that certificate.

    Raises:
        OSError: A file cannot be read.
        ValueError: Only one of certificate and key is given, or a file is empty.
    """
    if (certificate_file is None) != (key_file is None):
        raise ValueError(
            f"certificate_file is {certificate_file} and key_file is {key_file}; "
            "allowed: both of them or neither"
        )
    return grpc.ssl_channel_credentials(
        root_certificates=_read(ca_file),
        private_key=None if key_file is None else _read(key_file),
        certificate_chain=None if certificate_file is None else _read(certificate_file),
    )


def read_token(token_file: str | PathLike[str]) -> str:
    """The bearer token in a file, without the white space around it.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is empty or no printable ASCII.
    """
    token = _read(token_file).decode("ascii", "replace").strip()
    if not token or not token.isprintable() or not token.isascii():
        raise ValueError(f"token file {token_file} holds no printable ASCII token")
    return token


def _read(path: str | PathLike[str]) -> bytes:
    content = Path(path).read_bytes()
    if not content.strip():
        raise ValueError(f"{path} is empty; allowed: a file with content")
    return content
