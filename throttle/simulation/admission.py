"""What an arriving request finds: the engine's role, its prefix cache, and whether it fits at all.

A prefill engine hands a request off after its first token. A decode engine gets prompts whose KV
another engine computed; like vLLM it computes the last prompt token again, and so produces the
first token itself. A request found in the prefix cache computes only the rest of its prompt, but
always its last token; hits come in whole blocks. Cached blocks are counted for each request that
uses them, as if none were shared.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from throttle.control.state import EventKind, RequestEvent, Role
from throttle.errors import InvalidInputError
from throttle.simulation.waiting import ServedRequest

if TYPE_CHECKING:
    from throttle.simulation.parameters import EngineParameters
    from throttle.simulation.requests import Request

ROLES: Final = {role.name.lower(): role for role in Role}
_RATIOS = ("prefix_cache_hit_ratio", "draft_acceptance_ratio")
_COUNTS = ("running_requests_limit", "batched_tokens_limit", "kv_block_tokens")


class Admission:
    """Turns what arrives into what the scheduler serves.

    Args:
        engine: Limits and options of the engine, checked.
        kv_tokens_limit: Tokens that the KV cache holds.
    """

    def __init__(self, engine: EngineParameters, kv_tokens_limit: int) -> None:
        self.role = ROLES[engine.role]
        self._hit_ratio = engine.prefix_cache_hit_ratio
        self._block_tokens = engine.kv_block_tokens
        self._kv_tokens_limit = kv_tokens_limit

    def admit(self, request: Request, now_seconds: float) -> tuple[ServedRequest, RequestEvent]:
        """The request as it will be served, and what the engine says of its arrival.

        Raises:
            InvalidInputError: It can never fit the KV cache, or says more cached tokens than its
                prompt has.
        """
        prompt, limit = request.prompt_tokens, request.max_output_tokens
        output = request.output_tokens
        if self.role is Role.PREFILL:
            output = limit = 1
        if prompt + output > self._kv_tokens_limit:
            raise InvalidInputError(
                f"request {request.request_number}: prompt_tokens + output_tokens",
                prompt + output,
                f"at most {self._kv_tokens_limit}, the tokens that the KV cache holds",
            )
        cached = prompt if self.role is Role.DECODE else self._prefix_hit(request)
        item = ServedRequest(
            request, request.request_number, prompt, output, computed=min(cached, prompt - 1)
        )
        event = RequestEvent(
            EventKind.ARRIVED,
            request.request_number,
            now_seconds - request.arrival_seconds,
            prompt_tokens=prompt,
            cached_tokens=cached,
            max_output_tokens=limit,
            slos=request.slos,
            length_class=request.length_class,
        )
        return item, event

    def _prefix_hit(self, request: Request) -> int:
        """Tokens found in the prefix cache: whole blocks, and never the last token."""
        prompt, told = request.prompt_tokens, request.cached_tokens
        if told is None:
            told = math.floor(prompt * self._hit_ratio)
        elif not 0 <= told <= prompt:
            raise InvalidInputError(
                f"request {request.request_number}: cached_tokens", told, f"0 to {prompt}"
            )
        return min(told, prompt - 1) // self._block_tokens * self._block_tokens


def check_engine(engine: EngineParameters) -> None:
    """Refuse limits and options with which no engine can run.

    Raises:
        InvalidInputError: Names the first of them.
    """
    if engine.role not in ROLES:
        raise InvalidInputError("engine.role", engine.role, ", ".join(ROLES))
    for name in _COUNTS:
        if getattr(engine, name) < 1:
            raise InvalidInputError(f"engine.{name}", getattr(engine, name), "1 or more")
    for name in _RATIOS:
        if not 0.0 <= getattr(engine, name) <= 1.0:
            raise InvalidInputError(f"engine.{name}", getattr(engine, name), "0 to 1")
    if engine.draft_tokens_count < 0:
        raise InvalidInputError("engine.draft_tokens_count", engine.draft_tokens_count, "0 or more")
