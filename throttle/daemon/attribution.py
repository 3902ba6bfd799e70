"""Whose energy it was: every joule of a GPU's counter goes to one engine, one request, or neither.

The parts always sum to the counter. Energy is taken from a GPU in the order of time: what was drawn
before an iteration began is the engine's idling, what was drawn while it ran belongs to the
requests in it, in proportion to the tokens that it computed for each. That is a convention, not
physics: a prompt token and a generated one do not cost the same, but they share every weight read.
"""

from __future__ import annotations

import collections
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from throttle.control.state import Phase
from throttle.daemon.request_shares import RequestEnergy, RequestShares

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from throttle.control.state import IterationState

#: Finished requests that are kept to be shown.
_RECENT_COUNT: Final = 32
#: Stretches of energy that wait for an iteration; beyond it the oldest two become one.
_SEGMENTS_LIMIT: Final = 1024
#: Iterations that wait for energy (a GPU that cannot be read); beyond it the oldest is settled. Ten
#: seconds of a fast engine: each is kept whole, so that many engines' would fill the memory.
_ITERATIONS_LIMIT: Final = 512
#: Engines that are gone and whose total is still known; beyond it the oldest is forgotten.
_ENGINES_LIMIT: Final = 1024


@dataclass(frozen=True, slots=True)
class EngineEnergy:
    """What one engine's GPUs drew, in parts.

    Attributes:
        requests_joules: Given to requests.
        idle_joules: Drawn between iterations.
        unassigned_joules: Drawn by iterations of which the engine did not say whose they were.
        pending_joules: Drawn, and not given to any of these yet.
        requests_count: Requests that ended.
        recent_requests: The last of them, oldest first.
    """

    requests_joules: float = 0.0
    idle_joules: float = 0.0
    unassigned_joules: float = 0.0
    pending_joules: float = 0.0
    requests_count: int = 0
    recent_requests: tuple[RequestEnergy, ...] = ()

    @property
    def total_joules(self) -> float:
        """The sum of the parts: the engine's share of its GPUs' counters."""
        return (
            self.requests_joules + self.idle_joules + self.unassigned_joules + self.pending_joules
        )


@dataclass(slots=True)
class _Segment:
    """Energy drawn evenly between two moments."""

    start_seconds: float
    end_seconds: float
    joules: float


class _Track:
    """What one GPU drew and nobody has been given yet, in the order of time."""

    def __init__(self) -> None:
        self.segments: collections.deque[_Segment] = collections.deque()
        self.until_seconds = float("-inf")

    def add(self, segment: _Segment) -> None:
        self.segments.append(segment)
        self.until_seconds = segment.end_seconds
        if len(self.segments) > _SEGMENTS_LIMIT:
            first, second = self.segments.popleft(), self.segments.popleft()
            self.segments.appendleft(
                _Segment(first.start_seconds, second.end_seconds, first.joules + second.joules)
            )

    def take(self, until_seconds: float) -> float:
        """The energy up to a moment, which is gone from here then."""
        taken = 0.0
        while self.segments and self.segments[0].start_seconds < until_seconds:
            segment = self.segments[0]
            if segment.end_seconds <= until_seconds:
                taken += segment.joules
                self.segments.popleft()
                continue
            length = segment.end_seconds - segment.start_seconds
            part = segment.joules * (until_seconds - segment.start_seconds) / length
            segment.joules -= part
            segment.start_seconds = until_seconds
            taken += part
        return taken

    @property
    def joules(self) -> float:
        return sum(segment.joules for segment in self.segments)


class EngineLedger:
    """One engine's energy. Thread safe; `note` is cheap, and the rest is done by who samples."""

    def __init__(
        self,
        engine_id: str,
        gpu_uuids: Iterable[str],
        on_request: Callable[[RequestEnergy], None] = lambda _: None,
    ) -> None:
        """Nothing drawn yet.

        Args:
            engine_id: Its name.
            gpu_uuids: Its GPUs.
            on_request: Told of every request that ended.
        """
        self.engine_id = engine_id
        self.gpu_uuids = tuple(gpu_uuids)
        self._on_request = on_request
        self._lock = threading.Lock()
        self._noted: collections.deque[tuple[IterationState, float]] = collections.deque()
        self._tracks = {uuid: _Track() for uuid in self.gpu_uuids}
        self._shares = RequestShares()
        self._recent: collections.deque[RequestEnergy] = collections.deque(maxlen=_RECENT_COUNT)
        self._requests_count = 0
        self._requests_joules = self._idle_joules = self._unassigned_joules = 0.0

    def note(self, state: IterationState, seconds: float) -> None:
        """Take in a state, in the order they came.

        Args:
            state: It.
            seconds: When it was sent, on the clock of `add`.
        """
        self._noted.append((state, seconds))
        if len(self._noted) > _ITERATIONS_LIMIT:
            with self._lock:
                self._settle_one()

    def add(self, gpu_uuid: str, start_seconds: float, end_seconds: float, joules: float) -> None:
        """Take in what one GPU drew between two moments, each beginning where the last ended."""
        with self._lock:
            self._tracks[gpu_uuid].add(_Segment(start_seconds, end_seconds, joules))
            self._settle()

    def close(self) -> EngineEnergy:
        """Settle everything: what no iteration has claimed was idling."""
        with self._lock:
            while self._noted:
                self._settle_one()
            self._idle_joules += self._take(float("inf"))
            return self._energy()

    def energy(self) -> EngineEnergy:
        """The parts, as far as they are settled."""
        with self._lock:
            return self._energy()

    def _energy(self) -> EngineEnergy:
        return EngineEnergy(
            self._requests_joules,
            self._idle_joules,
            self._unassigned_joules,
            sum(track.joules for track in self._tracks.values()),
            self._requests_count,
            tuple(self._recent),
        )

    def _settle(self) -> None:
        """Settle the states whose time every GPU's energy is known for."""
        known = min(track.until_seconds for track in self._tracks.values())
        while self._noted and self._noted[0][1] <= known:
            self._settle_one()

    def _settle_one(self) -> None:
        state, seconds = self._noted.popleft()
        self._shares.advance(state)
        if state.phase is Phase.HEARTBEAT:
            self._idle_joules += self._take(seconds)
        elif state.phase is Phase.COMPLETED:
            self._idle_joules += self._take(seconds - (state.iteration_duration_seconds or 0.0))
            joules = self._take(seconds)
            if self._shares.share_out(joules):
                self._requests_joules += joules
            else:
                self._unassigned_joules += joules
        for ended in self._shares.end(state):
            self._requests_count += 1
            self._recent.append(ended)
            self._on_request(ended)

    def _take(self, until_seconds: float) -> float:
        return sum(track.take(until_seconds) for track in self._tracks.values())


@dataclass(frozen=True, slots=True)
class GpuEnergy:
    """What one GPU drew since the first sample.

    Attributes:
        counted_joules: By its counter.
        unattributed_joules: Of that, while no engine was connected.
    """

    counted_joules: float = 0.0
    unattributed_joules: float = 0.0


@dataclass(slots=True)
class _Account:
    seconds: float
    joules: float
    counted_joules: float = 0.0
    unattributed_joules: float = 0.0


class EnergyBook:
    """Divides what GPUs draw among the engines on them. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accounts: dict[str, _Account] = {}
        self._ledgers: list[EngineLedger] = []
        self._closed: dict[str, float] = {}

    def open(
        self,
        engine_id: str,
        gpu_uuids: Sequence[str],
        on_request: Callable[[RequestEnergy], None] = lambda _: None,
    ) -> EngineLedger:
        """An engine comes: from now on its GPUs' energy is its own, or shared with those there."""
        ledger = EngineLedger(engine_id, gpu_uuids, on_request)
        with self._lock:
            self._ledgers.append(ledger)
        return ledger

    def close(self, ledger: EngineLedger) -> None:
        """An engine goes; a second call does nothing."""
        with self._lock:
            if ledger not in self._ledgers:
                return
            self._ledgers.remove(ledger)
            before = self._closed.pop(ledger.engine_id, 0.0)
            self._closed[ledger.engine_id] = before + ledger.close().total_joules
            if len(self._closed) > _ENGINES_LIMIT:
                del self._closed[next(iter(self._closed))]

    def sample(self, gpu_uuid: str, seconds: float, joules: float) -> None:
        """Take in a GPU's counter.

        Args:
            gpu_uuid: The GPU.
            seconds: When, on a clock that never falls.
            joules: The counter, which never falls; the first sample of a GPU sets its zero.
        """
        with self._lock:
            account = self._accounts.get(gpu_uuid)
            if account is None:
                self._accounts[gpu_uuid] = _Account(seconds, joules)
                return
            if seconds <= account.seconds:
                return  # read twice within one update
            gained = max(0.0, joules - account.joules)
            start, account.seconds, account.joules = account.seconds, seconds, joules
            account.counted_joules += gained
            present = [ledger for ledger in self._ledgers if gpu_uuid in ledger.gpu_uuids]
            if not present:
                account.unattributed_joules += gained
            for ledger in present:
                ledger.add(gpu_uuid, start, seconds, gained / len(present))

    def gpu(self, gpu_uuid: str) -> GpuEnergy:
        """What one GPU drew."""
        with self._lock:
            account = self._accounts.get(gpu_uuid)
            if account is None:
                return GpuEnergy()
            return GpuEnergy(account.counted_joules, account.unattributed_joules)

    def engines(self) -> dict[str, float]:
        """Joules of every engine that is or was here, by id."""
        with self._lock:
            totals = dict(self._closed)
            for ledger in self._ledgers:
                so_far = totals.get(ledger.engine_id, 0.0)
                totals[ledger.engine_id] = so_far + ledger.energy().total_joules
            return totals
