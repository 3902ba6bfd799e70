"""`FeatureSpace.build` compiled: one shape after the other, with nothing in between.

The definition is in `predictors.features` and `predictors.analytic`; a property test holds both to
the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from predictors.active_experts import LOG_TABLE_TOKENS, TABLE_TOKENS
from predictors.analytic import (
    COMMUNICATION_BYTES_PER_SECOND,
    SECONDS_PER_SEQUENCE,
    TERMS,
)
from predictors.elementary import compiled
from predictors.prediction import SHAPE_COLUMNS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from predictors.features import FeatureSpace

_TERMS_COUNT = len(TERMS)
_LEAST_TABLE_TOKENS = float(TABLE_TOKENS[0])


class _Constants(NamedTuple):
    """What a space multiplies and compares with, in the order of the array that holds it."""

    log_missed: float  # of one expert by one token, uniform router; 0 where all are active
    experts_count: float
    active_experts_ratio: float
    ranks_count: float
    spread: float
    full_pair_flops: float
    windowed_pair_flops: float
    full_kv_bytes: float
    windowed_kv_bytes: float
    window_tokens: float
    bytes_per_expert: float
    expert_flops_per_token: float
    projection_bytes: float
    flops_per_token: float
    flops_per_logit: float
    communication_bytes: float
    activation_bytes: float
    seconds_per_flop: float
    seconds_per_attention_flop: float
    seconds_per_byte: float
    seconds_per_sequence: float
    fixed_seconds: float
    moe_fixed_seconds: float
    mla_fixed_seconds: float
    block_fixed_seconds: float


(
    _LOG_MISSED,
    _EXPERTS,
    _ACTIVE_RATIO,
    _RANKS,
    _SPREAD,
    _FULL_PAIR_FLOPS,
    _WINDOWED_PAIR_FLOPS,
    _FULL_KV_BYTES,
    _WINDOWED_KV_BYTES,
    _WINDOW,
    _BYTES_PER_EXPERT,
    _EXPERT_FLOPS,
    _PROJECTION_BYTES,
    _FLOPS_PER_TOKEN,
    _FLOPS_PER_LOGIT,
    _COMMUNICATION_BYTES,
    _ACTIVATION_BYTES,
    _PER_FLOP,
    _PER_ATTENTION_FLOP,
    _PER_BYTE,
    _PER_SEQUENCE,
    _FIXED,
    _MOE_FIXED,
    _MLA_FIXED,
    _BLOCK_FIXED,
) = range(len(_Constants._fields))


class CompiledFeatures:
    """Builds the features of one space, and what both bases make of its terms.

    Args:
        space: One whose attention runs as a whole; see `can_build`.
        parts: Weights of the latency base, (6, T).
        work: Weights of the power base, (J, T).
    """

    def __init__(
        self, space: FeatureSpace, parts: NDArray[np.float64], work: NDArray[np.float64]
    ) -> None:
        self._constants = np.array(_Constants(**space.constants()))
        table = space.active_experts_table
        self._table = np.empty(0) if table is None else table
        self._weights = np.ascontiguousarray(np.vstack([parts, work]))
        self._parts_count = len(parts)
        self._features_count = len(space.features)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What `build_features` takes after the shapes; the counts of features and of parts."""
        return (
            self._constants,
            self._table,
            self._weights,
            self._features_count,
            self._parts_count,
        )

    def build(
        self, shapes: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]] | None:
        """Features (F, K), parts (6, K) and work (J, K) of (K, 7) shapes; None if not allowed."""
        if shapes.ndim != 2 or shapes.shape[1] != len(SHAPE_COLUMNS):
            return None
        features = np.empty((self._features_count, len(shapes)), dtype=np.float32)
        weighed = np.empty((len(self._weights), len(shapes)))
        constants, table, weights = self.arguments[:3]
        if not build_features(shapes, constants, table, weights, features, weighed):
            return None
        return features, weighed[: self._parts_count], weighed[self._parts_count :]


@compiled
def build_features(
    shapes: NDArray[np.float64],
    constants: NDArray[np.float64],
    table: NDArray[np.float64],
    weights: NDArray[np.float64],
    features: NDArray[np.float32],
    weighed: NDArray[np.float64],
) -> bool:
    """Fill features and weighed terms; False where a shape is not allowed."""
    experts, ranks = constants[_EXPERTS], constants[_RANKS]
    terms = np.empty(_TERMS_COUNT)
    for row in range(len(shapes)):
        shape = shapes[row]
        requests, prefill, prefill_kv, decoding = shape[0], shape[1], shape[2], shape[3]
        decode_kv, decode, pairs = shape[4], shape[5], shape[6]
        tokens = prefill + decode
        whole = requests + prefill + prefill_kv + decoding + decode_kv + decode + pairs
        if not tokens > 0.0 or not np.isfinite(whole):
            return False
        # FeatureSpace.work
        if len(table):
            log_tokens = np.log(max(tokens, _LEAST_TABLE_TOKENS))
            place = np.searchsorted(LOG_TABLE_TOKENS, log_tokens, side="right") - 1
            low = min(place, len(table) - 2)
            start, end = LOG_TABLE_TOKENS[low], LOG_TABLE_TOKENS[low + 1]
            share = (min(log_tokens, end) - start) / (end - start)
            active = table[low] + (table[low + 1] - table[low]) * share
        elif constants[_LOG_MISSED] < 0.0:
            active = -experts * np.expm1(tokens * constants[_LOG_MISSED])
        else:
            active = experts
        if constants[_ACTIVE_RATIO] != 1.0:
            active = min(active * constants[_ACTIVE_RATIO], experts)
        fullest = active
        if ranks > 1.0:
            fullest = active / ranks
            missed = 1.0 - active / experts
            fullest = fullest + constants[_SPREAD] * np.sqrt(fullest * missed)
            fullest = min(fullest, experts / ranks)
        attention_flops = pairs * constants[_FULL_PAIR_FLOPS]
        kv_bytes = (decode_kv + prefill_kv + tokens) * constants[_FULL_KV_BYTES]
        if constants[_WINDOWED_KV_BYTES] > 0.0:
            window = constants[_WINDOW]
            attention_flops += min(pairs, prefill * window) * constants[_WINDOWED_PAIR_FLOPS]
            near = min(decode_kv + prefill_kv, (decoding + requests) * window)
            kv_bytes += (near + tokens) * constants[_WINDOWED_KV_BYTES]
        expert_bytes = fullest * constants[_BYTES_PER_EXPERT]
        expert_flops = tokens * constants[_EXPERT_FLOPS]
        logits = decode + requests
        projection_flops = (
            tokens * constants[_FLOPS_PER_TOKEN] + logits * constants[_FLOPS_PER_LOGIT]
        )
        sequences = decoding + requests
        # Roofline.terms, in the order of TERMS
        terms[0] = constants[_FIXED]
        terms[1] = sequences * SECONDS_PER_SEQUENCE
        terms[2] = kv_bytes * constants[_PER_BYTE]
        terms[3] = expert_bytes * constants[_PER_BYTE]
        terms[4] = expert_flops * constants[_PER_FLOP]
        terms[5] = constants[_PROJECTION_BYTES] * constants[_PER_BYTE]
        terms[6] = projection_flops * constants[_PER_FLOP]
        terms[7] = attention_flops * constants[_PER_ATTENTION_FLOP]
        terms[8] = tokens * constants[_COMMUNICATION_BYTES] / COMMUNICATION_BYTES_PER_SECOND
        terms[9] = constants[_MOE_FIXED]
        terms[10] = constants[_MLA_FIXED]
        terms[11] = constants[_BLOCK_FIXED]
        terms[12] = sequences * constants[_PER_SEQUENCE]
        terms[13] = tokens * constants[_ACTIVATION_BYTES] * constants[_PER_BYTE]
        # FeatureSpace._features, in the order of FEATURES
        memory = terms[2] + terms[3] + terms[5]
        compute = terms[4] + terms[6] + terms[7]
        total = memory + compute + terms[0]
        features[0, row] = 1.0
        for column in range(6):
            features[1 + column, row] = shape[column]
        features[7, row] = tokens
        features[8, row] = decode_kv / max(decoding, 1.0)
        features[9, row] = pairs
        features[10, row] = active
        features[11, row] = fullest
        features[12, row] = tokens / active
        features[13, row] = expert_bytes + constants[_PROJECTION_BYTES]
        features[14, row] = kv_bytes
        features[15, row] = expert_flops + projection_flops + attention_flops
        features[16, row] = compute
        features[17, row] = memory
        features[18, row] = compute / total
        features[19, row] = memory / total
        for part in range(len(weights)):
            summed = 0.0
            for term in range(_TERMS_COUNT):
                summed += weights[part, term] * terms[term]
            weighed[part, row] = summed
    return True
