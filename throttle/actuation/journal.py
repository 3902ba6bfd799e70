"""One small file per GPU: its lock says who owns the GPU, its content what must be undone.

A clock lock cannot be read back from the driver and outlives the process that set it. So before a
GPU is first slowed, an intent is on disk; whoever finds one later returns the GPU to default
clocks. A record that cannot be read counts as an intent.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from throttle.errors import ConflictError, ThrottleError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PREFIX: Final = "gpu-"
_RECORD_BYTES: Final = 512
_HOLDER_BYTES: Final = 200
_LOCK_POLL_SECONDS: Final = 0.02
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Record(Protocol):
    """What is written down of one GPU."""

    #: Whether the GPU may be slow by our hand.
    left_slow: bool

    def intend(self, clock_mhz: int) -> None:
        """Note, for good, that the GPU is about to be slowed."""
        ...

    def mark(self, clock_mhz: int) -> None:
        """Note that it has been."""
        ...

    def clear(self) -> None:
        """Note that it is at default clocks."""
        ...


class NoRecord:
    """Writes nothing down: for GPUs that vanish with the process."""

    left_slow = False

    def intend(self, clock_mhz: int) -> None:
        """Nothing."""

    def mark(self, clock_mhz: int) -> None:
        """Nothing."""

    def clear(self) -> None:
        """Nothing."""


class GpuRecord:
    """One GPU's file, held until it is closed; the file itself stays."""

    def __init__(
        self, directory: Path, uuid: str, holder: str, patience_seconds: float = 0.0
    ) -> None:
        """Take the GPU.

        Args:
            directory: Where the files of the machine lie; made if it is missing.
            uuid: The GPU.
            holder: What others are told who find it taken.
            patience_seconds: How long to wait for a holder that may be about to end.

        Raises:
            ConflictError: Another process holds it; the message names it.
            ThrottleError: The directory cannot be used.
        """
        self.uuid = uuid
        self._holder = holder.encode()[:_HOLDER_BYTES].decode(errors="ignore")
        path = directory / (_PREFIX + urllib.parse.quote(uuid, safe=""))
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(path, flags, 0o644)
        except OSError as error:
            raise ThrottleError(
                f"the record {str(path)!r} of GPU {uuid} cannot be made: {error.strerror}; choose "
                "another directory with --actuation-state-directory"
            ) from None
        if not _lock(self._descriptor, patience_seconds):
            held_by = _read(self._descriptor).get("holder", "another process")
            os.close(self._descriptor)
            raise ConflictError(
                f"GPU {uuid} is held by {held_by}; stop it, or name other GPUs with --gpus"
            ) from None
        self.left_slow = _left_slow(self._descriptor)
        self._write("intent" if self.left_slow else "default", 0)
        directory_descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(directory_descriptor)
        os.close(directory_descriptor)

    def intend(self, clock_mhz: int) -> None:
        """On disk when this returns."""
        self.left_slow = True
        self._write("intent", clock_mhz)

    def mark(self, clock_mhz: int) -> None:
        """For people who read the file: intent and set are undone alike, so it need not be safe."""
        self._write("set", clock_mhz, durable=False)

    def clear(self) -> None:
        """Losing this costs one reset too many."""
        self.left_slow = False
        self._write("default", 0, durable=False)

    def close(self) -> None:
        """Let the GPU go."""
        os.close(self._descriptor)

    def _write(self, state: str, clock_mhz: int, *, durable: bool = True) -> None:
        record = {
            "gpu": self.uuid,
            "state": state,
            "clock_mhz": clock_mhz,
            "boot": boot_id(),
            "holder": self._holder,
        }
        os.pwrite(self._descriptor, json.dumps(record).encode().ljust(_RECORD_BYTES) + b"\n", 0)
        if durable:
            os.fsync(self._descriptor)


def _lock(descriptor: int, patience_seconds: float) -> bool:
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOCK_POLL_SECONDS)
        else:
            return True


def boot_id() -> str:
    """Changes whenever the machine starts, which drops all locks."""
    return _BOOT_ID.read_text("ascii").strip()


def left_slow_uuids(directory: Path) -> Iterator[str]:
    """GPUs that some process may have left slow since the machine started, held ones included."""
    for path in sorted(directory.glob(_PREFIX + "*")):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if _left_slow(descriptor):
                yield urllib.parse.unquote(path.name.removeprefix(_PREFIX))
        finally:
            os.close(descriptor)


def _left_slow(descriptor: int) -> bool:
    if os.fstat(descriptor).st_size == 0:
        return False  # just made: nothing was ever written
    record = _read(descriptor)
    if record.get("boot", boot_id()) != boot_id():
        return False
    return record.get("state") != "default"


def _read(descriptor: int) -> dict[str, str]:
    try:
        record = json.loads(os.pread(descriptor, _RECORD_BYTES * 2, 0))
    except ValueError:
        return {}
    if not isinstance(record, dict):
        return {}
    return {str(name): str(value) for name, value in record.items()}
