"""What became of the requests: one record each, and a histogram of token gaps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from throttle.simulation.waiting import ServedRequest

_BINS_PER_FACTOR_E = 100  # bins are 1 % wide
_LOWEST_SECONDS = 1e-4


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """A finished request; simulated.

    Attributes:
        request_number: The engine's number for it.
        arrival_seconds: When it arrived.
        prompt_tokens: Length of its prompt.
        output_tokens: Tokens generated.
        ttft_seconds: From arrival to the first token.
        tpot_seconds: Mean gap between tokens; None with a single token.
        e2e_seconds: From arrival to the last token.
        preemptions_count: Times that it lost its KV.
    """

    request_number: int
    arrival_seconds: float
    prompt_tokens: int
    output_tokens: int
    ttft_seconds: float
    tpot_seconds: float | None
    e2e_seconds: float
    preemptions_count: int


def outcome_of(item: ServedRequest, now_seconds: float) -> RequestOutcome:
    """What became of a request that ends now."""
    gaps = item.generated - 1
    arrived = item.request.arrival_seconds
    return RequestOutcome(
        request_number=item.number,
        arrival_seconds=arrived,
        prompt_tokens=item.prompt,
        output_tokens=item.generated,
        ttft_seconds=item.first_token_seconds - arrived,
        tpot_seconds=(now_seconds - item.first_token_seconds) / gaps if gaps else None,
        e2e_seconds=now_seconds - arrived,
        preemptions_count=item.preemptions,
    )


class GapHistogram:
    """Gaps between two tokens of a request, in bins 1 % wide; memory does not grow with time."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._total = 0

    def add(self, gap_seconds: float, count: int) -> None:
        """Count the same gap so many times."""
        ratio = max(gap_seconds, _LOWEST_SECONDS) / _LOWEST_SECONDS
        index = int(math.log(ratio) * _BINS_PER_FACTOR_E)
        self._counts[index] = self._counts.get(index, 0) + count
        self._total += count

    @property
    def count(self) -> int:
        """Gaps seen."""
        return self._total

    def quantile_seconds(self, ratio: float) -> float:
        """The gap that a share `ratio` of all gaps does not exceed, to 1 %; 0 without gaps."""
        wanted = ratio * self._total
        seen = 0
        for index in sorted(self._counts):
            seen += self._counts[index]
            if seen >= wanted:
                return float(_LOWEST_SECONDS * math.exp((index + 0.5) / _BINS_PER_FACTOR_E))
        return 0.0
