"""Which work an engine's next step holds: continuous batching as vLLM v1 does it.

Each step schedules running requests in the order of their admission (one token for those that
generate, the rest of the budget for a prompt that is not yet computed), then admits waiting
requests first come, first served, as long as token budget, running limit and KV blocks allow. A
running request that finds no KV block takes those of the last admitted one, which waits again at
the head of the queue and is computed anew. A request gets its first token at the end of the step
that completes its prompt.

With speculative decoding a generating request feeds its drafts too, as far as token budget and KV
cache go, and gains those that are accepted; blocks taken for rejected drafts stay its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from throttle.simulation.waiting import Moments, WaitingQueue

if TYPE_CHECKING:
    from throttle.simulation.parameters import EngineParameters
    from throttle.simulation.speculation import Speculation
    from throttle.simulation.waiting import ServedRequest


class Step:
    """What one step computes.

    Attributes:
        decoders: Requests that generate.
        draft_tokens: Tokens drafted for them.
        accepted_tokens: Drafts that became output; each of them gets one token besides.
        contexts: Their tokens in KV before the step.
        prefills: Requests whose prompt is being computed.
        chunks: For each of them: tokens computed now, tokens in KV before.
        prompts: Their full prompt lengths.
        preempted: Requests that lost their KV while the step was scheduled.
    """

    __slots__ = (
        "accepted_tokens",
        "chunks",
        "contexts",
        "decoders",
        "draft_tokens",
        "preempted",
        "prefills",
        "prompts",
    )

    def __init__(self) -> None:
        self.decoders: list[ServedRequest] = []
        self.draft_tokens = 0
        self.accepted_tokens = 0
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
        speculation: How drafts fare; None without speculative decoding.
    """

    def __init__(
        self,
        limits: EngineParameters,
        kv_blocks_count: int,
        speculation: Speculation | None = None,
    ) -> None:
        self._running_limit = limits.running_requests_limit
        self._tokens_limit = limits.batched_tokens_limit
        self._block_tokens = limits.kv_block_tokens
        self._speculation = speculation
        self._kv_tokens_limit = kv_blocks_count * limits.kv_block_tokens
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
        speculation = self._speculation
        budget = self._tokens_limit
        decoders = step.decoders
        total = squares = 0
        index = 0
        while index < len(running) and budget:
            item = running[index]
            computed = item.computed
            if item.decoding:
                if speculation is None:
                    if computed % block_tokens == 0 and not self._grow(item, 1, step):
                        break  # it was the last one and lost its own blocks
                    fed = gained = 1
                else:
                    fed = 1 + self._drafts_count(item, budget)
                    if not self._grow(item, self._missing_blocks(item, fed), step):
                        break
                    gained = 1 + self._accept(item, fed - 1, step)
                budget -= fed
                total += computed
                squares += computed * computed
                item.computed = computed + gained
                item.generated += gained
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
            tokens = min(item.prompt + item.generated - item.computed, budget)
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

    def _drafts_count(self, item: ServedRequest, budget: int) -> int:
        """Drafts that a request feeds: what is configured, the budget and the KV cache allow."""
        assert self._speculation is not None  # noqa: S101 - asked only then
        room = self._kv_tokens_limit - item.computed
        return min(self._speculation.draft_tokens_count, budget - 1, room - 1)

    def _accept(self, item: ServedRequest, drafts: int, step: Step) -> int:
        """Drafts that a request keeps: those accepted, up to the end of its output."""
        assert self._speculation is not None  # noqa: S101 - asked only then
        left = item.output - item.generated - 1
        kept = min(self._speculation.accepted(drafts), left)
        step.draft_tokens += drafts
        step.accepted_tokens += kept
        return kept

    def _missing_blocks(self, item: ServedRequest, tokens: int) -> int:
        needed = -(-(item.computed + tokens) // self._block_tokens)
        return max(needed - item.blocks, 0)

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
