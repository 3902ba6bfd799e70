from __future__ import annotations

from types import SimpleNamespace

import pytest

from throttle.daemon.config import load_config
from throttle.daemon.messages import read_registration
from throttle.engines.options import EngineOptions, OptionsError
from throttle.engines.vllm_registration import vllm_registration
from throttle.v1 import engine_pb2

ON = {"THROTTLE_ADDRESS": "unix:/run/t.sock", "THROTTLE_ENGINE_GPUS": "GPU-a"}


def vllm_config(**parallel):
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(to_json_string=lambda use_diff: '{"model_type": "x"}'),
            quantization="fp8",
        ),
        parallel_config=SimpleNamespace(
            **{"tensor_parallel_size": 1, "data_parallel_size": 1} | parallel
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=64, max_num_batched_tokens=2048),
        cache_config=SimpleNamespace(num_gpu_blocks=500, block_size=32, cache_dtype="fp8_e4m3"),
    )


def test_without_an_address_the_adapters_are_off():
    assert EngineOptions.from_environ({"THROTTLE_ENGINE_MODE": "act"}) is None


def test_a_new_engine_is_in_shadow_mode():
    assert EngineOptions.from_environ(ON).mode == engine_pb2.CONTROL_MODE_SHADOW


@pytest.mark.parametrize(
    ("name", "value"),
    [("MODE", "fast"), ("TTFT_SECONDS", "soon"), ("TPOT_SECONDS", "-1"), ("LEASE_SECONDS", "inf")],
)
def test_a_value_that_is_not_allowed_is_named(name, value):
    variable = f"THROTTLE_ENGINE_{name}"
    with pytest.raises(OptionsError, match=f"{variable} is {value!r}; allowed"):
        EngineOptions.from_environ(ON | {variable: value})


def test_the_daemon_beside_the_engine_may_share_its_environment():
    config = load_config({"simulated_gpus": "/x"}, ON | {"THROTTLE_ENGINES_LIMIT": "3"}, None)
    assert config.engines_limit == 3


def test_a_vllm_configuration_becomes_a_registration_that_the_daemon_accepts():
    options = EngineOptions.from_environ(
        ON | {"THROTTLE_ENGINE_MODE": "act", "THROTTLE_ENGINE_TPOT_SECONDS": "0.05"}
    )
    profile = read_registration(vllm_registration(vllm_config(), options))
    assert (profile.kv_blocks_count, profile.kv_block_tokens) == (500, 32)
    assert (profile.running_requests_limit, profile.batched_tokens_limit) == (64, 2048)
    assert (profile.weight_dtype, profile.kv_dtype) == ("fp8", "fp8")
    assert profile.model_config_json == '{"model_type": "x"}'
    assert profile.default_slos.tpot_seconds == 0.05
    assert profile.gpu_uuids == ("GPU-a",)


def test_what_the_operator_says_wins():
    options = EngineOptions.from_environ(
        ON | {"THROTTLE_ENGINE_ID": "mine", "THROTTLE_ENGINE_MODEL": "qwen3-30b-a3b"}
    )
    registration = vllm_registration(vllm_config(), options)
    assert registration.engine_id == "mine"
    assert registration.model.name == "qwen3-30b-a3b"
    assert not registration.model.config_json


def test_each_data_parallel_rank_is_an_engine_with_its_own_gpus():
    options = EngineOptions.from_environ(
        ON | {"THROTTLE_ENGINE_GPUS": "a,b,c,d", "THROTTLE_ENGINE_ID": "e"}
    )
    config = vllm_config(tensor_parallel_size=2, data_parallel_size=2, enable_expert_parallel=True)
    second = vllm_registration(config, options, engine_index=1)
    assert second.engine_id == "e-1"
    assert list(second.gpu_uuids) == ["c", "d"]
    assert second.parallelism.expert_parallel_count == 4


def test_an_empty_configuration_costs_facts_and_no_error():
    options = EngineOptions.from_environ(ON)
    registration = vllm_registration(SimpleNamespace(), options)
    assert registration.limits.kv_block_tokens == 16
    assert registration.role == engine_pb2.ENGINE_ROLE_MIXED


def test_gpus_that_nobody_names_are_asked_for():
    options = EngineOptions.from_environ({"THROTTLE_ADDRESS": "unix:/run/t.sock"})
    with pytest.raises(OptionsError, match="THROTTLE_ENGINE_GPUS"):
        vllm_registration(vllm_config(), options)


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("kv_producer", engine_pb2.ENGINE_ROLE_PREFILL),
        ("kv_consumer", engine_pb2.ENGINE_ROLE_DECODE),
        ("kv_both", engine_pb2.ENGINE_ROLE_MIXED),
    ],
)
def test_disaggregated_engines_tell_their_role(role, expected):
    config = vllm_config()
    config.kv_transfer_config = SimpleNamespace(kv_role=role)
    registration = vllm_registration(config, EngineOptions.from_environ(ON))
    assert registration.role == expected
