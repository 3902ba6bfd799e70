"""What each request of one engine has drawn: energy by tokens, over all iterations it was in.

From one iteration to the next nearly always the same requests run, so their counts are kept as
arrays for as long as they do: a handful of array operations an iteration, whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from throttle.control.state import EventKind, Phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from throttle.control.state import IterationState, RequestEvent, RequestProgress

#: Requests that are followed at once; beyond it the oldest is forgotten, its energy is not.
REQUESTS_LIMIT: Final = 65_536
_ENDS: Final = (EventKind.FINISHED, EventKind.ABORTED)


@dataclass(frozen=True, slots=True)
class RequestEnergy:
    """A request that ended.

    Attributes:
        request_number: As the engine calls it.
        energy_joules: Its share of every iteration it was in.
        tokens_count: Tokens computed for it, of prompt and answer, anew ones included.
    """

    request_number: int
    energy_joules: float
    tokens_count: int


@dataclass(slots=True)
class _Request:
    prompt_tokens: int = 0  # in KV as far as known
    generated_tokens: int = 0
    tokens_count: int = 0
    joules: float = 0.0


@dataclass(slots=True)
class _Running:
    """The same of requests that run together, (n,) each."""

    numbers: Sequence[int]
    prompt_tokens: NDArray[np.int64]
    generated_tokens: NDArray[np.int64]
    tokens_count: NDArray[np.int64]
    joules: NDArray[np.float64]


class RequestShares:
    """Follows one engine's requests, state by state."""

    def __init__(self) -> None:
        self._requests: dict[int, _Request] = {}
        self._running: _Running | None = None  # newer than what `_requests` says of the same
        self._last_numbers: Sequence[int] = ()
        self._grown: NDArray[np.int64] | dict[int, int] = {}

    def advance(self, state: IterationState) -> None:
        """Take in how many tokens a state's iteration computed for each request."""
        progress = state.progress if state.phase is Phase.COMPLETED else None
        if not state.request_events:
            if progress is None:
                self._grown = {}
                return
            numbers = progress.request_numbers
            if self._running is None and numbers and numbers == self._last_numbers:
                self._running = self._together(numbers)  # twice the same: likely to go on
            if self._running is not None and numbers == self._running.numbers:
                self._grown = _grow(self._running, progress)
                return
        self._spread()
        self._grown = self._advance_singly(state.request_events, progress)
        if progress is not None:
            self._last_numbers = progress.request_numbers

    def share_out(self, joules: float) -> bool:
        """Give energy to whom the last state's iteration computed for; False if for nobody."""
        if isinstance(self._grown, dict):
            total = sum(self._grown.values())
            if total:
                for number, count in self._grown.items():
                    request = self._follow(number)
                    request.joules += joules * count / total
                    request.tokens_count += count
            return total > 0
        total = int(self._grown.sum())
        if total and self._running is not None:
            self._running.joules += joules * self._grown / total
            self._running.tokens_count += self._grown
        return total > 0

    def end(self, state: IterationState) -> list[RequestEnergy]:
        """The requests that a state says have ended, which are followed no more."""
        ended = []
        for event in state.request_events:
            if event.kind in _ENDS:
                request = self._requests.pop(event.request_number, None)
                if request is not None:
                    ended.append(
                        RequestEnergy(event.request_number, request.joules, request.tokens_count)
                    )
        return ended

    def _advance_singly(
        self, events: Sequence[RequestEvent], progress: RequestProgress | None
    ) -> dict[int, int]:
        grown: dict[int, int] = {}
        for event in events:
            if event.kind is EventKind.ARRIVED:  # cached tokens are nobody's work
                self._follow(event.request_number).prompt_tokens = event.cached_tokens
            elif event.kind is EventKind.PREEMPTED:  # computed anew
                self._follow(event.request_number).prompt_tokens = 0
        if progress is not None:
            for number, prompt, generated in zip(
                progress.request_numbers,
                progress.computed_prompt_tokens,
                progress.generated_tokens,
                strict=True,
            ):
                request = self._follow(number)
                count = max(0, prompt - request.prompt_tokens)
                count += max(0, generated - request.generated_tokens)
                request.prompt_tokens, request.generated_tokens = prompt, generated
                if count:
                    grown[number] = count
        for event in events:
            if event.kind in _ENDS:  # it may have grown without running any more
                request = self._follow(event.request_number)
                count = event.generated_tokens - request.generated_tokens
                if count > 0:
                    before = grown.get(event.request_number, 0)
                    grown[event.request_number] = before + count
        return grown

    def _together(self, numbers: Sequence[int]) -> _Running:
        requests = [self._follow(number) for number in numbers]
        return _Running(
            numbers,
            np.array([each.prompt_tokens for each in requests], np.int64),
            np.array([each.generated_tokens for each in requests], np.int64),
            np.array([each.tokens_count for each in requests], np.int64),
            np.array([each.joules for each in requests], np.float64),
        )

    def _spread(self) -> None:
        """Back to one by one: somebody comes, goes, or is told of by an event."""
        running, self._running = self._running, None
        if running is None:
            return
        rows = zip(
            running.numbers,
            running.prompt_tokens.tolist(),
            running.generated_tokens.tolist(),
            running.tokens_count.tolist(),
            running.joules.tolist(),
            strict=True,
        )
        for number, prompt, generated, tokens, joules in rows:
            request = self._follow(number)
            request.prompt_tokens, request.generated_tokens = prompt, generated
            request.tokens_count, request.joules = tokens, joules

    def _follow(self, number: int) -> _Request:
        if number not in self._requests:
            if len(self._requests) >= REQUESTS_LIMIT:
                del self._requests[next(iter(self._requests))]
            self._requests[number] = _Request()
        return self._requests[number]


def _grow(running: _Running, progress: RequestProgress) -> NDArray[np.int64]:
    """Tokens computed for each since the state before, (n,)."""
    prompt = np.array(progress.computed_prompt_tokens, np.int64)
    generated = np.array(progress.generated_tokens, np.int64)
    grown: NDArray[np.int64] = np.maximum(prompt - running.prompt_tokens, 0)
    grown += np.maximum(generated - running.generated_tokens, 0)
    running.prompt_tokens, running.generated_tokens = prompt, generated
    return grown
