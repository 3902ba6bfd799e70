"""Compiled code kept on disk for as long as the sources that it was made of stay as they are.

Numba looks only at the file that a function stands in. Constants and functions of other modules are
compiled in, and would stay as they were after a change there; so the key under which code is kept
holds a digest of all sources that may be in it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, TypeVar

from numba import njit
from numba.core.caching import FunctionCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

_Function = TypeVar("_Function", bound="Callable[..., Any]")


def sources_digest(folders: Iterable[Path]) -> str:
    """Hash of every Python source in these folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compiler(digest: str, *, fused: bool = False) -> Callable[[_Function], _Function]:
    """A decorator for functions that numba compiles, without the interpreter's lock.

    Args:
        digest: Of all that may be compiled in.
        fused: A product and a sum may be rounded once instead of twice.
    """

    class DigestCache(FunctionCache):
        def _index_key(self, sig: object, codegen: object) -> tuple[Any, ...]:
            usual: Any = super()
            return (*usual._index_key(sig, codegen), digest)  # noqa: SLF001 - of this class

    def decorate(function: _Function) -> _Function:
        compile_: Any = njit  # its own types tell less than they ask
        make_cache: Any = DigestCache
        dispatcher = compile_(
            function, nogil=True, error_model="numpy", fastmath={"contract"} if fused else False
        )
        dispatcher._cache = make_cache(function)  # noqa: SLF001 - as `cache=True` does
        compiled: _Function = dispatcher
        return compiled

    return decorate
