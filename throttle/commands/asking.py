"""What the commands that ask a running daemon share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import grpc

from throttle.client import DEFAULT_TARGET
from throttle.errors import ThrottleError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which daemon is meant, and how long to wait for it."""
    parser.add_argument("--target", default=DEFAULT_TARGET, help="default: %(default)s")
    parser.add_argument(
        "--timeout-seconds", type=float, default=5.0, help="longest wait; default: %(default)s"
    )


@contextlib.contextmanager
def daemon_channel(arguments: argparse.Namespace) -> Iterator[grpc.Channel]:
    """A channel to the daemon.

    Raises:
        ThrottleError: A call made with it failed.
    """
    options = [("grpc.enable_http_proxy", 0)] if arguments.target.startswith("unix") else []
    with grpc.insecure_channel(arguments.target, options=options) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            if not isinstance(error, grpc.Call):
                raise
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise ThrottleError(
                    f"no daemon answers at {arguments.target}; start one with `throttle serve` or "
                    "name another with --target"
                ) from None
            raise ThrottleError(f"{error.code().name}: {error.details()}") from None
