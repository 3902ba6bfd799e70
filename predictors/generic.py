"""Features that mean the same for every model and GPU, so that trees may carry over.

Absolute figures (tokens, bytes, seconds) tell models apart; shares of the roofline's time and
dimensionless figures of load, model and GPU tell situations apart. The generic bundle's trees see
only the latter, and correct the bases in logarithms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from predictors.features import FeatureSpace, Work

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

#: Feature name -> unit. The first is the clock, as in `predictors.features.FEATURES`.
GENERIC_FEATURES: dict[str, str] = {
    "clock_ratio": "clock / maximum clock",
    "compute_ratio": "compute / whole roofline time",
    "memory_ratio": "memory / whole roofline time",
    "expert_memory_ratio": "expert reads / whole roofline time",
    "kv_memory_ratio": "KV reads / whole roofline time",
    "expert_compute_ratio": "expert FLOP time / whole roofline time",
    "attention_compute_ratio": "prompt attention / whole roofline time",
    "sequences_ratio": "cost of sequences / whole roofline time",
    "communication_ratio": "all-reduces / whole roofline time",
    "log_layer_seconds": "log(roofline time / fixed time)",
    "active_experts_ratio": "active / all experts",
    "log_tokens_per_active_expert": "log(tokens / expert)",
    "log_tokens": "log(tokens)",
    "log_decode_requests": "log(1 + requests)",
    "prefill_tokens_ratio": "prompt tokens / tokens",
    "log_mean_decode_kv_tokens": "log(1 + tokens / request)",
    "log_expert_width": "log(expert's inner width on one GPU)",
    "log_hidden_size": "log(width)",
    "weight_bytes": "bytes / expert weight",
    "expert_parallel_count": "GPUs",
    "log_machine_balance": "log(FLOP / byte)",
    "log_power_limit": "log(W)",
}


class GenericSpace(FeatureSpace):
    """Turns shapes into `GENERIC_FEATURES` for one model on one kind of GPU."""

    @property
    def features(self) -> Mapping[str, str]:
        """Feature name -> unit, in order."""
        return GENERIC_FEATURES

    def _features(
        self, columns: NDArray[np.float64], work: Work, terms: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        model, gpu, spread = self.architecture, self.gpu, self.parallelism
        (
            fixed,
            sequences,
            kv,
            expert_memory,
            expert_compute,
            projection,
            compute,
            attention,
            wire,
        ) = terms[:9]
        total = terms[:9].sum(axis=0)
        tokens = columns[1] + columns[5]
        cut = max(1, spread.tensor_parallel_count // spread.expert_parallel_count)
        features = np.empty((len(GENERIC_FEATURES), len(tokens)), dtype=np.float32)
        features[0] = 1.0
        features[1] = (expert_compute + compute + attention) / total
        features[2] = (kv + expert_memory + projection) / total
        features[3] = expert_memory / total
        features[4] = kv / total
        features[5] = expert_compute / total
        features[6] = attention / total
        features[7] = sequences / total
        features[8] = wire / total
        features[9] = np.log(total / fixed)
        features[10] = work.active_experts_count / model.experts_count
        features[11] = np.log(tokens / work.active_experts_count)
        features[12] = np.log(tokens)
        features[13] = np.log1p(columns[3])
        features[14] = columns[1] / tokens
        features[15] = np.log1p(columns[4] / np.maximum(columns[3], 1.0))
        features[16] = np.log(model.expert_intermediate_size / cut)
        features[17] = np.log(model.hidden_size)
        features[18] = model.weight_bytes
        features[19] = spread.expert_parallel_count
        features[20] = np.log(gpu.bf16_flops / gpu.memory_bytes_per_second)
        features[21] = np.log(gpu.power_limit_watts)
        return features
