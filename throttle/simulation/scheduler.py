"""Which work an engine's next step holds: continuous batching as vLLM v1 does it.

Each step schedules running requests in the order of their admission (one token for those that
generate, the rest of the budget for a prompt that is not yet computed), then admits waiting
requests first come, first served, as long as token budget, running limit and KV blocks allow. A
running request that finds no KV block takes those of the last admitted one, which waits again at
the head of the queue and is computed anew. A request gets its first token at the end of the step
that completes its prompt.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from throttle.control.state import QueuedRequests

if TYPE_CHECKING:
    from throttle.simulation.parameters import EngineParameters
    from throttle.simulation.requests import Request

_NO_QUEUE = QueuedRequests()


@dataclass(slots=True, eq=False)
class ServedRequest:
    """A request inside the engine.

    Attributes:
        request: What arrived.
        number: Its number.
        prompt: Its prompt tokens.
        output: Output tokens at which it ends.
        computed: Tokens in KV.
        generated: Output tokens so far.
        blocks: KV blocks that it holds.
        decoding: Whether each step gives it one token.
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


class Step:
    """What one step computes.

    Attributes:
        decoders: Requests that get one more token.
        contexts: Their tokens in KV before the step.
        prefills: Requests whose prompt is being computed.
        chunks: For each of them: tokens computed now, tokens in KV before.
        prompts: Their full prompt lengths.
        preempted: Requests that lost their KV while the step was scheduled.
    """

    __slots__ = ("chunks", "contexts", "decoders", "preempted", "prefills", "prompts")

    def __init__(self) -> None:
        self.decoders: list[ServedRequest] = []
        self.contexts = Moments()
        self.prefills: list[ServedRequest] = []
        self.chunks: list[tuple[int, int]] = []
        self.prompts = Moments()
        self.preempted: list[ServedRequest] = []


class Scheduler:
    """Keeps running and waiting requests and their KV blocks.

    Args:
        limits: Limits of the engine.
        kv_blocks_count: KV blocks that there are.
    """

    def __init__(self, limits: EngineParameters, kv_blocks_count: int) -> None:
        self._running_limit = limits.running_requests_limit
        self._tokens_limit = limits.batched_tokens_limit
        self._block_tokens = limits.kv_block_tokens
        self.kv_blocks_count = kv_blocks_count
        self.free_blocks_count = kv_blocks_count
        self.running: list[ServedRequest] = []
        self.waiting = WaitingQueue()

    @property
    def has_work(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self.running or self.waiting)

    def schedule(self) -> Step:
        """Choose the next step's work, and account for it as if it were done."""
        step = Step()
        running, block_tokens = self.running, self._block_tokens
        budget = self._tokens_limit
        decoders = step.decoders
        total = squares = 0
        index = 0
        while index < len(running) and budget:
            item = running[index]
            computed = item.computed
            if item.decoding:
                if computed % block_tokens == 0 and not self._grow(item, 1, step):
                    break  # it was the last one and lost its own blocks
                budget -= 1
                total += computed
                squares += computed * computed
                item.computed = computed + 1
                item.generated += 1
                decoders.append(item)
            else:
                tokens = min(item.prompt + item.generated - computed, budget)
                if not self._grow(item, self._missing_blocks(item, tokens), step):
                    break
                budget -= tokens
                self._prefill(item, tokens, step)
            index += 1
        contexts = step.contexts
        contexts.count, contexts.total, contexts.squares = len(decoders), total, squares
        if not step.preempted:
            self._admit(step, budget)
        return step

    def release(self, item: ServedRequest) -> None:
        """Take back the blocks of a request that has ended; `sweep` removes it."""
        self.free_blocks_count += item.blocks
        item.blocks = 0

    def sweep(self) -> None:
        """Remove released requests from the running ones."""
        self.running = [item for item in self.running if item.blocks]

    def _admit(self, step: Step, budget: int) -> None:
        waiting = self.waiting
        while waiting and budget and len(self.running) < self._running_limit:
            item = waiting.head()
            tokens = min(item.prompt + item.generated, budget)
            missing = self._missing_blocks(item, tokens)
            if missing > self.free_blocks_count:
                break
            waiting.pop()
            self.free_blocks_count -= missing
            item.blocks += missing
            self.running.append(item)
            budget -= tokens
            self._prefill(item, tokens, step)

    def _prefill(self, item: ServedRequest, tokens: int, step: Step) -> None:
        step.chunks.append((tokens, item.computed))
        step.prefills.append(item)
        step.prompts.add(item.prompt)
        item.computed += tokens

    def _missing_blocks(self, item: ServedRequest, tokens: int) -> int:
        return -(-(item.computed + tokens) // self._block_tokens) - item.blocks

    def _grow(self, item: ServedRequest, blocks: int, step: Step) -> bool:
        """Give a running request more blocks, from the last admitted ones if need be.

        Returns:
            False when the request itself was the last one and lost its blocks.
        """
        while blocks > self.free_blocks_count:
            victim = self.running.pop()
            self._preempt(victim, step)
            if victim is item:
                return False
        self.free_blocks_count -= blocks
        item.blocks += blocks
        return True

    def _preempt(self, item: ServedRequest, step: Step) -> None:
        self.release(item)
        item.computed = 0
        item.preemptions += 1
        self.waiting.put_first(item)
        step.preempted.append(item)
