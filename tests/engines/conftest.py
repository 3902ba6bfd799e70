from __future__ import annotations

import pytest

from throttle.control.state import EngineProfile, Mode, Role, Slos


@pytest.fixture
def vllm_profile():
    """What the daemon makes of the recorded vLLM's registration."""
    return EngineProfile(
        engine_id="vllm",
        engine_name="vllm",
        engine_version="0.32.0",
        model_name="",
        model_config_json="{}",
        weight_dtype="",
        kv_dtype="",
        tensor_parallel_count=1,
        pipeline_parallel_count=1,
        data_parallel_count=1,
        expert_parallel_count=1,
        gpu_uuids=("GPU-a",),
        role=Role.MIXED,
        running_requests_limit=8,
        batched_tokens_limit=128,
        kv_blocks_count=40,
        kv_block_tokens=32,
        default_slos=Slos(),
        mode=Mode.SHADOW,
        lease_seconds=5.0,
    )
