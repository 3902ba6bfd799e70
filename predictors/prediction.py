"""The contract between whoever predicts and whoever decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
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
)


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
    """

    prefill_requests_count: float = 0.0
    prefill_tokens: float = 0.0
    prefill_kv_tokens: float = 0.0
    decode_requests_count: float = 0.0
    decode_kv_tokens: float = 0.0
    decode_tokens: float = 0.0

    def row(self) -> tuple[float, ...]:
        """Values in the order of `SHAPE_COLUMNS`."""
        return (
            self.prefill_requests_count,
            self.prefill_tokens,
            self.prefill_kv_tokens,
            self.decode_requests_count,
            self.decode_kv_tokens,
            self.decode_tokens,
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
        """Predict a (K, 6) matrix of shapes, columns as in `SHAPE_COLUMNS`, at every clock.

        Latency never rises and power never falls with clock. A row of zeros (no work) is not
        allowed.
        """
        ...

    def covers(self, shapes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell, per shape, whether it lies inside the range seen in training, shape (K,)."""
        ...
