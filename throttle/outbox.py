"""What waits to be sent to the daemon, and what a new stream must be told; no network, no threads.

The newest state wins: it replaces a plan or heartbeat that was not sent yet. Completed iterations
are not replaced but wait in a short line. No request event is lost by either.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from typing import TypeAlias

    #: Engine time of an event, and the event.
    _StampedEvent: TypeAlias = tuple[float, engine_pb2.RequestEvent]

#: Most events of overtaken states that wait for a slow stream. Beyond it the client starts a new
#: stream, which tells the daemon of every live request anew, so that nothing is lost.
CARRIED_EVENTS_LIMIT = 16_384

#: Most completed iterations that wait for a slow stream; beyond it the oldest is dropped. They are
#: what predictors learn from. Of other states only the newest waits.
COMPLETED_STATES_LIMIT = 256

#: Most unfinished requests remembered for a new stream; beyond it the oldest is forgotten. An
#: engine that reports the end of its requests stays far below.
LIVE_REQUESTS_LIMIT = 65_536

_ENDED = (
    engine_pb2.REQUEST_EVENT_KIND_FINISHED,
    engine_pb2.REQUEST_EVENT_KIND_ABORTED,
)


class _Pending:
    """A state that waits to be sent, and the events of those it overtook."""

    __slots__ = ("earlier", "state")

    def __init__(self, state: engine_pb2.IterationState) -> None:
        self.state = state
        self.earlier: list[_StampedEvent] = []

    def own_events(self) -> list[_StampedEvent]:
        now = self.state.engine_time_seconds
        return [(now - event.age_seconds, event) for event in self.state.request_events]


class Outbox:
    """States to be sent and requests that live; its user holds a lock around each call.

    Args:
        carried_events_limit: See `CARRIED_EVENTS_LIMIT`.
        completed_states_limit: See `COMPLETED_STATES_LIMIT`; 0 keeps only the newest state.

    Raises:
        ValueError: A limit is out of range.
    """

    def __init__(self, carried_events_limit: int, completed_states_limit: int) -> None:
        if carried_events_limit < 1:
            raise ValueError(f"carried_events_limit is {carried_events_limit}; allowed: 1 or more")
        if completed_states_limit < 0:
            raise ValueError(
                f"completed_states_limit is {completed_states_limit}; allowed: 0 or more"
            )
        self._carried_events_limit = carried_events_limit
        self._completed_states_limit = max(completed_states_limit, 1)
        self._pending: deque[_Pending] = deque()
        self._carried_count = 0
        self._live: dict[int, dict[int, _StampedEvent]] = {}
        self.overtaken_count = 0

    @property
    def empty(self) -> bool:
        """Whether no state waits."""
        return not self._pending

    def __len__(self) -> int:
        """States that wait."""
        return len(self._pending)

    def put(self, state: engine_pb2.IterationState, *, connected: bool) -> bool:
        """Add a state.

        Args:
            state: The newest one.
            connected: Whether a stream lives; without one only the newest state is kept.

        Returns:
            Whether so many events wait that a new stream, which tells of every live request, is
            better than this one.
        """
        newer = _Pending(state)
        if self._pending:
            if not connected:
                self.overtaken_count += 1
                self._forget(self._pending.pop())
            elif self._pending[-1].state.phase != engine_pb2.ITERATION_PHASE_COMPLETED:
                newer.earlier = self._overtake(self._pending.pop())
            elif len(self._pending) >= self._completed_states_limit:
                earlier = self._overtake(self._pending.popleft())
                following = self._pending[0] if self._pending else newer
                following.earlier = earlier + following.earlier
        self._pending.append(newer)
        return self._carried_count > self._carried_events_limit

    def take(self, *, replay: bool) -> engine_pb2.IterationState:
        """The next message to send: a state, before its own events those it has to bring along.

        Args:
            replay: Whether it is the first of a stream, which is told of every live request.
        """
        pending = self._pending.popleft()
        earlier: list[_StampedEvent] = []
        if replay:
            known = (stamped for kinds in self._live.values() for stamped in kinds.values())
            earlier.extend(sorted(known, key=lambda stamped: stamped[0]))
        earlier.extend(pending.earlier)
        composed = _with_earlier_events(pending.state, earlier) if earlier else pending.state
        self._forget(pending)
        return composed

    def disconnect(self) -> None:
        """The stream has ended: the newest state alone is worth the next one's time."""
        while len(self._pending) > 1:
            self.overtaken_count += 1
            self._forget(self._pending.popleft())
        for pending in self._pending:
            self._remember_earlier(pending)

    def _overtake(self, overtaken: _Pending) -> list[_StampedEvent]:
        """The events that the state after this one has to bring along."""
        self.overtaken_count += 1
        events = overtaken.own_events()
        self._carried_count += len(events)
        return overtaken.earlier + events

    def _forget(self, pending: _Pending) -> None:
        """Drop a state; a new stream will tell of the requests that it spoke of."""
        self._remember_earlier(pending)
        for event_time, event in pending.own_events():
            self._remember(event_time, event)

    def _remember_earlier(self, pending: _Pending) -> None:
        self._carried_count -= len(pending.earlier)
        for event_time, event in pending.earlier:
            self._remember(event_time, event)
        pending.earlier = []

    def _remember(self, event_time: float, event: engine_pb2.RequestEvent) -> None:
        number = event.request_number
        if event.kind in _ENDED:
            self._live.pop(number, None)
            return
        if event.kind == engine_pb2.REQUEST_EVENT_KIND_ARRIVED:
            kinds = self._live.setdefault(number, {})
            if len(self._live) > LIVE_REQUESTS_LIMIT:
                del self._live[next(iter(self._live))]
        elif number in self._live:
            kinds = self._live[number]
        else:
            return
        copy = engine_pb2.RequestEvent()  # a reference would keep the whole old state in memory
        copy.CopyFrom(event)
        kinds[event.kind] = (event_time, copy)


def _with_earlier_events(
    state: engine_pb2.IterationState, earlier: list[tuple[float, engine_pb2.RequestEvent]]
) -> engine_pb2.IterationState:
    composed = engine_pb2.IterationState()
    composed.CopyFrom(state)
    del composed.request_events[:]
    for event_time, event in earlier:
        copy = composed.request_events.add()
        copy.CopyFrom(event)
        # also turns the age of an event with an absurd time into one that the daemon accepts
        copy.age_seconds = max(0.0, state.engine_time_seconds - event_time)
    composed.request_events.extend(state.request_events)
    return composed
