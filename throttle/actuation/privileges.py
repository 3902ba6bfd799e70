"""Gives up privileges that a process does not need. Linux; the standard library and libc alone."""

from __future__ import annotations

import ctypes
import os
import pwd
from typing import TYPE_CHECKING, Final

from throttle.errors import ThrottleError

if TYPE_CHECKING:
    import signal

#: What the NVIDIA driver asks of whoever sets a clock.
CAP_SYS_ADMIN: Final = 21

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CLONE_NEWNET: Final = 0x4000_0000
_CAPABILITY_VERSION_3: Final = 0x2008_0522
_LAST_CAPABILITY: Final = "/proc/sys/kernel/cap_last_cap"

_libc = ctypes.CDLL(None, use_errno=True)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies.

    Args:
        parent: The parent's process id as it was before the fork.
        number: Which signal.

    Raises:
        ProcessLookupError: The parent is dead already.
    """
    _call("prctl", _PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        raise ProcessLookupError(f"the parent, process {parent}, has ended")


def forbid_new_privileges() -> None:
    """Neither this process nor what it starts can ever gain privileges by executing a file."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def become(user: str) -> None:
    """Change user and group for good.

    Raises:
        ThrottleError: There is no such user, or this process may not.
    """
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise ThrottleError(
            f"actuation.controller_user is {user!r}; allowed: a user of this machine"
        ) from None
    try:
        os.setgroups(os.getgrouplist(user, entry.pw_gid))
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    except OSError as error:
        raise ThrottleError(
            f"this process cannot become {user!r}: {error.strerror}; start it as root, or leave "
            "actuation.controller_user empty"
        ) from None


def keep_capabilities(*kept: int) -> str:
    """Drop every capability but these, from every set.

    Returns:
        What could not be done, for the log; empty when all was.
    """
    problem = ""
    with open(_LAST_CAPABILITY, encoding="ascii") as file:  # noqa: PTH123 - no pathlib needed here
        last = int(file.read())
    try:
        _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
        for capability in range(last + 1):
            if capability not in kept:
                _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    except OSError as error:  # without CAP_SETPCAP; what was never there need not be dropped
        problem = f"the bounding set stays: {error.strerror}"
    header, held = _CapabilityHeader(_CAPABILITY_VERSION_3, 0), (_CapabilityData * 2)()
    _call("capget", ctypes.byref(header), held)
    for word, data in enumerate(held):
        mask = sum(1 << (each - 32 * word) for each in kept if each // 32 == word)
        data.effective &= mask
        data.permitted &= mask
        data.inheritable = 0
    _call("capset", ctypes.byref(header), held)
    return problem


def leave_the_network() -> str:
    """Go where there is no network interface at all; inherited sockets stay.

    Returns:
        Why it could not be done, for the log; empty when it was.
    """
    try:
        _call("unshare", _CLONE_NEWNET)
    except OSError as error:
        return f"the network stays in reach: {error.strerror}"
    return ""


def _call(name: str, *arguments: object) -> None:
    converted = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
    if name == "unshare":
        converted = [ctypes.c_int(each.value) for each in converted]  # type: ignore[attr-defined]
    if getattr(_libc, name)(*converted) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
