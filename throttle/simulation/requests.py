"""One request as a workload brings it."""

from __future__ import annotations

from dataclasses import dataclass

from throttle.control.state import Slos

_NO_SLOS = Slos()


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the workload brings it.

    Attributes:
        request_number: Unique, 1 or more.
        arrival_seconds: When it arrives.
        prompt_tokens: 1 or more.
        output_tokens: Tokens that it will generate, 1 or more; the engine does not tell them.
        max_output_tokens: Limit that the client set, which the engine tells.
        slos: Its own limits.
        cached_tokens: Prompt tokens that are in the prefix cache when it arrives; None leaves it to
            the engine's hit ratio.
        length_class: Class that its length is learned with.
    """

    request_number: int
    arrival_seconds: float
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int | None = None
    slos: Slos = _NO_SLOS
    length_class: str = ""
    cached_tokens: int | None = None
