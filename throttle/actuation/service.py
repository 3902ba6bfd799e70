"""The privileged process at work: requests from the controller in, orders to the GPUs' hands out.

One thread takes everything in and never waits for a driver; each GPU has a thread of its own.
"""

from __future__ import annotations

import collections
import os
import selectors
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from throttle.actuation import messages
from throttle.actuation.arbiter import Arbiter
from throttle.actuation.leases import DEFAULT_CLOCKS
from throttle.actuation.messages import Ask, Reply, Request, Say, Status
from throttle.actuation.settings import KILL_SWITCH_NAME
from throttle.errors import ActuationError, ConflictError, NotFoundError, ThrottleError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from throttle.actuation.arbiter import Pending
    from throttle.actuation.audit import AuditLog
    from throttle.actuation.backend import ClockDriver
    from throttle.actuation.hand import ClockChange, ClockState, Hand
    from throttle.actuation.journal import GpuRecord
    from throttle.actuation.leases import Grant
    from throttle.actuation.orders import Orders

#: How often leases, the kill switch and hung calls are looked at.
_TICK_SECONDS: Final = 0.1
#: Requests that wait for a driver; more are refused.
_WAITING_LIMIT: Final = 1024
#: Packets taken in before anything else is looked at.
_PACKETS_AT_ONCE: Final = 64
#: For the first reset of every GPU, beyond the deadline of one call.
_START_MARGIN_SECONDS: Final = 8.0
_INVALID_LOGGED_EVERY: Final = 1000


class Service:
    """Serves one controller until it or this process ends. Its methods run on the main thread."""

    def __init__(
        self,
        channel: socket.socket,
        backend: ClockDriver,
        records: dict[str, GpuRecord],
        orders: Orders,
        log: AuditLog,
    ) -> None:
        self._channel = channel
        self._uuids = tuple(records)
        self._log = log
        self._settings = orders.settings
        self._changes: collections.deque[ClockChange] = collections.deque()
        self._waiting: dict[int, tuple[Request, Pending, int]] = {}
        self._healths: dict[str, tuple[str, int]] = {}
        self._states: dict[str, ClockState] = {}  # as the controller was told
        self._invalid_count = 0
        self._ending = ""  # why, once it is
        self._pulse = orders.pulse
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._arbiter = Arbiter(
            backend,
            records,
            orders.settings,
            time.monotonic,
            tell=self._note_change,
            tell_ended=self._note_ended,
            kill_switch=Path(orders.directory) / KILL_SWITCH_NAME,
        )
        channel.setblocking(False)  # noqa: FBT003 - the standard library's signature
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ, self._receive)
        self._selector.register(self._wake, selectors.EVENT_READ, self._drain_wake)

    def run(self) -> int:
        """Serve to the end.

        Returns:
            Exit status: 0 when every GPU is at default clocks.

        Raises:
            ActuationError: A GPU cannot be reset at the start: it may be slow for ever.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for hand in self._hands:
            threading.Thread(
                target=_work_or_die, args=(hand, self._ring), name=hand.uuid, daemon=True
            ).start()
        self._await_first_resets()
        self._send(Reply(Say.READY, gpu=len(self._uuids)))
        self._log("actuator_ready", gpu_uuids=self._uuids)
        while not self._ending:
            self._turn()
        return self._finish()

    @property
    def _hands(self) -> tuple[Hand, ...]:
        return tuple(self._arbiter.hands.values())

    def _turn(self) -> None:
        self._beat()
        for key, _ in self._selector.select(_TICK_SECONDS):
            key.data()
        self._arbiter.tick()
        done = [number for number, (_, pending, _) in self._waiting.items() if pending.done]
        while self._changes:  # before the answers that they led to
            change = self._changes.popleft()
            self._send_gpu(self._arbiter.hands[change.gpu_uuid], change)
        problems = self._arbiter.problems()
        for uuid, hand in self._arbiter.hands.items():
            health = (problems.get(uuid, ""), hand.drifts_count)
            changed = hand.busy_since_seconds is None and hand.clock_state != self._states.get(uuid)
            if self._healths.setdefault(uuid, ("", 0)) != health:
                self._healths[uuid] = health
                self._log("gpu_health", "warning", gpu_uuid=uuid, problem=health[0],
                          drifts_count=hand.drifts_count)  # fmt: skip
                changed = True
            if changed:
                self._send_gpu(hand, None)
        for number in done:
            self._answer_done(*self._waiting.pop(number))

    def _receive(self) -> None:
        for _ in range(_PACKETS_AT_ONCE):
            try:
                packet = self._channel.recv(messages.REQUEST_BYTES + 1)
            except BlockingIOError:
                return
            except OSError as error:
                self._ending = f"the controller is gone: {error.strerror}"
                return
            if not packet:
                self._ending = "the controller is gone"
                return
            self._take(packet)

    def _take(self, packet: bytes) -> None:
        number = messages.request_number(packet)
        try:
            self._obey(messages.read_request(packet, len(self._uuids)))
        except NotFoundError as error:
            self._answer(number, Status.NOT_FOUND, text=str(error))
        except ConflictError as error:
            self._answer(number, Status.CONFLICT, text=str(error))
        except ActuationError as error:
            self._answer(number, Status.FAILED, text=str(error))
        except ThrottleError as error:
            if self._invalid_count % _INVALID_LOGGED_EVERY == 0:
                self._log("request_refused", "warning", error=str(error),
                          refused_count=self._invalid_count + 1)  # fmt: skip
            self._invalid_count += 1
            self._answer(number, Status.INVALID, text=str(error))

    def _obey(self, request: Request) -> None:
        arbiter, epoch = self._arbiter, request.epoch
        if request.kind is Ask.RENEW:
            arbiter.renew()
            return
        if request.number in self._waiting or len(self._waiting) >= _WAITING_LIMIT:
            raise ConflictError(f"request {request.number} is one too many")
        if request.kind is Ask.CLAIM:
            chosen = [uuid for index, uuid in enumerate(self._uuids) if request.gpus >> index & 1]
            grant, pending = arbiter.claim(request.owner, chosen)
            epoch = grant.epoch
        elif request.kind is Ask.SET:
            pending = arbiter.set_clock(epoch, request.clock_mhz, request.why)
        elif request.kind is Ask.RELEASE:
            pending = arbiter.release(epoch)
        else:
            pending = arbiter.reset_all("reset_all")
        self._waiting[request.number] = (request, pending, epoch)

    def _answer_done(self, request: Request, pending: Pending, epoch: int) -> None:
        failure = self._arbiter.settle(pending, epoch)
        if failure and request.kind is Ask.CLAIM:
            self._arbiter.release(epoch, "claim_failed")
        status = Status.FAILED if failure else Status.HELD if pending.held else Status.DONE
        self._answer(request.number, status, epoch=epoch, clock_mhz=pending.clock_mhz, text=failure)

    def _answer(
        self, number: int, status: Status, *, epoch: int = 0, clock_mhz: int = 0, text: str = ""
    ) -> None:
        self._send(
            Reply(Say.ANSWER, status, number=number, epoch=epoch, clock_mhz=clock_mhz, text=text)
        )

    def _send_gpu(self, hand: Hand, change: ClockChange | None) -> None:
        problem, state = self._healths.get(hand.uuid, ("", 0))[0], hand.clock_state
        self._states[hand.uuid] = state
        self._send(
            Reply(
                Say.GPU,
                gpu=self._uuids.index(hand.uuid),
                flags=int(bool(problem)),
                clock_state=state,
                from_mhz=hand.target_mhz if change is None else change.from_mhz,
                clock_mhz=hand.target_mhz if change is None else change.to_mhz,
                seconds=0.0 if change is None else change.duration_seconds,
                count=hand.drifts_count,
                text=problem,
            )
        )

    def _send(self, reply: Reply) -> None:
        try:
            self._channel.send(reply.pack())
        except OSError as error:  # gone, or it does not read: either way nobody is in control
            self._ending = self._ending or f"the controller does not listen: {error.strerror}"

    def _await_first_resets(self) -> None:
        deadline = time.monotonic() + self._settings.call_deadline_seconds + _START_MARGIN_SECONDS
        while time.monotonic() < deadline and any(hand.done_number < 0 for hand in self._hands):
            self._beat()
            self._selector.select(_TICK_SECONDS)
            self._drain_wake()
        failures = [
            hand.failure or f"GPU {hand.uuid}: the driver call hangs"
            for hand in self._hands
            if hand.done_number < 0 or (hand.failure and not hand.denial)
        ]
        if failures:
            raise ActuationError("; ".join(failures))
        for hand in self._hands:
            if hand.denial:
                self._log("gpu_cannot_be_set", "warning", gpu_uuid=hand.uuid, problem=hand.denial)

    def _finish(self) -> int:
        """Return everything to default clocks; as long as a driver call hangs, wait for it."""
        self._log("actuator_stopping", why=self._ending)
        pending = self._arbiter.reset_all("stopping")
        while not pending.done:
            self._beat()
            self._selector.select(_TICK_SECONDS)
            self._drain_wake()
            if self._channel in (key.fileobj for key in self._selector.get_map().values()):
                self._selector.unregister(self._channel)
        restored = all(hand.target_mhz == DEFAULT_CLOCKS for hand in self._hands)
        self._send(Reply(Say.GOODBYE, flags=int(restored)))
        self._log("actuator_stopped", clocks_restored=restored)
        return 0 if restored else 1

    def _note_change(self, change: ClockChange) -> None:
        self._log.change(change)  # on the hand's thread
        self._changes.append(change)

    def _note_ended(self, grant: Grant, why: str) -> None:
        self._log("lease_ended", "warning", owner=grant.owner, gpu_uuids=grant.gpu_uuids, why=why)
        self._send(Reply(Say.ENDED, epoch=grant.epoch, text=why))

    def _stop(self, number: int, _: object) -> None:
        self._ending = self._ending or signal.Signals(number).name

    def _beat(self) -> None:
        """Say that this thread runs, whatever a driver does; the supervisor listens."""
        if self._pulse >= 0:
            os.eventfd_write(self._pulse, 1)

    def _ring(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _drain_wake(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return


def _work_or_die(hand: Hand, ring: Callable[[], None]) -> None:
    """A GPU without a hand would never be reset: better that the supervisor does it."""
    try:
        hand.work_for_ever(ring)
    finally:
        os._exit(70)
