"""What a machine tells, through /proc and /etc, of who may set clocks and who else does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_SYS_ADMIN_BIT: Final = 21
#: Of a process in the initial user namespace, whose capabilities the driver asks for.
_INITIAL_UID_MAP: Final = (0, 0, 4_294_967_295)

#: Program -> what it does to clocks. Those that only read are not here.
_PROGRAMS: Final = {
    "nv-hostengine": "DCGM; a configuration set with `dcgmi config` is set again after every reset",
    "zeusd": "the Zeus daemon; sets clocks and power limits for its clients",
    "geopmd": "GEOPM; writes clocks for its clients",
    "nvidia-pstated": "lowers the state of idle GPUs",
    "lactd": "LACT; sets locks and offsets",
    "nvidia-powerd": "Dynamic Boost; moves power between CPU and GPU",
}

#: nvidia-smi with an option that sets clocks or power.
_SETTING: Final = re.compile(
    r"nvidia-smi\b[^\n]*?\s(-lgc|--lock-gpu-clocks|-ac|--applications-clocks|-lmc"
    r"|--lock-memory-clocks|-pl|--power-limit)\b"
)

#: Where machines keep what they run by themselves.
_PLACES: Final = (
    "etc/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
    "etc/rc.local",
    "etc/cron.d",
    "etc/crontab",
    "etc/init.d",
)
_FILE_LIMIT_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class ClockOwner:
    """Something that sets clocks or power, or may.

    Attributes:
        where: A process or a file.
        what: What it does.
    """

    where: str
    what: str


class Surroundings:
    """The machine as far as this process can see it; what cannot be read is not there."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Look at nothing yet.

        Args:
            root: Where `proc` and `etc` lie.
        """
        self._root = root

    def has_sys_admin(self) -> bool:
        """Whether this process has CAP_SYS_ADMIN in effect."""
        status = _text(self._root / "proc/self/status")
        found = re.search(r"^CapEff:\s*([0-9a-fA-F]+)", status, re.MULTILINE)
        return found is not None and bool(int(found[1], 16) >> _SYS_ADMIN_BIT & 1)

    def in_initial_user_namespace(self) -> bool:
        """Whether capabilities here are those that the driver asks for."""
        fields = _text(self._root / "proc/self/uid_map").split()
        return tuple(map(int, fields)) == _INITIAL_UID_MAP

    def environment(self, pid: int) -> dict[str, str] | None:
        """The environment that a process was started with; None when it cannot be read."""
        try:
            content = (self._root / "proc" / str(pid) / "environ").read_bytes()
        except OSError:
            return None
        pairs = (entry.partition("=") for entry in content.decode(errors="replace").split("\0"))
        return {name: value for name, _, value in pairs if name}

    def clock_owners(self) -> tuple[ClockOwner, ...]:
        """Programs that run and files that say so."""
        return (*self._running(), *self._remembered())

    def _running(self) -> Iterator[ClockOwner]:
        for entry in sorted((self._root / "proc").glob("[0-9]*")):
            command = _text(entry / "cmdline").replace("\0", " ").strip()
            name = _text(entry / "comm").strip()
            for program, what in _PROGRAMS.items():
                # the kernel keeps 15 characters of a name
                if name == program[:15]:
                    yield ClockOwner(f"process {entry.name} ({program})", what)
            if found := _SETTING.search(command):
                yield ClockOwner(f"process {entry.name}", f"runs `{found[0]}`")

    def _remembered(self) -> Iterator[ClockOwner]:
        seen = set()
        for place in _PLACES:
            path = self._root / place
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                if file.name in seen or not (found := _SETTING.search(_text(file))):
                    continue
                seen.add(file.name)
                yield ClockOwner(f"/{file.relative_to(self._root)}", f"says `{found[0]}`")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_FILE_LIMIT_BYTES).decode(errors="replace")
    except OSError:
        return ""
