"""Model dimensions: the catalogue and config.json."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict
from importlib.resources import files

import pytest

from predictors.architecture import catalogue, from_catalogue, from_config_json
from predictors.errors import ArchitectureError

PUBLISHED = tomllib.loads((files("predictors") / "catalogue.toml").read_text("utf-8"))

CONFIGS = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 102400,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "quantization_config": {"quant_method": "mxfp4"},
        "sliding_window": 128,
        "vocab_size": 201088,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "torch_dtype": "bfloat16",
        "vocab_size": 50304,
    },
    "llama-4-scout": {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text",
            "attention_chunk_size": 8192,
            "head_dim": 128,
            "hidden_size": 5120,
            "interleave_moe_layer_step": 1,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "no_rope_layers": [],
            "num_attention_heads": 40,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "vocab_size": 202048,
        },
        "torch_dtype": "bfloat16",
    },
    "glm-4.5-air": {
        "model_type": "glm4_moe",
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "torch_dtype": "bfloat16",
        "vocab_size": 151552,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
}


@pytest.mark.parametrize("name", catalogue())
def test_catalogue_meets_the_published_parameter_count(name):
    total = from_catalogue(name).total_parameters_count / 1e9
    assert total == pytest.approx(PUBLISHED[name]["total_parameters_billions"], rel=0.015)


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("mixtral-8x7b", 131072),
        ("qwen3-30b-a3b", 98304),
        ("qwen3-235b-a22b", 192512),
        ("deepseek-v3", 70272),
        ("deepseek-v2-lite", 31104),
        ("gpt-oss-120b", 73728),
        ("llama-4-scout", 196608),
        ("glm-4.5-air", 188416),
    ],
)
def test_kv_bytes_per_token_are_those_of_the_layout(name, kv_bytes):
    assert from_catalogue(name).kv_bytes_per_token == kv_bytes


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_config_json_gives_the_catalogue_entry(name):
    read = from_config_json(json.dumps(CONFIGS[name]), name)
    assert asdict(read) == asdict(from_catalogue(name))


def test_names_may_carry_an_organization_and_capitals():
    assert from_catalogue("Qwen/Qwen3-30B-A3B").name == "qwen3-30b-a3b"


def test_engine_spellings_of_formats_are_understood():
    model = from_catalogue("qwen3-30b-a3b", weight_dtype="float8_e4m3fn", kv_dtype="fp8_e4m3")
    assert (model.weight_dtype, model.weight_bytes, model.kv_bytes) == ("fp8", 1.0, 1.0)
    assert from_catalogue("qwen3-30b-a3b", "auto", "auto").weight_dtype == "bf16"


def test_four_bit_experts_leave_attention_in_sixteen_bits():
    model = from_catalogue("gpt-oss-20b")
    assert (model.weight_bytes, model.attention_weight_bytes) == (0.53, 2.0)


def test_unknown_name_lists_what_is_known():
    with pytest.raises(ArchitectureError, match=r"'gpt-9'; allowed: .*qwen3-30b-a3b"):
        from_catalogue("gpt-9")


def test_missing_keys_are_all_named():
    config = {"model_type": "strange", "hidden_size": 64, "num_experts": 4}
    with pytest.raises(ArchitectureError) as raised:
        from_config_json(json.dumps(config))
    for key in ("num_hidden_layers", "vocab_size", "num_attention_heads", "moe_intermediate_size"):
        assert key in str(raised.value)
    assert "num_experts_per_tok" in str(raised.value)
    assert "strange" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "one JSON object"),
        (json.dumps(CONFIGS["olmoe-1b-7b"] | {"hidden_size": "wide"}), "wrong type"),
        (json.dumps(CONFIGS["olmoe-1b-7b"] | {"num_experts_per_tok": 65}), "experts_per_token"),
        (json.dumps(CONFIGS["olmoe-1b-7b"] | {"torch_dtype": "int3"}), "weight_dtype"),
        (
            json.dumps(CONFIGS["olmoe-1b-7b"] | {"layer_types": ["linear_attention"]}),
            "linear_attention",
        ),
        (
            json.dumps(CONFIGS["olmoe-1b-7b"] | {"quantization_config": {"quant_method": "x"}}),
            "quant_method",
        ),
    ],
)
def test_config_that_cannot_be_understood_is_refused(text, said):
    with pytest.raises(ArchitectureError, match=said):
        from_config_json(text)
