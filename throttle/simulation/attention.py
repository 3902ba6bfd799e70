"""Attention of one plant: grouped-query or latent (MLA), decode and prefill."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, TypeVar

from throttle.errors import InvalidInputError
from throttle.simulation.operator_tables import surface

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from predictors.architecture import ModelArchitecture
    from throttle.simulation.operators import Demand
    from throttle.simulation.parameters import GpuParameters, LatentAttentionParameters

T = TypeVar("T")

_REQUEST_POWERS = 12  # 1 to 2048 requests
_CONTEXT_POWERS = 18  # 1 to 131072 tokens of context
_CHUNK_POWERS = 15  # 1 to 16384 tokens of a prompt


class Attention(Protocol):
    """Attention of all layers."""

    kv_layer_bytes: float

    def add(
        self, demand: Demand, chunks: Sequence[tuple[int, int]], decodes: int, context: int
    ) -> None:
        """Add what one iteration's attention asks for.

        Args:
            demand: Added to.
            chunks: Tokens of each prompt's chunk, and tokens before it.
            decodes: Requests that generate a token each.
            context: Tokens that they attend to, summed.
        """
        ...


def for_model(gpu: GpuParameters, model: ModelArchitecture, ranks: int) -> Attention:
    """Attention of a model whose heads are split over so many GPUs.

    Raises:
        InvalidInputError: The GPU has no figures for it.
    """
    if model.attention == "mla":
        return LatentAttention(gpu, model, ranks)
    return GroupedAttention(gpu, model, ranks)


def effective_tokens(chunks: Sequence[tuple[int, int]]) -> float:
    """Length of a prompt without context whose attention costs as much as the mean chunk's."""
    squared = 0.0
    for tokens, context in chunks:
        squared += tokens * (tokens + 2.0 * context)
    return math.sqrt(squared / len(chunks))


class GroupedAttention:
    """Grouped-query attention, with full and windowed layers."""

    def __init__(self, gpu: GpuParameters, model: ModelArchitecture, ranks: int) -> None:
        sliding = model.sliding_layers_count
        full = (model.layers_count - sliding, 0)
        windowed = (sliding, model.sliding_window_tokens)
        self._layers = tuple(item for item in (full, windowed) if item[0])
        heads = model.attention_heads_count / ranks
        kv_heads = max(model.kv_heads_count / ranks, 1.0)
        width = model.head_dimension
        self.kv_layer_bytes = 2.0 * kv_heads * width * model.kv_bytes
        self._query_bytes = (2.0 * heads + 2.0 * kv_heads) * width * 2.0
        self._flops = 4.0 * heads * width
        self._heads = heads
        self._peak = gpu.compute.bf16_flops_per_second
        bandwidth = gpu.memory.bandwidth_bytes_per_second
        decode = figures(gpu.decode_attention, model.kv_dtype, width)
        prefill = figures(gpu.prefill_attention, model.kv_dtype, width)
        self._decode = decode
        self._byte_seconds = 1.0 / (bandwidth * decode.memory_efficiency_ratio)
        self._prefill_fixed = prefill.fixed_seconds
        self._pair_seconds = self._flops / (self._peak * prefill.compute_efficiency_ratio)
        self._half_extra = prefill.extra_tokens / 2.0
        self._moved_seconds = prefill.traffic_ratio / bandwidth
        shape, formats = (heads, kv_heads, float(width)), (model.kv_dtype,)
        self._decode_factors = surface(
            gpu.name, "decode", formats, shape, _REQUEST_POWERS, _CONTEXT_POWERS
        )
        self._prefill_factors = surface(
            gpu.name, "prefill", formats, shape, _REQUEST_POWERS, _CHUNK_POWERS
        )

    def add(
        self, demand: Demand, chunks: Sequence[tuple[int, int]], decodes: int, context: int
    ) -> None:
        """Add what one iteration's attention asks for; see `Attention`."""
        for layers, window in self._layers:
            if decodes:
                self._add_decode(demand, layers, window, decodes, context)
            if chunks:
                self._add_prefill(demand, layers, window, chunks)

    def _add_decode(
        self, demand: Demand, layers: int, window: int, decodes: int, context: int
    ) -> None:
        """`g (t0 + cb B heads) + (KV + s0 KV / (KV + 5 MB)) / (bw em)` per layer."""
        decode = self._decode
        read = min(context, decodes * window) if window else context
        kv = read * self.kv_layer_bytes
        factor = layers * self._decode_factors.at(
            math.log2(decodes), math.log2(max(read / decodes, 1.0))
        )
        extra = decode.extra_bytes * kv / (kv + 5e6)
        demand.memory += factor * (kv + extra) * self._byte_seconds
        demand.scaled_fixed += factor * (
            decode.fixed_seconds + decode.seconds_per_row * decodes * self._heads
        )
        demand.traffic_bytes += layers * kv
        demand.tensor_seconds += layers * read * self._flops / self._peak

    def _add_prefill(
        self, demand: Demand, layers: int, window: int, chunks: Sequence[tuple[int, int]]
    ) -> None:
        """`g t0 + F (pairs + tokens s0 / 2) / (C ec) + cm IO / bw` per layer."""
        pairs = moved = squared = 0.0
        computed = 0
        for tokens, context in chunks:
            seen = context + tokens / 2.0
            if window and seen > window:
                seen = float(window)
            pairs += tokens * seen
            squared += 2.0 * tokens * seen
            computed += tokens
            moved += tokens * self._query_bytes + context * self.kv_layer_bytes
        count = len(chunks)
        factor = layers * self._prefill_factors.at(
            math.log2(count), 0.5 * math.log2(max(squared / count, 1.0))
        )
        spent = pairs + computed * self._half_extra
        demand.compute += factor * spent * self._pair_seconds
        demand.memory += factor * moved * self._moved_seconds
        demand.scaled_fixed += factor * self._prefill_fixed
        demand.traffic_bytes += layers * moved
        demand.tensor_seconds += layers * pairs * self._flops / self._peak


class LatentAttention:
    """Multi-head latent attention: decode reads the compressed KV once for all heads.

    The measured blocks hold their projections, so these are not counted among the dense GEMMs.
    """

    def __init__(self, gpu: GpuParameters, model: ModelArchitecture, ranks: int) -> None:
        heads = model.attention_heads_count / ranks
        dtype, key = model.weight_dtype, f"{model.weight_dtype}_{model.kv_dtype}"
        decodes, prefills = gpu.latent_decode or {}, gpu.latent_prefill or {}
        if key not in decodes or key not in prefills:
            raise InvalidInputError(
                "model.weight_dtype",
                f"{dtype} with {model.kv_dtype} KV",
                f"for latent attention on {gpu.name}: {', '.join(decodes) or 'none'}",
            )
        self._decode, self._prefill = decodes[key], prefills[key]
        self._layers = model.layers_count
        self._heads = heads
        compressed = model.kv_lora_rank + model.rope_head_dimension
        self.kv_layer_bytes = compressed * model.kv_bytes
        self._bandwidth = gpu.memory.bandwidth_bytes_per_second
        self._weights = latent_weight_count(model, heads)
        self._weight_bytes = self._weights * model.attention_weight_bytes
        self._peak = gpu.compute.bf16_flops_per_second
        wide = model.attention_weight_bytes >= 2.0
        self._projection_peak = self._peak if wide else gpu.compute.fp8_flops_per_second
        self._decode_flops, self._pair_flops = latent_flops(model, heads)
        #: Projecting the compressed KV of earlier chunks up again.
        self._expand_flops = 4.0 * model.kv_lora_rank * heads * model.head_dimension
        formats, shape = (dtype, model.kv_dtype), (heads,)
        self._decode_factors = surface(
            gpu.name, "mla_decode", formats, shape, _REQUEST_POWERS, _CONTEXT_POWERS
        )
        self._prefill_factors = surface(
            gpu.name, "mla_prefill", formats, shape, _REQUEST_POWERS, _CHUNK_POWERS
        )

    def add(
        self, demand: Demand, chunks: Sequence[tuple[int, int]], decodes: int, context: int
    ) -> None:
        """Add what one iteration's attention asks for; see `Attention`.

        `g (t0 + cb rows) + (w + KV) / (bw em) + (projections + attention) / ec` per layer. A mixed
        step launches and streams the projections once.
        """
        if decodes:
            figures_, kv = self._decode, context * self.kv_layer_bytes
            factor = self._decode_factors.at(
                math.log2(decodes), math.log2(max(context / decodes, 1.0))
            )
            work = (
                2.0 * self._weights * decodes / self._projection_peak
                + context * self._decode_flops / self._peak
            )
            rows = decodes * self._heads
            self._add(demand, figures_, factor, rows, self._weight_bytes + kv, work, 1.0)
        if chunks:
            computed, pairs, before = 0, 0.0, 0
            for tokens, earlier in chunks:
                computed += tokens
                before += earlier
                pairs += tokens * (earlier + tokens / 2.0)
            work = (
                2.0 * self._weights * computed / self._projection_peak
                + (pairs * self._pair_flops + before * self._expand_flops) / self._peak
            )
            streamed = before * self.kv_layer_bytes + (0.0 if decodes else self._weight_bytes)
            factor = self._prefill_factors.at(
                math.log2(len(chunks)), math.log2(max(effective_tokens(chunks), 1.0))
            )
            rows = computed * self._heads
            self._add(demand, self._prefill, factor, rows, streamed, work, 0.0 if decodes else 1.0)

    def _add(  # noqa: PLR0917 - the terms of the equation
        self,
        demand: Demand,
        figures_: LatentAttentionParameters,
        factor: float,
        rows: float,
        streamed: float,
        work: float,
        launches: float,
    ) -> None:
        layers = self._layers
        factor *= layers
        demand.scaled_fixed += factor * (
            launches * figures_.fixed_seconds + figures_.seconds_per_row * rows
        )
        demand.memory += factor * streamed / (self._bandwidth * figures_.memory_efficiency_ratio)
        demand.compute += factor * work / figures_.compute_efficiency_ratio
        demand.traffic_bytes += layers * streamed
        demand.tensor_seconds += layers * work


def latent_weight_count(model: ModelArchitecture, heads: float) -> float:
    """Weights of one layer's MLA projections for so many heads; the down projections are whole."""
    width, rope = model.head_dimension, model.rope_head_dimension
    hidden, query_rank, kv_rank = model.hidden_size, model.q_lora_rank, model.kv_lora_rank
    down = hidden * (kv_rank + rope) + hidden * query_rank
    query = (query_rank or hidden) * (width + rope)
    return down + heads * (query + kv_rank * 2 * width + width * hidden)


def latent_flops(model: ModelArchitecture, heads: float) -> tuple[float, float]:
    """FLOPs of one decode row per token of context, and of prefill per query-key pair."""
    rope, width = model.rope_head_dimension, model.head_dimension
    decode = 2.0 * heads * (2.0 * model.kv_lora_rank + rope)
    return decode, 2.0 * heads * (2.0 * width + rope)


def figures(tables: Mapping[str, T], kv_dtype: str, head_dimension: int) -> T:
    """The fit for a KV format and head dimension, or the nearest there is.

    Raises:
        InvalidInputError: There is none at all.
    """
    for key in (f"{kv_dtype}_{head_dimension}", f"{kv_dtype}_128", f"bf16_{head_dimension}"):
        if key in tables:
            return tables[key]
    if "bf16_128" in tables:
        return tables["bf16_128"]
    raise InvalidInputError("model.kv_dtype", kv_dtype, f"one of {', '.join(tables)}")
