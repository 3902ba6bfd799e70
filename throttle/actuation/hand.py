"""One GPU's hand: every write to it passes through here, journalled, watched and read back.

Orders replace one another: the newest is done, the rest never happen. Driver calls are made by
`work` alone, on one thread per GPU, so that a call that hangs holds up its own GPU only.
"""

from __future__ import annotations

import enum
import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from throttle.actuation.backend import EventReason
from throttle.actuation.leases import DEFAULT_CLOCKS, UNKNOWN_CLOCKS
from throttle.errors import ActuationError, GpuDeniedError, GpuLostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from throttle.actuation.backend import ClockDriver
    from throttle.actuation.journal import Record
    from throttle.actuation.settings import ActuationSettings

#: Between two tries to return a GPU to default clocks, doubling from the first to the last.
_RETRY_SECONDS: Final = (0.5, 30.0)
#: Clocks this far above the target are no step of any GPU: another agent, or a lock that was lost.
_TOLERANCE_MHZ: Final = 30
#: The hardware protects itself: no time to hold it slow, or to judge a clock.
_SELF_PROTECTION: Final = (
    EventReason.HARDWARE_SLOWDOWN | EventReason.HARDWARE_THERMAL | EventReason.POWER_BRAKE
)
#: How often a drifted clock is set again before its GPU is left at default for a while.
_REASSERTIONS: Final = 2
_BACKOFF_SECONDS: Final = 60.0


class ClockState(enum.IntEnum):
    """A clock against what was asked for (values and meanings as in the protocol)."""

    UNKNOWN = 0
    DEFAULT = 1
    REQUESTED = 2
    CONVERGED = 3
    CAPPED = 4
    DRIFTED = 5
    UNSUPPORTED = 6


@dataclass(frozen=True, slots=True)
class ClockChange:
    """One write to one GPU.

    Attributes:
        owner: Whose lease it was; empty for a reset without one.
        gpu_uuid: The GPU.
        from_mhz: Target before; 0 means default clocks, -1 unknown.
        to_mhz: Target now; 0 means default clocks, -1 unknown: the write failed.
        duration_seconds: How long the write took.
        why: What it was done for.
        problem: Why it failed; empty when it did not.
    """

    owner: str
    gpu_uuid: str
    from_mhz: int
    to_mhz: int
    duration_seconds: float
    why: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """What a GPU is to be told next; orders count up."""

    number: int
    target_mhz: int
    owner: str
    why: str
    force: bool = False  # write even what seems to be in force


class Hand:
    """One GPU. `want` and the attributes are for every thread, `work` for one at a time."""

    def __init__(
        self,
        uuid: str,
        backend: ClockDriver,
        record: Record,
        *,
        settings: ActuationSettings,
        clock: Callable[[], float],
        tell: Callable[[ClockChange], None],
    ) -> None:
        """Touch nothing yet; the first order is to go to default clocks.

        Args:
            uuid: The GPU.
            backend: The driver.
            record: The GPU's journal.
            settings: Times.
            clock: Monotonic seconds.
            tell: Told of every write, on the thread that works.
        """
        self.uuid = uuid
        self.record = record
        self.target_mhz = UNKNOWN_CLOCKS  # told last, and obeyed as far as the driver says
        self.done_number = -1
        self.failure = ""  # of the order done last
        self.problem = ""  # why the GPU cannot be relied on
        self.denial = backend.refusal(uuid)  # why it can never be set
        self.read_back = ClockState.REQUESTED  # what reading the last target showed
        self.drifts_count = 0
        self.busy_since_seconds: float | None = None
        self._backend = backend
        self._settings = settings
        self._clock = clock
        self._tell = tell
        self._condition = threading.Condition()
        self._working = threading.Lock()
        self._order = Order(0, DEFAULT_CLOCKS, "", "start")
        self._retry_at_seconds, self._retry_seconds = math.inf, _RETRY_SECONDS[0]
        self._look_at_seconds = math.inf
        self._look_device_seconds: float | None = None
        self._reassertions = 0
        self._backed_off_until_seconds = -math.inf

    def want(self, target_mhz: int, owner: str, why: str, *, force: bool = False) -> int:
        """Replace the order; returns its number at once, whatever the driver does."""
        with self._condition:
            number = self._order.number + 1
            self._order = Order(number, target_mhz, owner, why, force)
            self._condition.notify_all()
        return number

    def hung_seconds(self, now_seconds: float) -> float:
        """How long beyond its deadline a driver call has been running; 0 when none is."""
        since = self.busy_since_seconds
        if since is None:
            return 0.0
        return max(0.0, now_seconds - since - self._settings.call_deadline_seconds)

    @property
    def clock_state(self) -> ClockState:
        """What is known of the clock."""
        if self.denial:
            return ClockState.UNSUPPORTED
        if self.target_mhz == UNKNOWN_CLOCKS:
            return ClockState.UNKNOWN
        return ClockState.DEFAULT if self.target_mhz == DEFAULT_CLOCKS else self.read_back

    def stays_at_default(self, now_seconds: float) -> bool:
        """Whether another agent or a slowdown of the hardware was found lately."""
        return now_seconds < self._backed_off_until_seconds

    def work(self) -> float:
        """Do what is due with the driver.

        Returns:
            When to work again unless a new order comes, by the clock; infinity for never.
        """
        with self._working:
            order = self._order
            if order.number != self.done_number:
                self._obey(order)
            elif self._clock() >= self._retry_at_seconds:
                self._reset(order.owner, "retry")
            elif self._clock() >= self._look_at_seconds:
                self._look(order)
            return min(self._retry_at_seconds, self._look_at_seconds)

    def work_for_ever(self, tell_done: Callable[[], None]) -> None:
        """Work as orders and times come; the body of the GPU's own thread."""
        while True:
            due = self.work()
            tell_done()
            with self._condition:
                if self._order.number == self.done_number:
                    wait = None if due == math.inf else max(0.0, due - self._clock())
                    self._condition.wait(wait)

    def _obey(self, order: Order) -> None:
        failure = ""
        if self.denial and not self.record.left_slow:
            self.target_mhz = DEFAULT_CLOCKS  # it is not ours to write, and we never did
        elif order.target_mhz == DEFAULT_CLOCKS or self.denial:
            if self.target_mhz != DEFAULT_CLOCKS or order.force:
                failure = self._reset(order.owner, order.why)
        elif order.target_mhz != self.target_mhz:
            self._reassertions = 0
            failure = self._set(order)
            if failure:
                self._reset(order.owner, "set_failed")
        self.failure = failure
        self.done_number = order.number

    def _set(self, order: Order) -> str:
        clock_mhz, failure = order.target_mhz, ""
        if self.target_mhz in {DEFAULT_CLOCKS, UNKNOWN_CLOCKS}:
            failure = self._note(lambda: self.record.intend(clock_mhz))
        failure = failure or self._call(
            order.owner,
            order.why,
            clock_mhz,
            lambda: self._backend.set_maximum_clock(self.uuid, clock_mhz),
        )
        failure = failure or self._note(lambda: self.record.mark(clock_mhz))
        if not failure:
            self._retry_at_seconds = math.inf
            self._look_at_seconds = self._clock() + self._settings.settle_seconds
            self._look_device_seconds = None
            self.read_back = ClockState.REQUESTED
        return failure

    def _note(self, write: Callable[[], None]) -> str:
        """Write to the journal; returns why it failed, or nothing."""
        try:
            write()
        except OSError as error:
            return f"GPU {self.uuid}: its record cannot be written: {error.strerror}"
        return ""

    def _reset(self, owner: str, why: str) -> str:
        self._look_at_seconds, self.read_back = math.inf, ClockState.REQUESTED
        failure = self._call(
            owner, why, DEFAULT_CLOCKS, lambda: self._backend.reset_clock(self.uuid)
        )
        if failure and self.denial and not self.record.left_slow:
            self._retry_at_seconds = math.inf  # it can only be read here; nothing of ours to undo
            self.target_mhz = DEFAULT_CLOCKS
        elif failure:
            self._retry_at_seconds = self._clock() + self._retry_seconds
            self._retry_seconds = min(2.0 * self._retry_seconds, _RETRY_SECONDS[1])
            self.problem = failure
        else:
            self._retry_at_seconds, self._retry_seconds = math.inf, _RETRY_SECONDS[0]
            self.problem = self._note(self.record.clear)
        return failure

    def _call(self, owner: str, why: str, target_mhz: int, call: Callable[[], None]) -> str:
        """One write; returns why it failed, or nothing."""
        before, started = self.target_mhz, self._clock()
        self.target_mhz = UNKNOWN_CLOCKS  # until the write is known to have worked
        self.busy_since_seconds = started
        failure = ""
        try:
            call()
        except ActuationError as error:
            failure = str(error)
            if isinstance(error, GpuDeniedError):
                self.denial = failure
            if isinstance(error, GpuLostError):
                self._retry_seconds = _RETRY_SECONDS[1]
        except Exception as error:  # noqa: BLE001 - a driver's surprise ends as any other failure
            failure = f"GPU {self.uuid}: {type(error).__name__}: {error}"
        else:
            self.target_mhz = target_mhz
        finally:
            self.busy_since_seconds = None
        self._tell(
            ClockChange(
                owner, self.uuid, before, self.target_mhz, self._clock() - started, why, failure
            )
        )
        return failure

    def _look(self, order: Order) -> None:
        """Compare the clock with the target; a lock that is gone is set again, or given up."""
        now = self._clock()
        self._look_at_seconds = now + self._settings.settle_seconds
        self.busy_since_seconds = now
        try:
            reading = self._backend.read_clock(self.uuid)
        except ActuationError:
            self.read_back = ClockState.REQUESTED
            return
        finally:
            self.busy_since_seconds = None
        if reading.time_seconds is not None:  # the device's own time must pass, not ours
            if self._look_device_seconds is None:
                self._look_device_seconds = reading.time_seconds
            since = reading.time_seconds - self._look_device_seconds
            if since < self._settings.settle_seconds:
                return
        if reading.event_reasons & _SELF_PROTECTION:
            self._back_off(order, "hardware_slowdown")
        elif reading.event_reasons & EventReason.IDLE:
            self.read_back = ClockState.REQUESTED
        elif reading.clock_mhz <= self.target_mhz + _TOLERANCE_MHZ:
            near = reading.clock_mhz >= self.target_mhz - _TOLERANCE_MHZ
            self.read_back = ClockState.CONVERGED if near else ClockState.CAPPED
        else:
            self._correct(order)

    def _correct(self, order: Order) -> None:
        self.drifts_count += 1
        self._reassertions += 1
        if self._reassertions > _REASSERTIONS:
            self._back_off(order, "drifted")
        elif failure := self._set(Order(order.number, self.target_mhz, order.owner, "drifted")):
            self.failure = failure
            self._reset(order.owner, "set_failed")
        self.read_back = ClockState.DRIFTED

    def _back_off(self, order: Order, why: str) -> None:
        self._backed_off_until_seconds = self._clock() + _BACKOFF_SECONDS
        self._reset(order.owner, why)
