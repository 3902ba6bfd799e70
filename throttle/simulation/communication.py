"""Time on the links between the GPUs of one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from throttle.errors import InvalidInputError
from throttle.simulation.operator_tables import axis_factors

if TYPE_CHECKING:
    from predictors.architecture import ModelArchitecture
    from throttle.simulation.parameters import GpuParameters

_ELEMENT_BYTES = 2.0  # activations travel in bf16 ...
_DISPATCH_BYTES = 1.0  # ... and in fp8 on the way to their experts


class Communication:
    """All-reduce of tensor-parallel layers; dispatch and combine of spread experts.

    `g t0 + bytes / link` each. With all GPUs tensor-parallel every layer reduces twice. Otherwise
    replicas of the attention send each token to its k experts and gather the results: n k H bytes
    there in fp8, twice that back (DeepEP's low-latency kernels). Reductions carry a measured
    correction; they show a step between 128k and 512k elements on 8 GPUs.

    Args:
        gpu: GPU kind.
        model: Dimensions.
        ranks: Tensor-parallel GPUs.
        gpus: All GPUs of the engine.
        tokens_limit: Most tokens of one replica's step.

    Raises:
        InvalidInputError: The GPU has no figures for this many GPUs.
    """

    def __init__(
        self,
        gpu: GpuParameters,
        model: ModelArchitecture,
        ranks: int,
        gpus: int,
        tokens_limit: int,
    ) -> None:
        layers = model.layers_count
        reductions = 2 * layers if ranks == gpus else layers + model.dense_layers_count
        tokens = np.arange(tokens_limit + 1, dtype=np.float64)
        fixed, moving = np.zeros_like(tokens), np.zeros_like(tokens)
        if ranks > 1:
            if str(ranks) not in gpu.all_reduce:
                raise InvalidInputError(
                    "parallelism.tensor_parallel_count",
                    ranks,
                    f"1, {', '.join(gpu.all_reduce)} in [all_reduce] of {gpu.name}",
                )
            figures = gpu.all_reduce[str(ranks)]
            size = np.maximum(tokens, 1.0) * model.hidden_size * _ELEMENT_BYTES
            factors = reductions * axis_factors(gpu.name, "all_reduce", (), (ranks,), size)
            fixed += factors * figures.fixed_seconds
            moving += factors * size / figures.bytes_per_second
        if ranks < gpus:
            figures_ = gpu.all_to_all
            if figures_ is None:
                raise InvalidInputError(
                    "parallelism.expert_parallel_count",
                    gpus,
                    f"at most tensor_parallel_count: {gpu.name} has no [all_to_all] figures",
                )
            size = tokens * model.experts_per_token * model.hidden_size * _DISPATCH_BYTES
            there = size / figures_.dispatch_bytes_per_second
            back = size * _ELEMENT_BYTES / figures_.combine_bytes_per_second
            count = model.moe_layers_count
            fixed += count * (figures_.dispatch_seconds + figures_.combine_seconds)
            moving += count * (there + back)
        self._fixed, self._moving = fixed.tolist(), moving.tolist()
        self._limit = tokens_limit

    def seconds(self, tokens: int) -> tuple[float, float]:
        """Start-up time, of which a share follows the clock, and transfer time, which does not.

        Args:
            tokens: Of one replica.
        """
        if tokens <= self._limit:
            return self._fixed[tokens], self._moving[tokens]
        return self._fixed[-1], self._moving[-1] * tokens / self._limit
