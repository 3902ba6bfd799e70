"""What the commands that ask a running daemon share."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from throttle.client import DEFAULT_TARGET
from throttle.errors import ThrottleError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which daemon is meant, and how long to wait for it."""
    parser.add_argument("--target", default=DEFAULT_TARGET, help="default: %(default)s")
    parser.add_argument(
        "--timeout-seconds", type=float, default=5.0, help="longest wait; default: %(default)s"
    )
    parser.add_argument(
        "--ca", type=Path, metavar="FILE", help="talk TLS; who may have signed the daemon's, PEM"
    )
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="of this client, PEM")
    parser.add_argument("--key", type=Path, metavar="FILE", help="its private key, PEM")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="token of this client")


@contextlib.contextmanager
def daemon_channel(arguments: argparse.Namespace) -> Iterator[grpc.Channel]:
    """A channel to the daemon.

    Raises:
        ThrottleError: A call made with it failed.
    """
    token = _read(arguments.token_file, "--token-file").decode().strip()
    with _channel(arguments) as plain:
        try:
            yield grpc.intercept_channel(plain, _WithToken(token)) if token else plain
        except grpc.RpcError as error:
            if not isinstance(error, grpc.Call):
                raise
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise ThrottleError(
                    f"no daemon answers at {arguments.target}; start one with `throttle serve` or "
                    "name another with --target"
                ) from None
            raise ThrottleError(f"{error.code().name}: {error.details()}") from None


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str], ...]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None


class _WithToken(grpc.UnaryUnaryClientInterceptor):
    """Sends a token with every call; on the Unix socket too, where gRPC's own would refuse."""

    def __init__(self, token: str) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),)

    def intercept_unary_unary(
        self,
        continuation: Callable[[Any, Any], Any],
        client_call_details: Any,  # noqa: ANN401 - grpc's own type lacks fields
        request: Any,  # noqa: ANN401 - of any method
    ) -> Any:  # noqa: ANN401 - as the continuation's
        details = _CallDetails(
            client_call_details.method,
            client_call_details.timeout,
            (*(client_call_details.metadata or ()), *self._metadata),
            client_call_details.credentials,
            client_call_details.wait_for_ready,
        )
        return continuation(details, request)


def _channel(arguments: argparse.Namespace) -> grpc.Channel:
    if arguments.ca is None:
        if arguments.certificate or arguments.key:
            raise ThrottleError("--certificate and --key need --ca, who signed the daemon's")
        unix = arguments.target.startswith("unix")
        options = [("grpc.enable_http_proxy", 0)] if unix else []
        return grpc.insecure_channel(arguments.target, options=options)
    credentials = grpc.ssl_channel_credentials(
        _read(arguments.ca, "--ca"),
        _read(arguments.key, "--key") or None,
        _read(arguments.certificate, "--certificate") or None,
    )
    return grpc.secure_channel(arguments.target, credentials)


def _read(path: Path | None, flag: str) -> bytes:
    """The content of a file; empty when none is named."""
    try:
        return b"" if path is None else path.read_bytes()
    except OSError as error:
        raise ThrottleError(f"{flag} {path} cannot be read: {error.strerror}") from None
