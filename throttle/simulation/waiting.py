"""Requests inside the engine, and the queue in which they wait."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from throttle.control.state import QueuedRequests

if TYPE_CHECKING:
    from throttle.simulation.requests import Request

_NO_QUEUE = QueuedRequests()


@dataclass(slots=True, eq=False)
class ServedRequest:
    """A request inside the engine.

    Attributes:
        request: What arrived.
        number: Its number.
        prompt: Its prompt tokens.
        output: Output tokens at which it ends here.
        computed: Tokens in KV; before it is admitted, those that need not be computed.
        generated: Output tokens so far.
        blocks: KV blocks that it holds.
        decoding: Whether each step gives it a token.
        first_token_seconds: When it got its first token.
        last_token_seconds: When it got its last token before it was preempted.
        preemptions: Times that it lost its KV.
    """

    request: Request
    number: int
    prompt: int
    output: int
    computed: int = 0
    generated: int = 0
    blocks: int = 0
    decoding: bool = False
    first_token_seconds: float = 0.0
    last_token_seconds: float = 0.0
    preemptions: int = 0


class Moments:
    """Exact count, sum and sum of squares of whole numbers."""

    __slots__ = ("count", "squares", "total")

    def __init__(self) -> None:
        self.count = self.total = self.squares = 0

    def add(self, value: int, sign: int = 1) -> None:
        """Take a value in, or with sign -1 out again."""
        self.count += sign
        self.total += sign * value
        self.squares += sign * value * value

    def variance(self) -> float:
        """Population variance; 0 without values, never negative."""
        if not self.count:
            return 0.0
        return (self.squares * self.count - self.total * self.total) / (self.count * self.count)


class WaitingQueue:
    """First come, first served, with the sums that the engine reports kept up to date."""

    def __init__(self) -> None:
        self._items: deque[ServedRequest] = deque()
        self._fresh = Moments()
        self._preempted = Moments()

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._items)

    def head(self) -> ServedRequest:
        """The next to be admitted."""
        return self._items[0]

    def append(self, item: ServedRequest) -> None:
        """Queue a request that has arrived."""
        self._items.append(item)
        self._count(item, 1)

    def put_first(self, item: ServedRequest) -> None:
        """Queue a preempted request before all others."""
        self._items.appendleft(item)
        self._count(item, 1)

    def pop(self) -> ServedRequest:
        """Take the head out."""
        item = self._items.popleft()
        self._count(item, -1)
        return item

    def state(self) -> QueuedRequests:
        """What the engine says of it; preempted requests count as waiting to decode."""
        if not self._items:
            return _NO_QUEUE
        fresh, preempted = self._fresh, self._preempted
        return QueuedRequests(
            num_prefill_requests=fresh.count,
            sum_prefill_tokens=fresh.total,
            var_prefill_length=fresh.variance(),
            num_decode_requests=preempted.count,
            sum_decode_kv_tokens=preempted.total,
            var_decode_kv_tokens=preempted.variance(),
        )

    def _count(self, item: ServedRequest, sign: int) -> None:
        moments = self._preempted if item.generated else self._fresh
        moments.add(item.prompt + item.generated, sign)
