"""What one iteration's operators ask of a GPU, before any clock is chosen.

Equations: the project's roofline fits to the operator tables of NVIDIA aiconfigurator (Apache-2.0);
docs/plant.md holds them with their errors. Everything is for one GPU of the engine; where experts
are spread over GPUs, time is that of the fullest rank and traffic for power that of the mean rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from throttle.errors import InvalidInputError
from throttle.simulation.routing import routing_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from predictors.architecture import ModelArchitecture
    from throttle.simulation.parameters import (
        AllReduceParameters,
        MoeParameters,
        PlantParameters,
    )

_TILE = 128  # rows and columns of one GEMM output tile
_PADDED_ROWS = 64  # GEMM rows are padded to a multiple of this
_GROUPED_TILE_ROWS = 32  # token-expert pairs per expert at which half of a grouped tile is padding


@dataclass(frozen=True, slots=True)
class IterationWork:
    """Exactly what one iteration computes.

    Attributes:
        prefill_chunks: For each prompt being computed: tokens of this chunk, tokens before it.
        decode_requests_count: Requests that generate one token each.
        decode_context_tokens: Tokens in KV that they attend to, summed.
        sampled_requests_count: Requests that get a token; None means all that take part.
    """

    prefill_chunks: Sequence[tuple[int, int]] = ()
    decode_requests_count: int = 0
    decode_context_tokens: int = 0
    sampled_requests_count: int | None = None


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
        gap: Time in which no kernel is resident: host work and sampling.
        traffic_bytes: Bytes moved to and from device memory, mean rank.
        tensor_seconds: Useful floating-point work over the full-clock peak, mean rank; grouped
            GEMM weighs more.
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


@dataclass(frozen=True, slots=True)
class _Gemm:
    """One dense GEMM, with its repetitions in an iteration."""

    count: int
    weight_seconds: float
    row_seconds: float
    row_compute_seconds: float
    waves: tuple[float, ...]  # wave quantization by number of row tiles


class Operators:
    """Turns work into demand for one plant.

    Args:
        parameters: The plant.
        architecture: Dimensions of its model.
    """

    def __init__(self, parameters: PlantParameters, architecture: ModelArchitecture) -> None:
        self._gpu = gpu = parameters.gpu
        self._architecture = architecture
        self._ranks = parameters.parallelism.tensor_parallel_count
        self._expert_ranks = parameters.parallelism.expert_parallel_count
        self._tokens_limit = parameters.engine.batched_tokens_limit
        _check_parallelism(architecture, self._ranks, self._expert_ranks)
        self._bandwidth = gpu.memory.bandwidth_bytes_per_second
        self._ratio = gpu.engine.composition_ratio
        self._dense_peak = self._peak(architecture.attention_weight_bytes)
        self._attention_peak = gpu.compute.bf16_flops_per_second
        self._moe = _by_dtype(gpu.moe, architecture.weight_dtype, "moe")
        self._all_reduce = _by_ranks(gpu.all_reduce, self._ranks) if self._ranks > 1 else None
        #: Exponents of the blended operators, by the index that `Demand.blended` carries.
        self.exponents = (gpu.gemm.roofline_exponent, self._moe.roofline_exponent)
        self._prepare_routing(parameters.behavior.routing_skew_exponent)
        self._prepare_moe()
        self._prepare_attention()
        self._prepare_gemms()
        self._prepare_fixed()

    @property
    def weight_bytes(self) -> float:
        """Bytes of the model's weights on one GPU."""
        model = self._architecture
        routed = model.moe_layers_count * model.experts_count * model.expert_weight_count
        rest = model.total_parameters_count - routed
        return (routed * model.weight_bytes + rest * model.attention_weight_bytes) / self._ranks

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes that one token's KV takes on one GPU."""
        return self._kv_layer_bytes * self._architecture.layers_count

    def active_experts(self, tokens: int) -> float:
        """Experts of one layer that at least one of so many tokens selects."""
        return self._routing.active_experts[min(tokens, self._tokens_limit)]

    def demand(self, work: IterationWork) -> Demand:
        """What this work asks for. The work holds at least one token."""
        decodes = work.decode_requests_count
        tokens = decodes
        for chunk, _ in work.prefill_chunks:
            tokens += chunk
        requests = decodes + len(work.prefill_chunks)
        sampled = work.sampled_requests_count
        engine = self._gpu.engine
        demand = Demand(
            blended=[],
            memory=0.0,
            compute=0.0,
            scaled_fixed=self._fixed,
            communication=0.0,
            gap=engine.host_gap_seconds + engine.sequence_seconds * requests,
            traffic_bytes=0.0,
            tensor_seconds=0.0,
            active_experts=0.0,
        )
        for gemm in self._layer_gemms:
            self._add_gemm(demand, gemm, tokens)
        self._add_gemm(demand, self._head, requests if sampled is None else sampled)
        if self._moe_layers:
            self._add_moe(demand, tokens)
        if decodes:
            self._add_decode_attention(demand, decodes, work.decode_context_tokens)
        if work.prefill_chunks:
            self._add_prefill_attention(demand, work.prefill_chunks)
        if self._all_reduce is not None:
            size = tokens * self._all_reduce_bytes
            demand.communication = size / self._all_reduce.bytes_per_second
        demand.memory *= self._ratio
        demand.compute *= self._ratio
        return demand

    # -- operators -------------------------------------------------------------------------------

    def _add_gemm(self, demand: Demand, gemm: _Gemm, rows: int) -> None:
        """`(tm^p + tc^p)^(1/p)`; `tm = bytes / (BW em)`, `tc = 2 Mp N K / (C ec) wave^q`."""
        if rows == 0:
            return
        exponent = self.exponents[0]
        padded = -(-rows // _PADDED_ROWS) * _PADDED_ROWS
        tile = min(-(-rows // _TILE), len(gemm.waves) - 1)
        memory = gemm.weight_seconds + rows * gemm.row_seconds
        compute = padded * gemm.row_compute_seconds * gemm.waves[tile]
        scale = gemm.count * self._ratio
        demand.blended.append(((memory * scale) ** exponent, (compute * scale) ** exponent, 0))
        parameters = self._gpu.gemm
        demand.traffic_bytes += (
            gemm.count * memory * self._bandwidth * parameters.memory_efficiency_ratio
        )
        demand.tensor_seconds += (
            gemm.count * rows * gemm.row_compute_seconds * parameters.compute_efficiency_ratio
        )

    def _add_moe(self, demand: Demand, tokens: int) -> None:
        """`(tm^p + tc^p)^(1/p) + ca (T (2H + 3I) + n H) 2 / bw` per layer.

        `tm = A 3 H I wb / (bw em)`, `tc = 6 H I (T + A mpad) / (C ec)`; A and T are the active
        experts and the token-expert pairs of the rank.
        """
        n = min(tokens, self._tokens_limit)
        routing, layers = self._routing, self._moe_layers
        active = routing.fullest_rank_active_experts[n]
        mean_pairs = tokens * self._architecture.experts_per_token / self._expert_ranks
        pairs = mean_pairs * routing.fullest_rank_load_ratio
        memory = layers * active * self._expert_seconds
        compute = layers * (pairs + active * self._moe.padding_tokens) * self._pair_seconds
        exponent = self.exponents[1]
        if exponent == 1.0:
            demand.memory += memory
            demand.compute += compute
        else:
            demand.blended.append(
                ((memory * self._ratio) ** exponent, (compute * self._ratio) ** exponent, 1)
            )
        moved = layers * 2.0 * (pairs * self._pair_elements + tokens * self._hidden)
        demand.memory += self._moe.activation_traffic_ratio * moved / self._bandwidth
        mean_active = routing.active_experts[n] / self._expert_ranks
        demand.traffic_bytes += layers * mean_active * self._expert_bytes + moved
        waste = self._tile_waste / (1.0 + pairs / active / _GROUPED_TILE_ROWS)
        demand.tensor_seconds += layers * mean_pairs * self._pair_tensor_seconds * (1.0 + waste)
        demand.active_experts = routing.active_experts[n]

    def _add_decode_attention(self, demand: Demand, decodes: int, context: int) -> None:
        """`g t0 + (KV + s0 KV / (KV + 5 MB)) / (bw em) + cb B heads` per layer."""
        heads, rows_seconds = self._heads, self._decode_row_seconds
        for layers, window in self._attention_layers:
            read = min(context, decodes * window) if window else context
            kv = read * self._kv_layer_bytes
            extra = self._decode_extra_bytes * kv / (kv + 5e6)
            demand.memory += layers * (kv + extra) * self._decode_byte_seconds
            demand.scaled_fixed += layers * rows_seconds * decodes * heads
            demand.traffic_bytes += layers * kv
            demand.tensor_seconds += layers * read * self._context_flops / self._attention_peak
        demand.scaled_fixed += self._decode_fixed

    def _add_prefill_attention(self, demand: Demand, chunks: Sequence[tuple[int, int]]) -> None:
        """Causal attention of chunks: `4 S (context + S/2 + s0/2) heads hd / (C ec) + cm IO / bw`.

        A chunk of a whole prompt gives the fitted `2 S^2 heads hd (1 + s0 / S)`.
        """
        parameters = self._gpu.prefill_attention
        extra = parameters.extra_tokens / 2.0
        efficiency = self._attention_peak * parameters.compute_efficiency_ratio
        io_seconds = parameters.traffic_ratio / self._bandwidth
        for layers, window in self._attention_layers:
            pairs = spent = moved = 0.0
            for tokens, context in chunks:
                seen = context + tokens / 2.0
                if window and seen > window:
                    seen = window
                pairs += tokens * seen
                spent += tokens * (seen + extra)
                moved += tokens * self._query_bytes + context * self._kv_layer_bytes
            demand.compute += layers * spent * self._prefill_flops / efficiency
            demand.memory += layers * moved * io_seconds
            demand.traffic_bytes += layers * moved
            demand.tensor_seconds += layers * pairs * self._prefill_flops / self._attention_peak
        demand.scaled_fixed += self._prefill_fixed

    # -- what can be computed once ---------------------------------------------------------------

    def _peak(self, weight_bytes: float) -> float:
        compute = self._gpu.compute
        wide = weight_bytes >= 2.0
        return compute.bf16_flops_per_second if wide else compute.fp8_flops_per_second

    def _prepare_routing(self, skew_exponent: float) -> None:
        model = self._architecture
        self._routing = routing_table(
            model.experts_count,
            model.experts_per_token,
            skew_exponent,
            self._expert_ranks,
            self._tokens_limit,
        )
        #: A model whose layers have one expert is dense: its blocks are plain GEMMs.
        self._moe_layers = model.moe_layers_count if model.experts_count > 1 else 0

    def _prepare_moe(self) -> None:
        model, moe = self._architecture, self._moe
        split = self._ranks // self._expert_ranks  # GPUs that share each expert
        width = model.expert_intermediate_size / split
        per_expert = 3.0 * model.hidden_size * width
        # Four-bit weights are multiplied in bf16 (weight-only quantization).
        low_bit = model.weight_dtype in {"mxfp4", "int4", "bf16", "fp16"}
        peak = self._peak(2.0 if low_bit else model.weight_bytes)
        self._expert_bytes = per_expert * model.weight_bytes
        self._expert_seconds = self._expert_bytes / (self._bandwidth * moe.memory_efficiency_ratio)
        self._pair_seconds = 2.0 * per_expert / (peak * moe.compute_efficiency_ratio)
        self._tile_waste = self._gpu.power.grouped_tensor_ratio - 1.0
        self._pair_tensor_seconds = 2.0 * per_expert / peak
        self._pair_elements = 2.0 * model.hidden_size + 3.0 * width
        self._hidden = float(model.hidden_size)

    def _prepare_attention(self) -> None:
        model, gpu = self._architecture, self._gpu
        sliding = model.sliding_layers_count
        full = (model.layers_count - sliding, 0)
        windowed = (sliding, model.sliding_window_tokens)
        self._attention_layers = tuple(item for item in (full, windowed) if item[0])
        self._heads = heads = model.attention_heads_count / self._ranks
        if model.attention == "mla":
            self._prepare_latent_attention()
            return
        width = model.head_dimension
        kv_heads = max(model.kv_heads_count / self._ranks, 1.0)
        self._kv_layer_bytes = 2.0 * kv_heads * width * model.kv_bytes
        self._query_bytes = (2.0 * heads + 2.0 * kv_heads) * width * 2.0
        self._context_flops = self._prefill_flops = 4.0 * heads * width
        decode = gpu.decode_attention
        self._decode_byte_seconds = 1.0 / (self._bandwidth * decode.memory_efficiency_ratio)
        self._decode_extra_bytes = decode.extra_bytes
        self._decode_row_seconds = decode.seconds_per_row
        self._decode_fixed = model.layers_count * decode.fixed_seconds
        self._prefill_fixed = model.layers_count * gpu.prefill_attention.fixed_seconds

    def _prepare_latent_attention(self) -> None:
        """MLA: decode reads the compressed KV once for all heads; prefill expands it."""
        model, latent = self._architecture, self._gpu.latent_attention
        if latent is None:
            raise InvalidInputError(
                "gpu", self._gpu.name, "a GPU with a [latent_attention] table for an MLA model"
            )
        heads, layers = self._heads, model.layers_count
        compressed = model.kv_lora_rank + model.rope_head_dimension
        self._kv_layer_bytes = compressed * model.kv_bytes
        self._query_bytes = heads * (3.0 * model.head_dimension + model.rope_head_dimension) * 2.0
        self._context_flops = 2.0 * heads * (compressed + model.kv_lora_rank)
        self._prefill_flops = 2.0 * heads * (2.0 * model.head_dimension + model.rope_head_dimension)
        self._decode_byte_seconds = 1.0 / (self._bandwidth * latent.memory_efficiency_ratio)
        self._decode_extra_bytes = 0.0
        self._decode_row_seconds = latent.seconds_per_row
        # The fitted block holds the launches of its projections, which `_prepare_fixed` counts
        # as one GEMM.
        launch = self._gpu.gemm.fixed_seconds
        self._decode_fixed = layers * (latent.fixed_seconds - launch)
        self._prefill_fixed = layers * self._gpu.prefill_attention.fixed_seconds

    def _prepare_gemms(self) -> None:
        model, ranks = self._architecture, self._ranks
        hidden, layers = model.hidden_size, model.layers_count
        kv_width = max(model.kv_heads_count // ranks, 1) * model.head_dimension
        query_width = model.attention_heads_count * model.head_dimension // ranks
        if model.attention == "mla":  # all projections as one block of the same weights
            weights = model.attention_weight_count_per_layer / ranks
            shapes = [(layers, round(weights / hidden), hidden)]
        else:
            shapes = [(layers, query_width + 2 * kv_width, hidden), (layers, hidden, query_width)]
        blocks = [
            (model.dense_layers_count, model.dense_intermediate_size),
            (self._moe_layers, model.shared_intermediate_size),
        ]
        if not self._moe_layers:
            blocks.append((model.moe_layers_count, model.expert_intermediate_size))
        for count, width in blocks:
            if count and width:
                shapes += [(count, 2 * width // ranks, hidden), (count, hidden, width // ranks)]
        if self._moe_layers:
            shapes.append((self._moe_layers, model.experts_count, hidden))  # router
        self._shapes = shapes
        weight_bytes = model.attention_weight_bytes
        self._layer_gemms = [self._gemm(*shape, weight_bytes, self._dense_peak) for shape in shapes]
        head = (1, model.vocabulary_size // ranks, hidden)
        self._head = self._gemm(*head, 2.0, self._gpu.compute.bf16_flops_per_second)

    def _gemm(
        self, count: int, columns: int, inner: int, weight_bytes: float, peak: float
    ) -> _Gemm:
        parameters, processors = self._gpu.gemm, self._gpu.compute.multiprocessors_count
        stream = self._bandwidth * parameters.memory_efficiency_ratio
        waves = [1.0]
        for row_tiles in range(1, -(-self._tokens_limit // _TILE) + 3):
            tiles = row_tiles * -(-columns // _TILE)
            wave = min(8.0, math.ceil(tiles / processors) * processors / tiles)
            waves.append(wave**parameters.wave_exponent)
        return _Gemm(
            count=count,
            weight_seconds=columns * inner * weight_bytes / stream,
            row_seconds=2.0 * (columns + inner) / stream,
            row_compute_seconds=2.0
            * columns
            * inner
            / (peak * parameters.compute_efficiency_ratio),
            waves=tuple(waves),
        )

    def _prepare_fixed(self) -> None:
        """Fixed time of every iteration, whatever its size: launches and small kernels."""
        gpu, model = self._gpu, self._architecture
        fixed = model.layers_count * gpu.engine.layer_seconds
        for count, _, inner in [*self._shapes, (1, 0, model.hidden_size)]:
            per_call = gpu.gemm.fixed_seconds + inner * gpu.gemm.fixed_seconds_per_element
            fixed += count * per_call
        if self._moe_layers:
            # The router's launch is among the small kernels of `layer_seconds`.
            fixed -= self._moe_layers * gpu.gemm.fixed_seconds
            elements = model.hidden_size + model.expert_intermediate_size * (
                self._expert_ranks / self._ranks
            )
            per_layer = self._moe.fixed_seconds + elements * self._moe.fixed_seconds_per_element
            fixed += self._moe_layers * per_layer
        if model.weight_dtype == "fp8_block" and model.attention == "gqa":
            fixed += model.layers_count * gpu.engine.quantization_seconds
        self._all_reduce_bytes = 2 * model.layers_count * model.hidden_size * 2.0
        if self._all_reduce is not None:
            fixed += 2 * model.layers_count * self._all_reduce.fixed_seconds
        self._fixed = fixed


def _check_parallelism(model: ModelArchitecture, ranks: int, expert_ranks: int) -> None:
    if ranks < 1 or model.attention_heads_count % ranks:
        raise InvalidInputError(
            "parallelism.tensor_parallel_count",
            ranks,
            f"a divisor of the {model.attention_heads_count} attention heads of {model.name}",
        )
    if expert_ranks < 1 or ranks % expert_ranks or model.experts_count % expert_ranks:
        raise InvalidInputError(
            "parallelism.expert_parallel_count",
            expert_ranks,
            f"a divisor of {ranks} GPUs and of {model.experts_count} experts",
        )


def _by_dtype(tables: Mapping[str, MoeParameters], dtype: str, name: str) -> MoeParameters:
    if dtype not in tables:
        raise InvalidInputError("model.weight_dtype", dtype, f"{', '.join(tables)} in [{name}]")
    return tables[dtype]


def _by_ranks(tables: Mapping[str, AllReduceParameters], ranks: int) -> AllReduceParameters:
    if str(ranks) not in tables:
        raise InvalidInputError(
            "parallelism.tensor_parallel_count", ranks, f"1, {', '.join(tables)} in [all_reduce]"
        )
    return tables[str(ranks)]
