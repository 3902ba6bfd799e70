"""The ordered features that both models see: the contract between training and serving."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from predictors.active_experts import ActiveExperts, Routing
from predictors.analytic import Layers, NominalGpu, Roofline
from predictors.errors import PredictorsError
from predictors.prediction import SHAPE_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from predictors.architecture import ModelArchitecture

#: Feature name -> unit, in the order of the models' columns. The first is the only one that depends
#: on the clock; `predictors.compiled_sweep` relies on that.
FEATURES: dict[str, str] = {
    "clock_ratio": "clock / maximum clock",
    "prefill_requests_count": "requests",
    "prefill_tokens": "tokens",
    "prefill_kv_tokens": "tokens",
    "decode_requests_count": "requests",
    "decode_kv_tokens": "tokens",
    "decode_tokens": "tokens",
    "tokens": "tokens",
    "mean_decode_kv_tokens": "tokens / request",
    "prefill_attention_pairs": "query-key pairs / fullest GPU",
    "active_experts_count": "experts / layer",
    "fullest_rank_experts_count": "experts / layer and GPU",
    "tokens_per_active_expert": "tokens / expert",
    "weight_bytes": "bytes / GPU",
    "kv_bytes": "bytes / GPU",
    "flops_count": "FLOP / GPU",
    "compute_seconds": "seconds at maximum clock",
    "memory_seconds": "seconds at maximum clock",
    "compute_ratio": "compute / (compute + memory + fixed)",
    "memory_ratio": "memory / (compute + memory + fixed)",
}
CLOCK_FEATURE = 0

#: Load features whose range in training decides what a bundle covers.
ENVELOPE_FEATURES: tuple[str, ...] = (
    "prefill_requests_count",
    "prefill_tokens",
    "prefill_kv_tokens",
    "decode_requests_count",
    "decode_kv_tokens",
    "decode_tokens",
    "tokens",
    "mean_decode_kv_tokens",
)


def envelope_columns(shapes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Load features of (K, 7) shapes, (K, 8), columns as in `ENVELOPE_FEATURES`."""
    columns = np.empty((len(shapes), len(ENVELOPE_FEATURES)))
    columns[:, :6] = shapes[:, :6]
    columns[:, 6] = shapes[:, 1] + shapes[:, 5]
    columns[:, 7] = shapes[:, 4] / np.maximum(shapes[:, 3], 1.0)
    return columns


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How a model is spread over GPUs.

    Attributes:
        tensor_parallel_count: GPUs that share every attention layer.
        expert_parallel_count: GPUs that share the experts, each whole; 1 when experts are cut.
    """

    tensor_parallel_count: int = 1
    expert_parallel_count: int = 1

    def __post_init__(self) -> None:
        """Refuse counts below one.

        Raises:
            PredictorsError: Naming the count.
        """
        for name in ("tensor_parallel_count", "expert_parallel_count"):
            if getattr(self, name) < 1:
                raise PredictorsError(f"{name} is {getattr(self, name)}; allowed: 1 or more")


@dataclass(frozen=True, slots=True)
class Work:
    """What the fullest GPU does in an iteration; arrays are (K,).

    Projections read the same bytes always.

    Attributes:
        active_experts_count: Expected active experts per layer over all GPUs.
        fullest_rank_experts_count: The same on the GPU that has most.
        prefill_attention_pairs: Query-key pairs of prompt attention, all heads of a GPU as one.
        expert_bytes: Bytes of active routed experts over all layers.
        expert_flops: FLOP in routed experts.
        projection_bytes: Bytes of all other weights.
        projection_flops: FLOP with these weights.
        attention_flops: FLOP of prompt attention.
        kv_bytes: Bytes of KV read and written.
        sequences_count: Requests that it attends for.
        communication_bytes: Bytes of activations that all-reduces move.
        activation_bytes: Bytes of activations that experts read and write.
    """

    active_experts_count: NDArray[np.float64]
    fullest_rank_experts_count: NDArray[np.float64]
    prefill_attention_pairs: NDArray[np.float64]
    expert_bytes: NDArray[np.float64]
    expert_flops: NDArray[np.float64]
    projection_bytes: float
    projection_flops: NDArray[np.float64]
    attention_flops: NDArray[np.float64]
    kv_bytes: NDArray[np.float64]
    sequences_count: NDArray[np.float64]
    communication_bytes: NDArray[np.float64]
    activation_bytes: NDArray[np.float64]


def fullest_replica(columns: NDArray[np.float64], replicas_count: float) -> NDArray[np.float64]:
    """The share of the work that the fullest of several attention replicas does.

    Requests are dealt to the replicas. Decodes spread evenly; of few prompts the longest chunk
    decides. Chunked prefill continues one prompt and then starts others, so one chunk is taken to
    hold all old KV, and the others to be alike: tokens T, old KV K and pairs P of n prompts then
    give the tokens t of that chunk,

        t K + t^2 / 2 + (T - t)^2 / (2 (n - 1)) = P.

    Args:
        columns: (7, K), rows as in `SHAPE_COLUMNS`.
        replicas_count: How many replicas.
    """
    share = columns * (1.0 / replicas_count)
    prompts = columns[:3]
    if not prompts[0].any():
        return share
    few = prompts[0] <= replicas_count
    whole = np.where(few, columns, share)
    share[:3], share[6] = whole[:3], whole[6]
    np.minimum(share[0], np.maximum(1.0, prompts[0] / replicas_count), out=share[0])
    several = few & (prompts[0] > 1.0)
    if several.any():
        share[1:3, several], share[6, several] = _longest_chunk(columns[:, several])
    return share


def _longest_chunk(
    columns: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens and old KV of the longest of several chunks, (2, K), and its pairs, (K,)."""
    requests, tokens, old, pairs = columns[[0, 1, 2, 6]]
    others = requests - 1.0
    np.maximum(others, 1.0, out=others)
    square = 0.5 + 0.5 / others
    linear = old - tokens / others
    constant = 0.5 * tokens**2 / others - pairs
    root = np.sqrt(np.maximum(linear**2 - 4.0 * square * constant, 0.0))
    continued = np.clip((root - linear) / (2.0 * square), 0.0, tokens)
    started = (tokens - continued) / others
    chunk = np.maximum(continued, started)
    chunk_old = np.where(started > continued, 0.0, old)
    return np.stack([chunk, chunk_old]), chunk * (chunk_old + 0.5 * chunk)


class Space(Protocol):
    """What turns shapes into a model's features and the terms that both bases are made of."""

    @property
    def features(self) -> Mapping[str, str]:
        """Feature name -> unit, in order; `CLOCK_FEATURE` is the clock."""
        ...

    def build(self, shapes: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Features (F, K) with the clock left at one, and terms (T, K), of (K, 7) shapes."""
        ...


def rows_at(
    space: Space, shapes: NDArray[np.float64], clock_ratios: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Model input for one clock per shape, as training needs it.

    Args:
        space: What makes the features.
        shapes: (N, 7).
        clock_ratios: (N,) clock over maximum clock.

    Returns:
        (N, F) float32 features and the terms (T, N).
    """
    features, terms = space.build(shapes)
    features[CLOCK_FEATURE] = clock_ratios
    return np.ascontiguousarray(features.T), terms


def checked_columns(shapes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The columns of (K, 7) shapes as rows, (7, K).

    Raises:
        PredictorsError: If the matrix has another width, or a row has no work.
    """
    if shapes.ndim != 2 or shapes.shape[1] != len(SHAPE_COLUMNS):
        raise PredictorsError(f"shapes have the form {shapes.shape}; allowed: (K, 7)")
    columns = np.ascontiguousarray(shapes.T)
    if not ((columns[1] + columns[5]) > 0.0).all() or not math.isfinite(columns.sum()):
        raise PredictorsError("a shape has no tokens or NaN; allowed: finite rows with work")
    return columns


class FeatureSpace:
    """Turns shapes into features for one model, spread in one way, on one kind of GPU.

    Args:
        architecture: The model's dimensions.
        parallelism: How it is spread.
        gpu: Nominal figures of the GPU.
        routing: How tokens spread over experts.
        active_experts_ratio: Active experts over those of the routing's formula, when something
            knows better (`ActiveExpertsEstimator`).
    """

    def __init__(
        self,
        architecture: ModelArchitecture,
        parallelism: Parallelism,
        gpu: NominalGpu,
        routing: Routing | None = None,
        active_experts_ratio: float = 1.0,
    ) -> None:
        self.architecture = architecture
        self.parallelism = parallelism
        self.gpu = gpu
        self.routing = routing or Routing()
        self._active_experts_ratio = active_experts_ratio
        experts = architecture.experts_count
        taken = experts if self.routing.source == "all" else architecture.experts_per_token
        self._active_experts = ActiveExperts(experts, taken, self.routing.skew_exponent)
        model, tp = architecture, parallelism.tensor_parallel_count
        layers = Layers(
            model.layers_count,
            model.moe_layers_count if model.experts_count > 1 else 0,
            model.layers_count if model.attention == "mla" else 0,
            model.layers_count if model.weight_dtype == "fp8_block" else 0,
            model.layers_count * model.attention_heads_count / tp,
        )
        self.roofline = Roofline(layers, model.weight_bytes, gpu)
        ranks = parallelism.expert_parallel_count
        self._ranks = ranks
        # GPUs that only share experts each attend for requests of their own
        self._replicas = max(1, ranks // tp)
        # Gaussian estimate of the largest of `ranks` counts: mean + deviation * sqrt(2 ln ranks)
        self._spread = math.sqrt(2.0 * math.log(ranks))
        self._bytes_per_expert = (
            model.moe_layers_count
            * model.expert_weight_count
            * model.weight_bytes
            / max(1, tp // ranks)
        )
        self._expert_flops_per_token = (
            2.0
            * model.moe_layers_count
            * model.experts_per_token
            * model.expert_weight_count
            / max(tp, ranks)
        )
        other_moe = model.moe_layers_count * (model.shared_weight_count + model.router_weight_count)
        feed_forward = model.dense_layers_count * model.dense_weight_count + other_moe
        attention = model.layers_count * model.attention_weight_count_per_layer
        self._projection_bytes = (
            attention * model.attention_weight_bytes
            + feed_forward * model.weight_bytes
            + model.lm_head_weight_count * 2.0
        ) / tp
        self._flops_per_token = 2.0 * (attention + feed_forward) / tp
        self._flops_per_logit = 2.0 * model.lm_head_weight_count / tp
        # MLA keeps one compressed KV on every GPU; key-value heads are shared out
        copies = 1 if model.attention == "mla" else min(tp, model.kv_heads_count)
        layer_bytes = model.kv_elements_per_token_and_layer * model.kv_bytes / copies
        windowed, full = (
            model.sliding_layers_count,
            model.layers_count - model.sliding_layers_count,
        )
        self._full_kv_bytes, self._windowed_kv_bytes = full * layer_bytes, windowed * layer_bytes
        pair_flops = (
            2.0
            * model.attention_heads_count
            * (2 * model.head_dimension + model.rope_head_dimension)
        )
        self._full_pair_flops = full * pair_flops / tp
        self._windowed_pair_flops = windowed * pair_flops / tp
        # two all-reduces of 16-bit activations in each layer
        reductions = 4.0 * model.layers_count if max(tp, ranks) > 1 else 0.0
        self._communication_bytes = reductions * model.hidden_size
        # inputs and outputs of the experts' kernels, in 16 bits, per token-expert pair and token
        width = 2 * model.hidden_size + 3 * model.expert_intermediate_size / max(1, tp // ranks)
        pairs = model.experts_per_token / ranks * width + model.hidden_size
        self._activation_bytes = 2.0 * model.moe_layers_count * pairs

    @property
    def features(self) -> Mapping[str, str]:
        """Feature name -> unit, in order."""
        return FEATURES

    @property
    def whole(self) -> bool:
        """Whether every GPU attends for every request: no replicas share them out."""
        return self._replicas == 1

    @property
    def active_experts_table(self) -> NDArray[np.float64] | None:
        """Active experts at `active_experts.TABLE_TOKENS`; None for a uniform router."""
        return self._active_experts.table

    def constants(self) -> dict[str, float]:
        """All that `build` multiplies and compares with, by name, for compiled code."""
        model = self.architecture
        taken = self._active_experts.experts_per_token
        uniform = taken < model.experts_count
        return {
            "log_missed": math.log1p(-taken / model.experts_count) if uniform else 0.0,
            "experts_count": float(model.experts_count),
            "active_experts_ratio": self._active_experts_ratio,
            "ranks_count": float(self._ranks),
            "spread": self._spread,
            "full_pair_flops": self._full_pair_flops,
            "windowed_pair_flops": self._windowed_pair_flops,
            "full_kv_bytes": self._full_kv_bytes,
            "windowed_kv_bytes": self._windowed_kv_bytes,
            "window_tokens": float(model.sliding_window_tokens),
            "bytes_per_expert": self._bytes_per_expert,
            "expert_flops_per_token": self._expert_flops_per_token,
            "projection_bytes": self._projection_bytes,
            "flops_per_token": self._flops_per_token,
            "flops_per_logit": self._flops_per_logit,
            "communication_bytes": self._communication_bytes,
            "activation_bytes": self._activation_bytes,
            **self.roofline.constants(),
        }

    def work(self, columns: NDArray[np.float64]) -> Work:
        """Work of K iterations on the busiest GPU.

        Args:
            columns: (7, K), rows as in `SHAPE_COLUMNS`.
        """
        model = self.architecture
        tokens = columns[1] + columns[5]
        active = self._active_experts(tokens)
        if self._active_experts_ratio != 1.0:
            active = np.minimum(active * self._active_experts_ratio, model.experts_count)
        fullest = active
        if self._ranks > 1:
            # experts of a rank are active like independent draws: binomial variance
            fullest = active / self._ranks
            missed = 1.0 - active / model.experts_count
            fullest = fullest + self._spread * np.sqrt(fullest * missed)
            np.minimum(fullest, model.experts_count / self._ranks, out=fullest)
        if self._replicas > 1:
            columns = fullest_replica(columns, float(self._replicas))
        requests, prefill, prefill_kv, decoding, decode_kv, decode, pairs = columns
        local = prefill + decode  # tokens that this GPU attends for
        attention_flops = pairs * self._full_pair_flops
        kv_bytes = (decode_kv + prefill_kv + local) * self._full_kv_bytes
        if self._windowed_kv_bytes:
            window = model.sliding_window_tokens
            attention_flops += np.minimum(pairs, prefill * window) * self._windowed_pair_flops
            near = np.minimum(decode_kv + prefill_kv, (decoding + requests) * window)
            kv_bytes += (near + local) * self._windowed_kv_bytes
        return Work(
            active,
            fullest,
            pairs,
            fullest * self._bytes_per_expert,
            tokens * self._expert_flops_per_token,
            self._projection_bytes,
            local * self._flops_per_token + (decode + requests) * self._flops_per_logit,
            attention_flops,
            kv_bytes,
            decoding + requests,
            local * self._communication_bytes,
            tokens * self._activation_bytes,
        )

    def build(self, shapes: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Features without the clock, and the roofline's terms.

        Args:
            shapes: (K, 7), columns as in `SHAPE_COLUMNS`; fractions allowed.

        Returns:
            Features (F, K) in the order of `features`, row `CLOCK_FEATURE` left at one; terms
            (T, K) of `Roofline.terms`.

        Raises:
            PredictorsError: If a row has no work, or the matrix has another width.
        """
        columns = checked_columns(shapes)
        work = self.work(columns)
        terms = self.roofline.terms(work)
        return self._features(columns, work, terms), terms

    def _features(
        self, columns: NDArray[np.float64], work: Work, terms: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        tokens = columns[1] + columns[5]
        memory = terms[2] + terms[3] + terms[5]
        compute = terms[4] + terms[6] + terms[7]
        total = memory + compute + terms[0]
        features = np.empty((len(FEATURES), len(tokens)), dtype=np.float32)
        features[0] = 1.0
        features[1:7] = columns[:6]
        features[7] = tokens
        features[8] = columns[4] / np.maximum(columns[3], 1.0)
        features[9] = work.prefill_attention_pairs
        features[10] = work.active_experts_count
        features[11] = work.fullest_rank_experts_count
        features[12] = tokens / work.active_experts_count
        features[13] = work.expert_bytes + work.projection_bytes
        features[14] = work.kv_bytes
        features[15] = work.expert_flops + work.projection_flops + work.attention_flops
        features[16] = compute
        features[17] = memory
        features[18] = compute / total
        features[19] = memory / total
        return features
