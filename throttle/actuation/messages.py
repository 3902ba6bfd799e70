"""What controller and actuator say to each other: two fixed structs over a packet socket.

GPUs are named by their place in the list that both were started with. Everything is checked; a
message that is anything but exactly right is refused whole.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from throttle.errors import InvalidInputError

GPUS_LIMIT: Final = 64
CLOCK_LIMIT_MHZ: Final = 100_000

_MAGIC: Final = 0x54484C33
_TEXT_BYTES: Final = 256
#: magic, kind, 3 bytes of padding, number, epoch, GPUs or clock, text; no alignment of the host's
_REQUEST: Final = struct.Struct("<IB3xQQQi4x128s16s")
#: magic, kind, status, GPU, flags, state, number, epoch, clock before, clock, seconds, count, text
_REPLY: Final = struct.Struct("<IBBBBBQQiidQ256s")
REQUEST_BYTES: Final = _REQUEST.size
REPLY_BYTES: Final = _REPLY.size
_OWNER_BYTES: Final = 128
_WHY_BYTES: Final = 16
_NUMBER_LIMIT: Final = 2**63


class Ask(enum.IntEnum):
    """What the controller wants."""

    CLAIM = 1
    SET = 2
    RELEASE = 3
    RESET_ALL = 4
    RENEW = 5


class Say(enum.IntEnum):
    """What the actuator says."""

    READY = 1  # every GPU has been reset
    ANSWER = 2  # to the request of that number
    GPU = 3  # what one GPU was told, and how it is
    ENDED = 4  # a lease ended otherwise than by a release
    GOODBYE = 5  # every GPU that could be is at default clocks; flags tell whether all are


class Status(enum.IntEnum):
    """What came of a request."""

    DONE = 0
    HELD = 1
    CONFLICT = 2
    NOT_FOUND = 3
    FAILED = 4
    INVALID = 5


@dataclass(frozen=True, slots=True)
class Request:
    """From the controller.

    Attributes:
        kind: What it wants.
        number: Names the answer; 0 for RENEW, which gets none.
        epoch: The lease, for SET and RELEASE.
        gpus: Bit mask of GPUs, for CLAIM.
        clock_mhz: For SET; 0 for default clocks.
        owner: The engine, for CLAIM.
        why: For the audit log, for SET.
    """

    kind: Ask
    number: int = 0
    epoch: int = 0
    gpus: int = 0
    clock_mhz: int = 0
    owner: str = ""
    why: str = ""

    def pack(self) -> bytes:
        """The bytes on the wire; texts too long are cut."""
        owner, why = self.owner.encode()[:_OWNER_BYTES], self.why.encode()[:_WHY_BYTES]
        return _REQUEST.pack(
            _MAGIC, self.kind, self.number, self.epoch, self.gpus, self.clock_mhz, owner, why
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """From the actuator.

    Attributes:
        kind: What it is.
        status: Of an ANSWER.
        gpu: Its place in the list, for GPU.
        flags: For GPU: 1 when it cannot be relied on; for GOODBYE: 1 when all are at default.
        clock_state: For GPU: the `ClockState` it is in.
        number: The request answered.
        epoch: The lease, for a claim's ANSWER and ENDED.
        from_mhz: For GPU: told before; -1 unknown.
        clock_mhz: Told last; -1 unknown.
        seconds: For GPU: how long the write took.
        count: For GPU: how often its clock was found changed by another agent.
        text: Why, for people.
    """

    kind: Say
    status: Status = Status.DONE
    gpu: int = 0
    flags: int = 0
    clock_state: int = 0
    number: int = 0
    epoch: int = 0
    from_mhz: int = 0
    clock_mhz: int = 0
    seconds: float = 0.0
    count: int = 0
    text: str = ""

    def pack(self) -> bytes:
        """The bytes on the wire; a text too long is cut."""
        return _REPLY.pack(
            _MAGIC, self.kind, self.status, self.gpu, self.flags, self.clock_state, self.number,
            self.epoch, self.from_mhz, self.clock_mhz, self.seconds, self.count,
            self.text.encode()[:_TEXT_BYTES],
        )  # fmt: skip

    @classmethod
    def unpack(cls, packet: bytes) -> Reply:
        """Read a reply; the actuator is trusted, so only its form is checked.

        Raises:
            InvalidInputError: It is no reply.
        """
        try:
            magic, kind, status, *numbers, seconds, count, text = _REPLY.unpack(packet)
            gpu, flags, clock_state, number, epoch, from_mhz, clock_mhz = numbers
            said, how = Say(kind), Status(status)
        except (struct.error, ValueError):
            magic = 0
        if magic != _MAGIC:
            raise InvalidInputError("reply", packet[:16], f"{REPLY_BYTES} bytes of this version")
        return cls(
            said, how, gpu, flags, clock_state, number, epoch, from_mhz, clock_mhz, seconds, count,
            text.rstrip(b"\0").decode(errors="replace"),
        )  # fmt: skip


def read_request(packet: bytes, gpus_count: int) -> Request:
    """Read what a controller sent, trusting nothing.

    Raises:
        InvalidInputError: Anything is not exactly as it must be; the field is named.
    """
    if len(packet) != REQUEST_BYTES:
        raise InvalidInputError("request", f"{len(packet)} bytes", f"{REQUEST_BYTES} bytes")
    magic, raw_kind, number, epoch, gpus, clock_mhz, raw_owner, raw_why = _REQUEST.unpack(packet)
    _check(magic == _MAGIC, "magic", magic, str(_MAGIC))
    _check(raw_kind in {int(each) for each in Ask}, "kind", raw_kind, "1 to 5")
    kind = Ask(raw_kind)
    _check((number > 0) is (kind is not Ask.RENEW), "number", number, "above 0; 0 for RENEW")
    _check(number < _NUMBER_LIMIT, "number", number, f"below {_NUMBER_LIMIT}")
    named = kind in {Ask.SET, Ask.RELEASE}
    _check((0 < epoch < _NUMBER_LIMIT) if named else epoch == 0, "epoch", epoch, "a lease's")
    claim, clock = kind is Ask.CLAIM, kind is Ask.SET
    _check((0 < gpus < 1 << gpus_count) if claim else gpus == 0, "gpus", gpus, "configured GPUs")
    _check(
        (0 <= clock_mhz <= CLOCK_LIMIT_MHZ) if clock else clock_mhz == 0,
        "clock_mhz",
        clock_mhz,
        f"0 to {CLOCK_LIMIT_MHZ} in SET, else 0",
    )
    owner, why = _text(raw_owner, "owner"), _text(raw_why, "why")
    _check(bool(owner) is claim, "owner", owner, "a name in CLAIM, else nothing")
    _check(clock or not why, "why", why, "a word in SET, else nothing")
    request = Request(kind, number, epoch, gpus, clock_mhz, owner, why)
    _check(request.pack() == packet, "padding", packet, "zeros")
    return request


def request_number(packet: bytes) -> int:
    """The number in a request that may be wrong otherwise; 0 when there is none."""
    if len(packet) != REQUEST_BYTES:
        return 0
    number: int = _REQUEST.unpack(packet)[2]
    return number if number < _NUMBER_LIMIT else 0


def _text(raw: bytes, name: str) -> str:
    try:
        text = raw.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        text = "\0"
    _check(text.isprintable(), name, raw, "printable text")
    return text


def _check(right: bool, name: str, value: object, allowed: str) -> None:  # noqa: FBT001 - a test
    if not right:
        raise InvalidInputError(f"request.{name}", value, allowed)
