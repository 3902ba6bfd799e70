"""Dimensions of mixture-of-experts models: from a catalogue or from a Hugging Face config.json."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any

from predictors.errors import ArchitectureError

#: Bytes per stored weight or KV element. Four-bit formats carry scales: mxfp4 has one byte for 32
#: weights (0.53), nvfp4 one for 16 (0.56), int4 in groups of 128 two (0.53 with zero points).
DTYPE_BYTES: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int8": 1.0,
    "nvfp4": 0.5625,
    "mxfp4": 0.53,
    "int4": 0.53,
}

#: Other spellings that engines and config files use.
_DTYPE_ALIASES: dict[str, str] = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
    "float8_e4m3fn": "fp8",
    "awq": "int4",
    "gptq": "int4",
}

#: Dimensions that every model has.
_POSITIVE = (
    "layers_count",
    "hidden_size",
    "vocabulary_size",
    "experts_count",
    "experts_per_token",
    "expert_intermediate_size",
    "attention_heads_count",
    "kv_heads_count",
    "head_dimension",
)

#: Formats in which only the expert weights are stored; attention stays in bf16.
_EXPERTS_ONLY_DTYPES = frozenset({"mxfp4", "nvfp4"})


@dataclass(frozen=True, slots=True)
class ModelArchitecture:
    """What the cost of an iteration depends on. A dense model is one expert per layer.

    Attributes:
        name: Model name, lower case.
        layers_count: Decoder layers.
        hidden_size: Width of the residual stream.
        vocabulary_size: Rows of the embedding.
        experts_count: Routed experts per layer; 1 for a dense model.
        experts_per_token: Routed experts that each token takes.
        expert_intermediate_size: Inner width of one routed expert.
        attention_heads_count: Query heads.
        kv_heads_count: Key and value heads.
        head_dimension: Width of one head (for MLA: the part without position).
        dense_layers_count: Layers without routed experts.
        dense_intermediate_size: Inner width of those layers; 0 if there are none.
        shared_intermediate_size: Inner width of all shared experts together; 0 if none.
        attention: "gqa" or "mla".
        kv_lora_rank: Width of the compressed KV of MLA; 0 when unused.
        rope_head_dimension: Width of the part of a head with position in MLA; 0 when unused.
        q_lora_rank: Width of the compressed query of MLA; 0 when unused.
        sliding_window_tokens: Most tokens that a windowed layer attends to; 0 without windows.
        sliding_layers_count: Layers with such a window.
        tied_embeddings: Whether input and output embedding are one matrix.
        weight_dtype: Format of the expert weights, a key of `DTYPE_BYTES`.
        kv_dtype: Format of the KV cache, a key of `DTYPE_BYTES`.
    """

    name: str
    layers_count: int
    hidden_size: int
    vocabulary_size: int
    experts_count: int
    experts_per_token: int
    expert_intermediate_size: int
    attention_heads_count: int
    kv_heads_count: int
    head_dimension: int
    dense_layers_count: int = 0
    dense_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    attention: str = "gqa"
    kv_lora_rank: int = 0
    rope_head_dimension: int = 0
    q_lora_rank: int = 0
    sliding_window_tokens: int = 0
    sliding_layers_count: int = 0
    tied_embeddings: bool = False
    weight_dtype: str = "bf16"
    kv_dtype: str = "bf16"

    def __post_init__(self) -> None:
        """Refuse dimensions that no model can have.

        Raises:
            ArchitectureError: Naming the field, its value and what is allowed.
        """
        layers = f"0 to layers_count, {self.layers_count}"
        formats = ", ".join(DTYPE_BYTES)
        rules = (
            *((name, getattr(self, name) >= 1, "1 or more") for name in _POSITIVE),
            (
                "experts_per_token",
                self.experts_per_token <= self.experts_count,
                f"up to experts_count, {self.experts_count}",
            ),
            ("dense_layers_count", 0 <= self.dense_layers_count <= self.layers_count, layers),
            (
                "dense_intermediate_size",
                self.dense_intermediate_size > 0 or not self.dense_layers_count,
                "1 or more with dense layers",
            ),
            ("sliding_layers_count", 0 <= self.sliding_layers_count <= self.layers_count, layers),
            ("attention", self.attention in {"gqa", "mla"}, "gqa, mla"),
            (
                "kv_lora_rank",
                self.attention == "gqa" or bool(self.kv_lora_rank and self.rope_head_dimension),
                "1 or more, with rope_head_dimension, for mla",
            ),
            ("weight_dtype", self.weight_dtype in DTYPE_BYTES, formats),
            ("kv_dtype", self.kv_dtype in DTYPE_BYTES, formats),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ArchitectureError(
                    f"{name} of model {self.name or '(unnamed)'} is {getattr(self, name)!r}; "
                    f"allowed: {allowed}"
                )

    @property
    def weight_bytes(self) -> float:
        """Bytes per expert weight."""
        return DTYPE_BYTES[self.weight_dtype]

    @property
    def attention_weight_bytes(self) -> float:
        """Bytes per attention weight: four-bit MoE formats keep attention in bf16."""
        return 2.0 if self.weight_dtype in _EXPERTS_ONLY_DTYPES else self.weight_bytes

    @property
    def kv_bytes(self) -> float:
        """Bytes per KV element."""
        return DTYPE_BYTES[self.kv_dtype]

    @property
    def moe_layers_count(self) -> int:
        """Layers with routed experts."""
        return self.layers_count - self.dense_layers_count

    @property
    def kv_elements_per_token_and_layer(self) -> int:
        """KV elements that one token adds to one layer."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.rope_head_dimension
        return 2 * self.kv_heads_count * self.head_dimension

    @property
    def kv_bytes_per_token(self) -> float:
        """KV bytes that one token adds over all layers."""
        return self.layers_count * self.kv_elements_per_token_and_layer * self.kv_bytes

    @property
    def attention_weight_count_per_layer(self) -> int:
        """Weights of the projections of one attention layer.

        For MLA: DeepSeek-V2 (arXiv 2405.04434), section 2.1, equations 9 to 19.
        """
        heads, width = self.attention_heads_count, self.head_dimension
        if self.attention == "gqa":
            return self.hidden_size * width * (2 * heads + 2 * self.kv_heads_count)
        query_width = heads * (width + self.rope_head_dimension)
        if self.q_lora_rank:
            query = self.q_lora_rank * (self.hidden_size + query_width)
        else:
            query = self.hidden_size * query_width
        down = self.hidden_size * (self.kv_lora_rank + self.rope_head_dimension)
        up = self.kv_lora_rank * heads * 2 * width
        return query + down + up + heads * width * self.hidden_size

    @property
    def expert_weight_count(self) -> int:
        """Weights of one routed expert: gate, up and down projection."""
        return 3 * self.hidden_size * self.expert_intermediate_size

    @property
    def shared_weight_count(self) -> int:
        """Weights of all shared experts of one layer."""
        return 3 * self.hidden_size * self.shared_intermediate_size

    @property
    def dense_weight_count(self) -> int:
        """Weights of the feed-forward block of one layer without experts."""
        return 3 * self.hidden_size * self.dense_intermediate_size

    @property
    def router_weight_count(self) -> int:
        """Weights of one router; a dense model has none."""
        return self.hidden_size * self.experts_count if self.experts_count > 1 else 0

    @property
    def lm_head_weight_count(self) -> int:
        """Weights of the output embedding, kept in 2 bytes by every format here."""
        return self.hidden_size * self.vocabulary_size

    @property
    def total_parameters_count(self) -> int:
        """Weights of the whole model, norms and biases left out."""
        embeddings = self.lm_head_weight_count * (1 if self.tied_embeddings else 2)
        return embeddings + self._layers_weight_count(self.experts_count)

    @property
    def active_parameters_count(self) -> int:
        """Weights that one token uses, both embeddings counted."""
        embeddings = self.lm_head_weight_count * (1 if self.tied_embeddings else 2)
        return embeddings + self._layers_weight_count(self.experts_per_token)

    def _layers_weight_count(self, experts: int) -> int:
        moe_layer = (
            experts * self.expert_weight_count + self.shared_weight_count + self.router_weight_count
        )
        return (
            self.layers_count * self.attention_weight_count_per_layer
            + self.dense_layers_count * self.dense_weight_count
            + self.moe_layers_count * moe_layer
        )


def catalogue() -> tuple[str, ...]:
    """Names of the known models, sorted."""
    return tuple(sorted(_tables()))


def from_catalogue(name: str, weight_dtype: str = "", kv_dtype: str = "") -> ModelArchitecture:
    """Look a model up by name; case and a leading organization ("Qwen/") do not matter.

    Args:
        name: One of `catalogue()`.
        weight_dtype: Format of the weights if it differs from the published one.
        kv_dtype: Format of the KV cache; empty means bf16.

    Raises:
        ArchitectureError: If the name or a format is not known.
    """
    key = name.rsplit("/", 1)[-1].lower()
    table = _tables().get(key)
    if table is None:
        raise ArchitectureError(
            f"model is {name!r}; allowed: {', '.join(catalogue())}, or any model with its "
            "config.json"
        )
    known = {field.name for field in fields(ModelArchitecture)}
    values = {item: value for item, value in table.items() if item in known}
    return with_dtypes(ModelArchitecture(name=key, **values), weight_dtype, kv_dtype)


def from_config_json(
    text: str, name: str = "", weight_dtype: str = "", kv_dtype: str = ""
) -> ModelArchitecture:
    """Read the dimensions from the text of a Hugging Face config.json.

    Understands the keys of Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and V3, gpt-oss, OLMoE,
    Llama-4 (its text part), GLM-4-MoE, and dense Llama, Mistral and Qwen.

    Args:
        text: The file's content.
        name: Model name; empty means the name in the file, or its model type.
        weight_dtype: Format of the weights; empty means what the file says.
        kv_dtype: Format of the KV cache; empty means bf16.

    Raises:
        ArchitectureError: If the text is no JSON object, or lacks keys (all are named).
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ArchitectureError(f"config.json cannot be read as JSON: {error}") from None
    if not isinstance(document, Mapping):
        raise ArchitectureError(
            f"config.json holds a {type(document).__name__}; allowed: one JSON object"
        )
    config = {**document, **(document.get("text_config") or {})}
    _refuse_unknown_layers(config)
    named = name or str(config.get("_name_or_path") or config.get("model_type") or "unnamed")
    try:
        values = _dimensions(config)
        return ModelArchitecture(
            name=named.rstrip("/").rsplit("/", 1)[-1].lower(),
            **values,
            weight_dtype=_dtype(weight_dtype) or _weight_dtype(config),
            kv_dtype=_dtype(kv_dtype) or "bf16",
        )
    except (TypeError, ValueError) as error:
        raise ArchitectureError(
            f"config.json of {named}: a dimension has a wrong type: {error}"
        ) from None


def with_dtypes(
    architecture: ModelArchitecture, weight_dtype: str = "", kv_dtype: str = ""
) -> ModelArchitecture:
    """The same model stored in other formats; empty keeps a format.

    Raises:
        ArchitectureError: If a format is not known.
    """
    return replace(
        architecture,
        weight_dtype=_dtype(weight_dtype) or architecture.weight_dtype,
        kv_dtype=_dtype(kv_dtype) or architecture.kv_dtype,
    )


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads((files("predictors") / "catalogue.toml").read_text("utf-8"))


def _dtype(name: str) -> str:
    """Our name of a format; empty for what leaves the choice to the engine."""
    key = name.strip().lower()
    return "" if key in {"", "auto"} else _DTYPE_ALIASES.get(key, key)


def _dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every dimension that the keys of a config.json give."""
    is_moe = any(
        config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")
    )
    is_mla = bool(config.get("kv_lora_rank"))
    wanted: dict[str, tuple[str, ...]] = {
        "layers_count": ("num_hidden_layers",),
        "hidden_size": ("hidden_size",),
        "vocabulary_size": ("vocab_size",),
        "attention_heads_count": ("num_attention_heads",),
        "expert_intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    }
    if is_moe:
        wanted["experts_count"] = ("num_local_experts", "num_experts", "n_routed_experts")
        wanted["experts_per_token"] = ("num_experts_per_tok", "experts_per_token", "moe_topk")
    if is_mla:
        wanted["kv_lora_rank"] = ("kv_lora_rank",)
        wanted["rope_head_dimension"] = ("qk_rope_head_dim",)
        wanted["head_dimension"] = ("qk_nope_head_dim",)
    found: dict[str, Any] = {"experts_count": 1, "experts_per_token": 1}
    missing = []
    for field, keys in wanted.items():
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        if value is None:
            missing.append(" or ".join(keys))
        else:
            found[field] = int(value)
    if missing:
        kind = config.get("model_type", "unknown")
        raise ArchitectureError(
            f"config.json of model type {kind!r} lacks {'; '.join(missing)}; add these keys, or "
            f"name a model of the catalogue: {', '.join(catalogue())}"
        )
    heads = found["attention_heads_count"]
    found["kv_heads_count"] = int(config.get("num_key_value_heads") or heads)
    if is_mla:
        found["attention"] = "mla"
        found["q_lora_rank"] = int(config.get("q_lora_rank") or 0)
    else:
        found["head_dimension"] = int(config.get("head_dim") or found["hidden_size"] // heads)
    found["tied_embeddings"] = bool(config.get("tie_word_embeddings", False))
    if is_moe:
        found |= _experts_beside_the_routed(config, found)
    return found | _sliding(config, found["layers_count"])


def _experts_beside_the_routed(
    config: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, int]:
    """Shared experts, and the layers that have no routed experts."""
    layers, inner = found["layers_count"], found["expert_intermediate_size"]
    is_llama4 = str(config.get("model_type", "")).startswith("llama4")
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    shared = shared or int(config.get("n_shared_experts") or 0) * inner
    if is_llama4:
        shared = inner  # one shared expert, as wide as a routed one; no key says so
    step = int(config.get("interleave_moe_layer_step") or config.get("decoder_sparse_step") or 1)
    dense = int(config.get("first_k_dense_replace") or 0) + layers - layers // max(step, 1)
    dense = max(dense, len(config.get("mlp_only_layers") or ()))
    if not dense:
        return {"shared_intermediate_size": shared}
    width = config.get("intermediate_size_mlp" if is_llama4 else "intermediate_size") or 0
    return {
        "shared_intermediate_size": shared,
        "dense_layers_count": dense,
        "dense_intermediate_size": int(width),
    }


def _sliding(config: Mapping[str, Any], layers: int) -> dict[str, int]:
    """Windowed layers. Llama-4 attends within chunks, at most one chunk wide: taken as a window."""
    chunk = config.get("attention_chunk_size")
    window = int(chunk or config.get("sliding_window") or 0)
    if not window or config.get("use_sliding_window") is False:
        return {}
    if kinds := config.get("layer_types"):
        count = sum(kind in {"sliding_attention", "chunked_attention"} for kind in kinds)
    elif chunk:  # layers that know positions are chunked: three of four, unless listed
        listed = config.get("no_rope_layers")
        count = sum(map(bool, listed)) if listed else layers - layers // 4
    else:
        count = layers
    return {"sliding_window_tokens": window, "sliding_layers_count": count} if count else {}


def _refuse_unknown_layers(config: Mapping[str, Any]) -> None:
    """Hybrid models keep their dimensions in familiar keys and yet work differently."""
    known = {"full_attention", "sliding_attention", "chunked_attention"}
    if other := sorted(set(config.get("layer_types") or ()) - known):
        raise ArchitectureError(
            f"layer_types of config.json holds {', '.join(other)}; allowed: "
            f"{', '.join(sorted(known))}"
        )


def _weight_dtype(config: Mapping[str, Any]) -> str:
    """Format of the weights by a config.json."""
    quantization = config.get("quantization_config")
    if not quantization:
        return _dtype(str(config.get("dtype") or config.get("torch_dtype") or "bf16"))
    method = str(quantization.get("quant_method", "")).lower()
    if method == "fp8":
        return "fp8_block" if quantization.get("weight_block_size") else "fp8"
    named = _dtype(method)
    if named not in DTYPE_BYTES:
        raise ArchitectureError(
            f"quant_method of config.json is {method!r}, which leaves the format of the weights "
            f"open; give weight_dtype, one of {', '.join(DTYPE_BYTES)}"
        )
    return named
