"""Reads GPUs at a steady pace, each on its own thread, so that nobody else waits for a driver.

A call that hangs stops the readings of its own GPU; who asks for them is told how old they are.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from throttle.errors import ActuationError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from throttle.actuation.backend import GpuReading

#: After a change of clock its GPU is read this often for this long: until the clock has settled.
_HURRY_INTERVAL_SECONDS: Final = 0.01
_HURRY_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading and when it was taken.

    Attributes:
        reading: What the GPU measured.
        seconds: By the reader's clock.
    """

    reading: GpuReading
    seconds: float


@dataclass(slots=True)
class _Latest:
    """What is known of one GPU; replaced whole, so that it is read without a lock."""

    sample: Sample | None = None
    failure: ActuationError | None = None  # of the last reading
    started_seconds: float | None = None  # of the reading that runs
    hurry_until_seconds: float = float("-inf")
    wake: threading.Event = field(default_factory=threading.Event)


class Sampler:
    """The newest reading of every GPU."""

    def __init__(
        self,
        read: Callable[[str], GpuReading],
        uuids: Iterable[str],
        clock: Callable[[], float],
        *,
        interval_seconds: float,
        stale_seconds: float,
        on_sample: Callable[[str, Sample], None] = lambda _uuid, _sample: None,
    ) -> None:
        """Nothing read yet.

        Args:
            read: Reads one GPU; called for one at a time by its own thread alone.
            uuids: GPUs to read.
            clock: Monotonic seconds.
            interval_seconds: From the start of one reading to the next.
            stale_seconds: A reading older than this is not given out.
            on_sample: Told of every reading, on the thread that took it.
        """
        self._read = read
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._stale_seconds = stale_seconds
        self._on_sample = on_sample
        self._latest = {uuid: _Latest() for uuid in uuids}
        self._stopping = threading.Event()

    def start(self) -> None:
        """Read every GPU, each from its own thread, until `stop`."""
        for uuid in self._latest:
            threading.Thread(
                target=self._sample_for_ever, args=(uuid,), name=f"sample {uuid}", daemon=True
            ).start()

    def stop(self) -> None:
        """Read no more. A thread inside a driver call is left to it: it may hang."""
        self._stopping.set()
        for latest in self._latest.values():
            latest.wake.set()

    def hurry(self, uuid: str) -> None:
        """Read this GPU at once and often for a while: its clock is about to change."""
        latest = self._entry(uuid)
        latest.hurry_until_seconds = self._clock() + _HURRY_SECONDS
        latest.wake.set()

    def latest(self, uuid: str) -> Sample:
        """The newest reading; never waits for the driver.

        Raises:
            NotFoundError: This GPU is not read here.
            ActuationError: There is none that is fresh; the message says why.
        """
        latest = self._entry(uuid)
        sample, now = latest.sample, self._clock()
        if sample is not None and now - sample.seconds <= self._stale_seconds:
            return sample
        started = latest.started_seconds
        if started is not None and now - started > self._stale_seconds:
            raise ActuationError(
                f"GPU {uuid} does not answer: a reading has been running for {now - started:.1f} s"
            )
        if latest.failure is not None:
            raise latest.failure
        raise ActuationError(f"GPU {uuid} has no reading of the last {self._stale_seconds:g} s")

    def read(self, uuid: str) -> GpuReading:
        """The newest reading, as a backend would give it.

        Raises:
            As `latest`.
        """
        return self.latest(uuid).reading

    def age_seconds(self, uuid: str) -> float | None:
        """How old the newest reading is, stale ones included; None before the first."""
        sample = self._entry(uuid).sample
        return None if sample is None else max(0.0, self._clock() - sample.seconds)

    def sample_once(self, uuid: str) -> None:
        """Read one GPU now, on this thread; a failure is kept for who asks."""
        latest = self._entry(uuid)
        latest.started_seconds = self._clock()
        try:
            sample = Sample(self._read(uuid), self._clock())
            latest.sample, latest.failure = sample, None
            self._on_sample(uuid, sample)
        except ActuationError as error:
            latest.failure = error
        except Exception as error:  # noqa: BLE001 - a surprise must not end the readings
            latest.failure = ActuationError(f"GPU {uuid}: {type(error).__name__}: {error}")
        finally:
            latest.started_seconds = None

    def _sample_for_ever(self, uuid: str) -> None:
        latest = self._latest[uuid]
        while not self._stopping.is_set():
            latest.wake.clear()
            started = self._clock()
            self.sample_once(uuid)
            hurried = started < latest.hurry_until_seconds
            interval = _HURRY_INTERVAL_SECONDS if hurried else self._interval_seconds
            # from start to start, but never two at once to catch up with a slow driver
            latest.wake.wait(max(0.0, started + interval - self._clock()))

    def _entry(self, uuid: str) -> _Latest:
        try:
            return self._latest[uuid]
        except KeyError:
            raise NotFoundError(
                f"GPU {uuid!r} is not among those that are read: {', '.join(self._latest)}"
            ) from None
