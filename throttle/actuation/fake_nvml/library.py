"""Builds the library with whatever C compiler there is."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from throttle.errors import NotFoundError, ThrottleError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: What the binding asks the loader for.
LIBRARY_NAME: Final = "libnvidia-ml.so.1"
#: Names the file that holds the state of the pretended machine.
STATE_VARIABLE: Final = "FAKE_NVML_STATE"

_SOURCE: Final = Path(__file__).with_name("nvml.c")
_OPTIONS: Final = ("-shared", "-fPIC", "-O1", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY_NAME}")


def find_compiler() -> tuple[str, ...]:
    """The command of a C compiler: cc, gcc, clang, or the one in the ziglang wheel.

    Raises:
        NotFoundError: There is none.
    """
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return (path,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "cc")
    raise NotFoundError(
        "no C compiler is here to build the fake NVML with; allowed: cc, gcc or clang on PATH, or "
        "the ziglang package (pip install ziglang)"
    )


def build_library(directory: Path, compiler: Sequence[str] | None = None) -> Path:
    """Build the library in a directory, unless it is there already.

    Args:
        directory: Made if need be; shared by whoever builds the same source.
        compiler: A command that takes the options of cc; None finds one.

    Returns:
        The library; its name is `LIBRARY_NAME`, its folder named by what it was built from.

    Raises:
        NotFoundError: There is no compiler.
        ThrottleError: The compiler failed; the message holds what it said.
    """
    command = tuple(compiler) if compiler is not None else find_compiler()
    source = _SOURCE.read_bytes()
    digest = hashlib.sha256(source + repr((command, _OPTIONS)).encode()).hexdigest()[:16]
    library = directory / digest / LIBRARY_NAME
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    draft = library.with_name(f"{LIBRARY_NAME}.{os.getpid()}.new")
    done = subprocess.run(  # noqa: S603 - a compiler of the operator's own
        [*command, *_OPTIONS, "-o", str(draft), str(_SOURCE), "-lpthread"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ThrottleError(f"{' '.join(command)} cannot build the fake NVML: {done.stderr}")
    draft.replace(library)
    return library


def environment(library: Path, state: Path) -> Mapping[str, str]:
    """Variables for a process that is to be started with this library and machine.

    The loader reads its path once, when the process starts: they are of no use to one that runs.
    """
    others = os.environ.get("LD_LIBRARY_PATH", "")
    return {
        "LD_LIBRARY_PATH": f"{library.parent}:{others}" if others else str(library.parent),
        STATE_VARIABLE: str(state),
    }


def load_here(library: Path) -> ctypes.CDLL:
    """Load the library into this process, so that the binding finds it by its name.

    Must come before the binding's first init; the state file is read from `STATE_VARIABLE` at every
    init that is not nested in another.
    """
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
