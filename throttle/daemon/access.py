"""Who calls, and which GPUs that caller may speak for.

A caller is known by the certificate of its connection, by a token, or by being on the Unix socket,
whose mode is its access control. What an access list does not name is refused.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from throttle.daemon.credentials import read_secret
from throttle.errors import ThrottleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import grpc

#: Name of whoever comes over the Unix socket, or over loopback where nothing else is asked for.
LOCAL: Final = "local"
#: Stands for every configured GPU in an access list.
EVERY_GPU: Final = "*"

_HEADER = "authorization"
_SCHEME = "bearer "
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"gpus", "token_sha256", "certificate"}


class AuthenticationError(ThrottleError):
    """Nobody knows who calls."""


class ForbiddenError(ThrottleError):
    """The caller is known, and not allowed."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller.

    Attributes:
        name: Its name in the access list.
        gpus: GPUs it may speak for; None for every configured one.
    """

    name: str
    gpus: frozenset[str] | None = None

    def may_use(self, gpu_uuids: Iterable[str]) -> bool:
        """Whether all of these GPUs are its own."""
        return self.gpus is None or self.gpus.issuperset(gpu_uuids)

    def require(self, gpu_uuids: Iterable[str]) -> None:
        """Refuse GPUs that are not its own.

        Raises:
            ForbiddenError: Names them.
        """
        if self.gpus is not None and (others := sorted(set(gpu_uuids) - self.gpus)):
            raise ForbiddenError(
                f"{self.name} may not speak for GPU {', '.join(others)}; allowed: "
                f"{', '.join(sorted(self.gpus)) or 'none'}"
            )


@dataclass(frozen=True, slots=True)
class AccessEntry:
    """One caller in an access list.

    Attributes:
        identity: The caller.
        token_sha256: SHA-256 of its token, lower-case hex; empty when it has none.
        certificate: A name in its certificate, the common name or an alternative one; empty when
            none is asked for. Where both are given both are needed.
    """

    identity: Identity
    token_sha256: str = ""
    certificate: str = ""


class AccessList:
    """Everybody who may call."""

    def __init__(self, entries: Iterable[AccessEntry]) -> None:
        """Take the entries of one file.

        Raises:
            ThrottleError: Two entries could be the same caller, or one cannot be told at all.
        """
        self._by_token: dict[str, AccessEntry] = {}
        self._by_certificate: dict[str, AccessEntry] = {}
        self._local: Identity | None = None
        for entry in entries:
            name = entry.identity.name
            if name == LOCAL:
                self._local = entry.identity
            elif entry.token_sha256:
                _put(self._by_token, entry.token_sha256, entry, "token_sha256")
            elif entry.certificate:
                _put(self._by_certificate, entry.certificate, entry, "certificate")
            else:
                raise ThrottleError(
                    f"{name} has neither token_sha256 nor certificate; allowed: one or both"
                )

    @property
    def needs_tokens(self) -> bool:
        """Whether some caller is known by a token."""
        return bool(self._by_token)

    def identify(self, token: str, certificate_names: Iterable[str], *, local: bool) -> Identity:
        """Tell who calls.

        Args:
            token: What came with the call; empty without one.
            certificate_names: Names in the certificate of its connection.
            local: Whether it came over the Unix socket.

        Raises:
            AuthenticationError: Nobody in the list.
        """
        names = tuple(certificate_names)
        if token:  # looked up by its hash: the time that takes says nothing about the token
            entry = self._by_token.get(hashlib.sha256(token.encode()).hexdigest())
            if entry is not None and (not entry.certificate or entry.certificate in names):
                return entry.identity
            raise AuthenticationError("the token of this call is not known here")
        for name in names:
            if name in self._by_certificate:
                return self._by_certificate[name].identity
        if local and self._local is not None:
            return self._local
        raise AuthenticationError(
            "this call needs a token (metadata `authorization: Bearer ...`) or a client certificate"
            " that the access list names"
        )


class CallerLookup:
    """Tells who makes a gRPC call; without an access list whoever gets through may do all."""

    def __init__(self, access_list: AccessList | None = None) -> None:
        self.access_list = access_list  # replaced as a whole when the file changes

    def __call__(self, context: grpc.ServicerContext) -> Identity:
        """The caller.

        Raises:
            AuthenticationError: Nobody known.
        """
        # grpc's types say bytes; it gives a list of them for every key
        values = cast("Mapping[str, Iterable[bytes]]", context.auth_context() or {})
        names = _certificate_names(values)
        access_list = self.access_list
        if access_list is None:
            return Identity(names[0] if names else LOCAL)
        local = str(context.peer()).startswith("unix:")
        return access_list.identify(_token(context.invocation_metadata()), names, local=local)


def read_access_list(path: Path) -> AccessList:
    """Read an access list: one table per caller, named after it.

    The file holds hashes, which an engine must not be able to replace: it must not be writable or
    readable by others.

    Raises:
        ThrottleError: It cannot be used. The message repeats no value of the file.
    """
    try:
        document = tomllib.loads(read_secret(path, "access").decode("utf-8"))
    except ValueError:  # the parser's message would repeat parts of the file
        raise ThrottleError(f"access {path} is not TOML") from None
    return AccessList([_entry(path, name, table) for name, table in document.items()])


def _entry(path: Path, name: str, table: object) -> AccessEntry:
    where = f"access {path}: {name}"
    if not _NAME.fullmatch(name):
        raise ThrottleError(f"{where}; allowed: names of letters, digits, '.', '_' and '-'")
    if not isinstance(table, dict) or set(table) - _FIELDS:
        raise ThrottleError(f"{where}; allowed: a table with {', '.join(sorted(_FIELDS))}")
    gpus = table.get("gpus", [])
    if not isinstance(gpus, list) or not all(isinstance(uuid, str) and uuid for uuid in gpus):
        raise ThrottleError(f'{where}: gpus; allowed: a list of GPU UUIDs, or ["{EVERY_GPU}"]')
    token, certificate = table.get("token_sha256", ""), table.get("certificate", "")
    if not isinstance(token, str) or (token and not _SHA256.fullmatch(token)):
        raise ThrottleError(
            f"{where}: token_sha256; allowed: 64 hexadecimal digits as `throttle token` prints "
            "them, never the token itself"
        )
    if not isinstance(certificate, str):
        raise ThrottleError(f"{where}: certificate; allowed: a name in the client's certificate")
    identity = Identity(name, None if gpus == [EVERY_GPU] else frozenset(gpus))
    return AccessEntry(identity, token, certificate)


def _put(table: dict[str, AccessEntry], key: str, entry: AccessEntry, field: str) -> None:
    if key in table:
        raise ThrottleError(
            f"{entry.identity.name} and {table[key].identity.name} have the same {field}; allowed: "
            "each its own"
        )
    table[key] = entry


def _token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    for key, value in metadata:
        if key == _HEADER and isinstance(value, str) and value.lower().startswith(_SCHEME):
            return value[len(_SCHEME) :]
    return ""


def _certificate_names(auth_context: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    values = (
        *auth_context.get("x509_subject_alternative_name", ()),
        *auth_context.get("x509_common_name", ()),
    )
    return tuple(value.decode("utf-8", "replace") for value in values)
