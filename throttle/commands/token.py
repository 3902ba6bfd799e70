"""`throttle token`: make a token for one caller."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from throttle.errors import ThrottleError

if TYPE_CHECKING:
    import argparse

_TOKEN_BYTES = 32


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "token",
        help="make a token for one caller",
        description="Write a new token to a file that only its owner may read, and print the lines "
        "for the access list, which hold its hash.",
    )
    parser.add_argument("name", help="of the caller, such as an engine's id")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to")
    parser.add_argument(
        "--gpu", action="append", default=[], help="GPU UUID, or * for all; may be repeated"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the token, print its entry.

    Raises:
        ThrottleError: The file is there already, or cannot be written.
    """
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    try:
        descriptor = os.open(arguments.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
    except OSError as error:
        raise ThrottleError(f"{arguments.out} cannot be made: {error.strerror}") from None
    gpus = ", ".join(f'"{uuid}"' for uuid in arguments.gpu)
    print(f'["{arguments.name}"]')
    print(f'token_sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"')
    print(f"gpus = [{gpus}]")
    return 0
