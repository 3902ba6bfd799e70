"""The controller's end: an `Actuator` behind the channel to the privileged process.

Setting a clock is one small packet. The answer to an engine waits for the driver only a little
(`answer_wait_seconds`); what it says of the clock is always what the GPUs are known to have been
told.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Final

from throttle.actuation.actuator import ClockAnswer
from throttle.actuation.hand import ClockChange, ClockState
from throttle.actuation.leases import DEFAULT_CLOCKS, UNKNOWN_CLOCKS, allowed_clocks_mhz
from throttle.actuation.messages import GPUS_LIMIT, REPLY_BYTES, Ask, Reply, Request, Say, Status
from throttle.errors import ActuationError, ConflictError, InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from throttle.actuation.backend import GpuBackend, GpuReading
    from throttle.actuation.settings import ActuationSettings

#: For the actuator to open the driver and reset every GPU.
_READY_SECONDS: Final = 30.0
#: Beyond the deadline of a driver call, for an answer that must come.
_MARGIN_SECONDS: Final = 1.0


class ActuatorEndedError(ActuationError):
    """The privileged process is gone; it has said why, and GPUs are reset without it."""


class RemoteActuator:
    """Leases and clocks through the privileged process; readings straight from the driver."""

    def __init__(
        self,
        channel: socket.socket,
        backend: GpuBackend,
        allowed_uuids: Sequence[str],
        settings: ActuationSettings,
        on_change: Callable[[ClockChange], None] = lambda _: None,
    ) -> None:
        """Wait until the actuator has reset every GPU.

        Args:
            channel: This end of the socket pair.
            backend: Reads GPUs; nothing is written through it.
            allowed_uuids: As the actuator was told, in the same order.
            settings: As the actuator was told.
            on_change: Told of every write that changed a target, on a thread of this object.

        Raises:
            ActuatorEndedError: The actuator did not start.
            NotFoundError: The backend does not see a GPU.
        """
        if len(allowed_uuids) > GPUS_LIMIT:
            raise InvalidInputError("gpus", len(allowed_uuids), f"up to {GPUS_LIMIT} GPUs")
        self._channel = channel
        self._backend = backend
        self._settings = settings
        self._on_change = on_change
        self._uuids = tuple(allowed_uuids)
        self._places = {uuid: place for place, uuid in enumerate(self._uuids)}
        self._clocks = {
            uuid: allowed_clocks_mhz(backend.supported_clocks_mhz(uuid), settings)
            for uuid in self._uuids
        }
        self._state = threading.Condition()  # guards everything below
        self._targets = dict.fromkeys(self._uuids, DEFAULT_CLOCKS)
        self._clock_states = dict.fromkeys(self._uuids, ClockState.UNKNOWN)
        self._problems: dict[str, str] = {}
        self._leases: dict[int, RemoteLease] = {}
        self._answers: dict[int, Reply | None] = {}  # None while one is awaited
        self._number = 0
        self._ready = False
        self._restored = False  # whether the actuator said so before it ended
        self._ended = ""
        channel.setblocking(True)  # noqa: FBT003 - the standard library's signature
        self._reader = threading.Thread(target=self._read, name="actuator", daemon=True)
        self._reader.start()
        with self._state:
            self._state.wait_for(lambda: self._ready or self._ended, _READY_SECONDS)
            if not self._ready:
                raise ActuatorEndedError(self._ended or "the actuator does not answer")

    def uuids(self) -> tuple[str, ...]:
        """GPUs that may be written."""
        return self._uuids

    def name(self, uuid: str) -> str:
        """The GPU's model."""
        return self._backend.name(self._known(uuid))

    def supported_clocks_mhz(self, uuids: Sequence[str]) -> tuple[int, ...]:
        """Clocks that may be set on every one of these GPUs, MHz, rising."""
        return tuple(
            sorted(set.intersection(*(set(self._clocks[self._known(uuid)]) for uuid in uuids)))
        )

    def read(self, uuid: str) -> GpuReading:
        """Read one GPU."""
        return self._backend.read(self._known(uuid))

    def target_mhz(self, uuid: str) -> int:
        """What the GPU was told last."""
        return self._targets[self._known(uuid)]

    def clock_state(self, uuid: str) -> ClockState:
        """What became of that."""
        return self._clock_states[self._known(uuid)]

    def owner(self, uuid: str) -> str:
        """Who holds the GPU; empty when it is free."""
        self._known(uuid)
        with self._state:
            leases = tuple(self._leases.values())
        return next((lease.owner for lease in leases if uuid in lease.gpu_uuids), "")

    def acquire(self, owner: str, uuids: Sequence[str]) -> RemoteLease:
        """Lease all of these GPUs, or none."""
        chosen = tuple(sorted({self._known(uuid) for uuid in uuids}))
        mask = sum(1 << self._places[uuid] for uuid in chosen)
        answer = self._ask(Ask.CLAIM, gpus=mask, owner=owner)
        lease = RemoteLease(self, owner, answer.epoch, chosen)
        with self._state:
            self._leases[answer.epoch] = lease
        return lease

    def reset_all(self) -> None:
        """Return every allowed GPU to default clocks."""
        if not self._restored:
            self._ask(Ask.RESET_ALL)

    def renew(self) -> None:
        """Say that this process is alive."""
        self._send(Request(Ask.RENEW))

    def problems(self) -> dict[str, str]:
        """GPUs that cannot be relied on now, and why."""
        with self._state:
            found = dict(self._problems)
            if self._ended:
                found[""] = self._ended
        return found

    def close(self) -> None:
        """Hang up, and wait until the actuator has reset every GPU and ended."""
        try:
            self._channel.shutdown(socket.SHUT_WR)
        except OSError:
            return  # it has ended already
        finally:
            self._reader.join(self._settings.call_deadline_seconds + _MARGIN_SECONDS)

    @property
    def answer_wait_seconds(self) -> float:
        """How long `RemoteLease.set_clock` waits for the driver."""
        return self._settings.answer_wait_seconds

    def send_set(self, epoch: int, clock_mhz: int, why: str) -> int:
        """Ask for a clock without waiting; returns the number of the answer to come."""
        with self._state:
            self._number += 1
            number = self._number
            self._answers[number] = None
        self._send(Request(Ask.SET, number, epoch, clock_mhz=clock_mhz, why=why))
        return number

    def take_answer(self, number: int, timeout_seconds: float) -> Reply | None:
        """The answer of that number, once; None when it does not come in time."""
        with self._state:
            self._state.wait_for(
                lambda: self._answers.get(number) is not None or self._ended, timeout_seconds
            )
            if self._answers.get(number) is None:
                if self._ended:
                    raise ActuatorEndedError(self._ended)
                return None
            return self._answers.pop(number)

    def forget_answer(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        with self._state:
            self._answers.pop(number, None)

    def told_mhz(self, uuids: Sequence[str]) -> int:
        """What GPUs of one lease are known to have been told last: the lowest, 0 for default."""
        told = [self._targets[uuid] for uuid in uuids]
        return min((each for each in told if each > 0), default=DEFAULT_CLOCKS)

    def end_lease(self, epoch: int) -> None:
        """Give a lease back, and wait until its GPUs have been reset."""
        with self._state:
            known = self._leases.pop(epoch, None) is not None
        if known and not self._restored:
            self._ask(Ask.RELEASE, epoch=epoch)

    def _ask(self, kind: Ask, *, epoch: int = 0, gpus: int = 0, owner: str = "") -> Reply:
        """Ask, and wait for the answer; raises what it says."""
        with self._state:
            self._number += 1
            number = self._number
            self._answers[number] = None
        self._send(Request(kind, number, epoch, gpus, owner=owner))
        answer = self.take_answer(number, self._settings.call_deadline_seconds + _MARGIN_SECONDS)
        if answer is None:
            self.forget_answer(number)
            raise ActuationError("the actuator does not answer: a driver call may hang")
        raise_failure(answer)
        return answer

    def _send(self, request: Request) -> None:
        try:
            self._channel.send(request.pack())
        except OSError as error:
            raise ActuatorEndedError(
                self._ended or f"the actuator cannot be reached: {error.strerror}"
            ) from None

    def _read(self) -> None:
        """Take in what the actuator says; the body of a thread."""
        why = "the actuator has ended"
        while True:
            try:
                packet = self._channel.recv(REPLY_BYTES + 1)
                if not packet:
                    break
                reply = Reply.unpack(packet)
            except (OSError, InvalidInputError) as error:
                why = f"the actuator cannot be understood: {error}"
                break
            self._take(reply)
        with self._state:
            self._ended = why
            for lease in self._leases.values():
                lease.lost()
            self._state.notify_all()

    def _take(self, reply: Reply) -> None:
        change = None
        with self._state:
            if reply.kind is Say.READY:
                self._ready = True
            elif reply.kind is Say.ANSWER:
                if reply.number in self._answers:
                    self._answers[reply.number] = reply
                elif reply.epoch and reply.epoch not in self._leases:
                    self._give_up(reply.epoch)  # a claim whose asker has stopped waiting
            elif reply.kind is Say.GPU:
                change = self._take_gpu(reply)
            elif reply.kind is Say.ENDED:
                lease = self._leases.pop(reply.epoch, None)
                if lease is not None:
                    lease.lost()
            elif reply.kind is Say.GOODBYE:
                self._restored = bool(reply.flags)
            self._state.notify_all()
        if change is not None:
            self._on_change(change)

    def _take_gpu(self, reply: Reply) -> ClockChange | None:
        uuid = self._uuids[reply.gpu]
        if reply.flags:
            self._problems[uuid] = reply.text
        else:
            self._problems.pop(uuid, None)
        self._targets[uuid] = reply.clock_mhz
        self._clock_states[uuid] = ClockState(reply.clock_state)
        holder = next((each for each in self._leases.values() if uuid in each.gpu_uuids), None)
        if holder is not None:
            holder.disturbed(reply.clock_mhz)
        moved = reply.clock_mhz not in {reply.from_mhz, UNKNOWN_CLOCKS}
        if not moved or (reply.from_mhz, reply.clock_mhz) == (UNKNOWN_CLOCKS, DEFAULT_CLOCKS):
            return None  # a reset to be sure is not a change
        owner = holder.owner if holder is not None else ""
        return ClockChange(owner, uuid, reply.from_mhz, reply.clock_mhz, reply.seconds)

    def _give_up(self, epoch: int) -> None:
        self._number += 1
        with contextlib.suppress(ActuatorEndedError):  # then it is given up anyway
            self._send(Request(Ask.RELEASE, self._number, epoch))

    def _known(self, uuid: str) -> str:
        if uuid not in self._places:
            raise NotFoundError(
                f"GPU {uuid!r} is not among the configured ones: {', '.join(self._uuids) or 'none'}"
            )
        return uuid


class RemoteLease:
    """A `Lease` that the privileged process has granted."""

    def __init__(
        self, actuator: RemoteActuator, owner: str, epoch: int, gpu_uuids: tuple[str, ...]
    ) -> None:
        """Made by `RemoteActuator.acquire` only."""
        self.owner = owner
        self.gpu_uuids = gpu_uuids
        self._actuator = actuator
        self._epoch = epoch
        self._released = False
        self._asked_mhz = DEFAULT_CLOCKS
        self._number = 0  # of the answer that is awaited; 0 when none is
        self._in_force: int | None = DEFAULT_CLOCKS  # what the wish came to; None: ask again

    @property
    def released(self) -> bool:
        """Whether it has been given back or taken away."""
        return self._released

    def set_clock(self, clock_mhz: int, why: str = "") -> ClockAnswer:
        """Forbid clocks above this one on every GPU of the lease."""
        if self._released:
            raise ConflictError(f"the lease of {self.owner!r} is no longer in force")
        actuator, wait_seconds = self._actuator, 0.0
        if clock_mhz != self._asked_mhz or (self._in_force is None and not self._number):
            if self._number:
                actuator.forget_answer(self._number)
            self._asked_mhz, self._in_force = clock_mhz, None
            self._number = actuator.send_set(self._epoch, clock_mhz, why)
            wait_seconds = actuator.answer_wait_seconds
        if self._number:
            answer = actuator.take_answer(self._number, wait_seconds)
            if answer is None:
                return ClockAnswer(actuator.told_mhz(self.gpu_uuids), applied=False)
            self._number = 0
            if answer.status is Status.HELD:
                return ClockAnswer(max(0, answer.clock_mhz), applied=False)
            raise_failure(answer)
            self._in_force = answer.clock_mhz
        in_force = self._in_force
        if in_force is None:  # changed by the actuator this very moment
            return ClockAnswer(actuator.told_mhz(self.gpu_uuids), applied=False)
        return ClockAnswer(in_force, applied=True)

    def release(self) -> None:
        """Return the GPUs to default clocks and give them back."""
        self._released = True
        try:
            self._actuator.end_lease(self._epoch)
        finally:  # its own answer came before that of the end
            self._actuator.forget_answer(self._number)

    def lost(self) -> None:
        """The lease has ended; nobody waits for its answer any more."""
        self._released = True
        self._actuator.forget_answer(self._number)

    def disturbed(self, clock_mhz: int) -> None:
        """A GPU was told something; if it is not the last wish, that must be said again."""
        if self._in_force is not None and clock_mhz != self._in_force:
            self._in_force = None


def raise_failure(answer: Reply) -> None:
    """Raise what an answer says went wrong.

    Raises:
        ConflictError: A GPU is held by another, or the lease is no longer in force.
        NotFoundError: A GPU is not configured.
        ActuationError: A GPU did not obey.
    """
    if answer.status is Status.CONFLICT:
        raise ConflictError(answer.text)
    if answer.status is Status.NOT_FOUND:
        raise NotFoundError(answer.text)
    if answer.status in {Status.FAILED, Status.INVALID}:
        raise ActuationError(answer.text)
