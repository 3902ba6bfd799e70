"""Claims a Unix socket's path for one daemon.

gRPC removes whatever socket it finds at its path, a living daemon's too; so this looks first.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import socket
import stat
from typing import TYPE_CHECKING

from throttle.errors import ConflictError, ThrottleError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold the path: no other daemon can take it meanwhile, and no dead socket lies there.

    Raises:
        ConflictError: A daemon listens there, or something that is no socket lies there.
        ThrottleError: The directory cannot be written.
    """
    lock_path = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ThrottleError(
            f"socket {str(path)!r} cannot be made: {error.strerror}; choose another with --socket"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _in_use(path) from None
        _remove_dead_socket(path)
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)  # the lock file stays: removing it would let two hold "the" lock


@contextlib.contextmanager
def private_umask(mode: int) -> Iterator[None]:
    """Sockets made meanwhile have this mode and no more, not even for a moment."""
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)


def set_group(path: Path, group: str) -> None:
    """Give a socket to a group.

    Args:
        path: The socket.
        group: Name or number.

    Raises:
        ThrottleError: There is no such group, or this process may not give files to it.
    """
    try:
        number = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        os.chown(path, -1, number)
    except (KeyError, OSError) as error:
        raise ThrottleError(
            f"socket_group is {group!r}: {error}; allowed: a group of the daemon's user"
        ) from None


def _remove_dead_socket(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConflictError(f"socket {str(path)!r} is a file of another kind; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
        else:
            raise _in_use(path)


def _in_use(path: Path) -> ConflictError:
    return ConflictError(
        f"socket {str(path)!r} is in use by a running server; stop it or choose another with "
        "--socket"
    )
