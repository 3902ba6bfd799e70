"""What one iteration's operators ask of a GPU, before any clock is chosen.

Each operator is its roofline equation (`throttle.simulation.equations`) times a measured correction
(`throttle.simulation.operator_tables`). Everything is for one GPU of the engine; where ranks
differ, time is that of the fullest rank and traffic for power that of the mean rank.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from predictors.architecture import DTYPE_BYTES
from throttle.errors import InvalidInputError
from throttle.simulation import attention, equations
from throttle.simulation.communication import Communication
from throttle.simulation.operator_tables import axis_factors
from throttle.simulation.power import small_tile_weight
from throttle.simulation.routing import routing_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from predictors.architecture import ModelArchitecture
    from throttle.simulation.equations import Numbers, Parts
    from throttle.simulation.parameters import PlantParameters

#: Weight formats that are unpacked on the fly and multiplied in bf16.
LOW_BIT = frozenset({"mxfp4", "int4", "nvfp4"})
#: Weight formats whose products are computed in bf16.
BF16_COMPUTED = LOW_BIT | {"bf16", "fp16"}


@dataclass(frozen=True, slots=True)
class IterationWork:
    """Exactly what one iteration computes.

    Attributes:
        prefill_chunks: For each prompt being computed: tokens of this chunk, tokens before it.
        decode_requests_count: Requests that generate one token each.
        decode_context_tokens: Tokens in KV that they attend to, summed.
        sampled_requests_count: Requests that get a token; None means all that take part.
        decode_tokens_count: Tokens that the generating requests feed, drafts included; None means
            one each.
    """

    prefill_chunks: Sequence[tuple[int, int]] = ()
    decode_requests_count: int = 0
    decode_context_tokens: int = 0
    sampled_requests_count: int | None = None
    decode_tokens_count: int | None = None


@dataclass(slots=True)
class Demand:
    """Times at full clock and counts that follow from the work; every time in seconds.

    Attributes:
        blended: Memory time, compute time and exponent index of operators whose two times blend
            as `(m^p + c^p)^(1/p)`; both times already raised to p.
        memory: Memory time that adds up.
        compute: Compute time that adds up.
        scaled_fixed: Fixed time of which a share follows the clock.
        communication: Time on the links between GPUs.
        gap: Time in which no kernel is resident: host work between two steps.
        traffic_bytes: Bytes moved to and from device memory, mean rank.
        tensor_seconds: Useful floating-point work over the full-clock peak, mean rank; work in
            small tiles weighs more.
        active_experts: Experts of one layer that at least one token selects.
    """

    blended: list[tuple[float, float, int]]
    memory: float
    compute: float
    scaled_fixed: float
    communication: float
    gap: float
    traffic_bytes: float
    tensor_seconds: float
    active_experts: float


class _Curves(NamedTuple):
    """One operator over its number of rows, all layers together; index: rows."""

    exponent_index: int
    fixed: array[float]
    memory: array[float]  # raised to the exponent, as is compute
    compute: array[float]
    moved: array[float]
    traffic: array[float]
    tensor: array[float]


class Operators:
    """Turns work into demand for one plant.

    Args:
        parameters: The plant.
        architecture: Dimensions of its model.
    """

    def __init__(self, parameters: PlantParameters, architecture: ModelArchitecture) -> None:
        self._gpu = parameters.gpu
        self._architecture = architecture
        self._parallelism = parameters.parallelism
        self._ranks = parameters.parallelism.tensor_parallel_count
        self._expert_ranks = parameters.parallelism.expert_parallel_count
        self._gpus = parameters.parallelism.gpus_count
        self._replicas = self._gpus // self._ranks
        check_parallelism(architecture, self._ranks, self._expert_ranks)
        self._tokens_limit = parameters.engine.batched_tokens_limit
        self._rows = np.arange(self._tokens_limit + 1, dtype=np.float64)
        #: Exponents of the blended operators, by the index that `Demand.blended` carries.
        self.exponents: tuple[float, ...] = ()
        self._routing = routing_table(
            architecture.experts_count,
            architecture.experts_per_token,
            parameters.behavior.routing_skew_exponent,
            self._expert_ranks,
            self._tokens_limit,
        )
        #: A model whose layers have one expert is dense: its blocks are plain GEMMs.
        self._moe_layers = architecture.moe_layers_count if architecture.experts_count > 1 else 0
        self._moe = self._moe_curves() if self._moe_layers else None
        self._gemms = self._gemm_curves()
        vocabulary = architecture.vocabulary_size // self._ranks
        self._head = self._gemm(1, vocabulary, architecture.hidden_size, "bf16")
        self._attention = attention.for_model(self._gpu, architecture, self._ranks)
        self._communication = Communication(
            self._gpu, architecture, self._ranks, self._gpus, self._tokens_limit
        )
        self._layer_fixed = architecture.layers_count * self._gpu.engine.layer_seconds

    @property
    def weight_bytes(self) -> float:
        """Bytes of the model's weights on one GPU."""
        model = self._architecture
        routed = model.moe_layers_count * model.experts_count * model.expert_weight_count
        if not self._moe_layers:  # a dense model's blocks are split like attention
            routed = 0
        rest = model.total_parameters_count - routed
        return (
            routed * model.weight_bytes / self._gpus
            + rest * model.attention_weight_bytes / self._ranks
        )

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes that one token's KV takes on one GPU that holds it."""
        return self._attention.kv_layer_bytes * self._architecture.layers_count

    @property
    def replicas_count(self) -> int:
        """Groups of GPUs that each hold the KV of their own requests."""
        return self._replicas

    def active_experts(self, tokens: int) -> float:
        """Experts of one layer that at least one of so many tokens selects."""
        return self._routing.active_experts[min(tokens, self._tokens_limit)]

    def demand(self, work: IterationWork) -> Demand:
        """What this work asks for. The work holds at least one token."""
        decodes, context = work.decode_requests_count, work.decode_context_tokens
        chunks: Sequence[tuple[int, int]] = work.prefill_chunks
        drafts = 0 if work.decode_tokens_count is None else work.decode_tokens_count - decodes
        tokens = decodes + drafts
        for chunk, _ in chunks:
            tokens += chunk
        requests = decodes + len(chunks)
        sampled = requests if work.sampled_requests_count is None else work.sampled_requests_count
        local = tokens
        mean = 1.0
        if self._replicas > 1:  # the fullest replica sets the time, the mean one the power
            chunks, decodes, context = self._fullest_replica(chunks, decodes, context)
            drafts = -(-drafts // self._replicas)
            local = decodes + drafts
            for chunk, _ in chunks:
                local += chunk
            mean = tokens / (self._replicas * local)
            sampled = -(-sampled // self._replicas)
        engine = self._gpu.engine
        demand = Demand(
            blended=[],
            memory=0.0,
            compute=0.0,
            scaled_fixed=self._layer_fixed + engine.sequence_seconds * sampled,
            communication=0.0,
            gap=engine.host_gap_seconds + engine.host_sequence_seconds * requests,
            traffic_bytes=0.0,
            tensor_seconds=0.0,
            active_experts=0.0,
        )
        limit = self._tokens_limit
        rows = min(limit, local)
        for curves in self._gemms:
            self._add(demand, curves, rows, local)
        scored = sampled + drafts
        if scored:
            self._add(demand, self._head, min(scored, limit), scored)
        self._attention.add(demand, chunks, decodes, context)
        if self._replicas > 1:
            demand.traffic_bytes *= mean
            demand.tensor_seconds *= mean
        if self._moe is not None:
            self._add(demand, self._moe, min(limit, tokens), tokens)
            demand.active_experts = self._routing.active_experts[min(tokens, limit)]
        if self._gpus > 1:
            fixed, demand.communication = self._communication.seconds(local)
            demand.scaled_fixed += fixed
        ratio = engine.composition_ratio
        demand.memory *= ratio
        demand.compute *= ratio
        return demand

    def _fullest_replica(
        self, chunks: Sequence[tuple[int, int]], decodes: int, context: int
    ) -> tuple[Sequence[tuple[int, int]], int, int]:
        """The share of the work that the fullest of the replicas does: requests are dealt."""
        replicas = self._replicas
        if len(chunks) > 1:
            chunks = sorted(chunks, reverse=True)[::replicas]
        return chunks, -(-decodes // replicas), -(-context // replicas)

    def _add(self, demand: Demand, curves: _Curves, index: int, rows: int) -> None:
        """Add one operator; rows beyond the curves' end scale its last entry."""
        kind = curves.exponent_index
        memory, compute, scale = curves.memory[index], curves.compute[index], 1.0
        if rows > index:
            scale = rows / index
            memory *= scale ** self.exponents[kind]
            compute *= scale ** self.exponents[kind]
        demand.blended.append((memory, compute, kind))
        demand.scaled_fixed += curves.fixed[index]
        demand.memory += curves.moved[index] * scale
        demand.traffic_bytes += curves.traffic[index] * scale
        demand.tensor_seconds += curves.tensor[index] * scale

    # -- what is computed once --------------------------------------------------------------------

    def _peak(self, weight_dtype: str) -> float:
        compute = self._gpu.compute
        wide = weight_dtype in BF16_COMPUTED
        return compute.bf16_flops_per_second if wide else compute.fp8_flops_per_second

    def _exponent_index(self, exponent: float) -> int:
        if exponent not in self.exponents:
            self.exponents = (*self.exponents, exponent)
        return self.exponents.index(exponent)

    def _curves(self, parts: Parts, factors: Numbers, count: int) -> _Curves:
        """An operator over its rows, all its layers together and corrected."""
        p = parts.exponent
        scale = factors * count
        blend = (scale * self._gpu.engine.composition_ratio) ** p
        columns = (
            scale * parts.fixed,
            blend * parts.memory**p,
            blend * parts.compute**p,
            scale * parts.moved,
            count * parts.traffic_bytes,
            count * parts.tensor_seconds,
        )
        return _Curves(
            self._exponent_index(p), *(array("d", column.tobytes()) for column in columns)
        )

    def _moe_curves(self) -> _Curves:
        """The MoE layers by tokens of the whole engine; time of the fullest rank."""
        model, gpu, n = self._architecture, self._gpu, self._rows
        dtype = model.weight_dtype
        if dtype not in gpu.moe:
            raise InvalidInputError("model.weight_dtype", dtype, f"{', '.join(gpu.moe)} in [moe]")
        split = self._gpus // self._expert_ranks  # GPUs that share each expert
        width = model.expert_intermediate_size / split
        active = np.array(self._routing.fullest_rank_active_experts)
        mean_pairs = n * model.experts_per_token / self._expert_ranks
        ratio = self._routing.fullest_rank_load_ratio
        hidden = float(model.hidden_size)
        parts = equations.moe(
            gpu.moe[dtype],
            np.full_like(n, hidden),
            np.full_like(n, width),
            model.weight_bytes,
            n,
            active,
            mean_pairs * ratio,
            self._peak(dtype),
            gpu.memory.bandwidth_bytes_per_second,
        )
        shape = (hidden, width, model.experts_count, model.experts_per_token, self._expert_ranks)
        axis = 2.0 ** np.arange(0.0, 14.5, 0.5)
        measured = axis_factors(gpu.name, "moe", (dtype,), shape, axis)
        factors = np.interp(np.log2(np.maximum(n, 1.0)), np.log2(axis), measured)
        mean_active = np.array(self._routing.active_experts) / self._expert_ranks
        share = np.divide(mean_active, active, out=np.ones_like(n), where=active > 0)
        rank_means = replace(
            parts,
            traffic_bytes=parts.traffic_bytes * share,
            tensor_seconds=parts.tensor_seconds * share,
        )
        return self._curves(rank_means, factors, self._moe_layers)

    def _gemm_curves(self) -> list[_Curves]:
        """The dense GEMMs of all layers, by tokens of one replica."""
        model, ranks = self._architecture, self._ranks
        hidden, layers = model.hidden_size, model.layers_count
        shapes: list[tuple[int, int, int]] = []
        if model.attention == "gqa":  # the measured block of MLA holds its projections
            kv_width = max(model.kv_heads_count // ranks, 1) * model.head_dimension
            query_width = model.attention_heads_count * model.head_dimension // ranks
            shapes += [(layers, query_width + 2 * kv_width, hidden), (layers, hidden, query_width)]
        blocks = [
            (model.dense_layers_count, model.dense_intermediate_size),
            (self._moe_layers, model.shared_intermediate_size),
        ]
        if not self._moe_layers:
            blocks.append((model.moe_layers_count, model.expert_intermediate_size))
        for count, width in blocks:
            if count and width:
                shapes += [(count, 2 * width // ranks, hidden), (count, hidden, width // ranks)]
        dense = "bf16" if model.attention_weight_bytes >= 2.0 else model.weight_dtype
        curves = [self._gemm(*shape, dense) for shape in shapes]
        if self._moe_layers:  # the router stays in bf16
            curves.append(self._gemm(self._moe_layers, model.experts_count, hidden, "bf16"))
        return curves

    def _gemm(self, count: int, columns: int, inner: int, dtype: str) -> _Curves:
        gpu, rows = self._gpu, self._rows
        parameters = gpu.gemm.get(dtype) or gpu.gemm["bf16"]
        parts = equations.gemm(
            parameters,
            rows,
            np.full_like(rows, columns),
            np.full_like(rows, inner),
            DTYPE_BYTES[dtype],
            self._peak(dtype),
            gpu.memory.bandwidth_bytes_per_second,
            gpu.compute.multiprocessors_count,
        )
        axis = 2.0 ** np.arange(15.0)
        measured = axis_factors(gpu.name, "gemm", (dtype,), (columns, inner), axis)
        factors = np.interp(np.log2(np.maximum(rows, 1.0)), np.log2(axis), measured)
        weight = small_tile_weight(gpu.power, rows)
        parts = replace(parts, tensor_seconds=parts.tensor_seconds * weight)
        return self._curves(parts, factors, count)


def check_parallelism(model: ModelArchitecture, ranks: int, expert_ranks: int) -> None:
    """Refuse counts of GPUs that cannot share this model.

    Raises:
        InvalidInputError: Naming the count.
    """
    if ranks < 1 or model.attention_heads_count % ranks:
        raise InvalidInputError(
            "parallelism.tensor_parallel_count",
            ranks,
            f"a divisor of the {model.attention_heads_count} attention heads of {model.name}",
        )
    gpus = max(ranks, expert_ranks)
    if (
        expert_ranks < 1
        or gpus % expert_ranks
        or gpus % ranks
        or model.experts_count % expert_ranks
    ):
        raise InvalidInputError(
            "parallelism.expert_parallel_count",
            expert_ranks,
            f"a divisor or multiple of tensor_parallel_count ({ranks}) and a divisor of "
            f"{model.experts_count} experts",
        )
