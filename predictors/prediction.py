"""The contract between whoever predicts and whoever decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, overload

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Columns of a shape matrix, in order. A shape says what one iteration computes; values may be
#: fractional, since projections hold expectations.
SHAPE_COLUMNS: tuple[str, ...] = (
    "prefill_requests_count",  # requests whose prompt is computed in this iteration
    "prefill_tokens",  # prompt tokens that it computes
    "prefill_kv_tokens",  # tokens of those prompts already in KV
    "decode_requests_count",  # requests that generate
    "decode_kv_tokens",  # their context lengths, summed
    "decode_tokens",  # tokens they feed: one each without speculative decoding
    "prefill_attention_pairs",  # query-key pairs of the prompts: new * (in KV + new / 2), summed
)


@overload
def estimated_attention_pairs(requests: float, tokens: float, kv_tokens: float) -> float: ...


@overload
def estimated_attention_pairs(
    requests: NDArray[np.float64], tokens: NDArray[np.float64], kv_tokens: NDArray[np.float64]
) -> NDArray[np.float64]: ...


def estimated_attention_pairs(
    requests: NDArray[np.float64] | float,
    tokens: NDArray[np.float64] | float,
    kv_tokens: NDArray[np.float64] | float,
) -> NDArray[np.float64] | float:
    """Query-key pairs of prompts of which only sums are known: as if all computed equally much.

    It then does not matter which of them has how much in KV.

    Args:
        requests: Prompts being computed.
        tokens: Prompt tokens computed, summed.
        kv_tokens: Tokens of those prompts already in KV, summed.
    """
    return tokens * (kv_tokens + 0.5 * tokens) / np.maximum(requests, 1.0)


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The work of one iteration, as a row of a shape matrix.

    Attributes:
        prefill_requests_count: Requests whose prompt is computed in this iteration.
        prefill_tokens: Prompt tokens that the iteration computes.
        prefill_kv_tokens: Tokens of those prompts already in KV.
        decode_requests_count: Requests that generate.
        decode_kv_tokens: Their context lengths, summed, in tokens.
        decode_tokens: Tokens they feed; equal to their number without speculative decoding.
        prefill_attention_pairs: Query-key pairs of the prompts; None to estimate them.
    """

    prefill_requests_count: float = 0.0
    prefill_tokens: float = 0.0
    prefill_kv_tokens: float = 0.0
    decode_requests_count: float = 0.0
    decode_kv_tokens: float = 0.0
    decode_tokens: float = 0.0
    prefill_attention_pairs: float | None = None

    def row(self) -> tuple[float, ...]:
        """Values in the order of `SHAPE_COLUMNS`."""
        pairs = self.prefill_attention_pairs
        if pairs is None:
            pairs = estimated_attention_pairs(
                self.prefill_requests_count, self.prefill_tokens, self.prefill_kv_tokens
            )
        return (
            self.prefill_requests_count,
            self.prefill_tokens,
            self.prefill_kv_tokens,
            self.decode_requests_count,
            self.decode_kv_tokens,
            self.decode_tokens,
            float(pairs),
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """Latency and power of K shapes at C clocks; every array is (K, C), clocks rising.

    Attributes:
        latency_seconds: Expected duration of one iteration.
        latency_upper_seconds: Calibrated one-sided upper bound of that duration, never below it.
        power_watts: Expected power of one GPU, averaged over the iteration.
    """

    latency_seconds: NDArray[np.float64]
    latency_upper_seconds: NDArray[np.float64]
    power_watts: NDArray[np.float64]


class Predictor(Protocol):
    """Predicts iterations of one model on one kind of GPU at every candidate clock."""

    @property
    def clocks_mhz(self) -> NDArray[np.int64]:
        """Candidate clocks in MHz, rising, shape (C,)."""
        ...

    @property
    def idle_power_watts(self) -> NDArray[np.float64]:
        """Power of one idle GPU with a live context at each clock, shape (C,)."""
        ...

    def predict(self, shapes: NDArray[np.float64]) -> Prediction:
        """Predict a (K, 7) matrix of shapes, columns as in `SHAPE_COLUMNS`, at every clock.

        Latency never rises and power never falls with clock. A row of zeros (no work) is not
        allowed.
        """
        ...

    def covers(self, shapes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell, per shape, whether it lies inside the range seen in training, shape (K,)."""
        ...
