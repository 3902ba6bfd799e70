"""Who a vLLM engine is, read from its configuration.

vLLM promises none of these attributes to plugins, so each is read by name with a default: a version
that lacks one costs that one fact, not the engine.
"""

from __future__ import annotations

import importlib
import logging
import socket
from typing import TYPE_CHECKING, Any

from throttle.engines.options import OptionsError
from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from throttle.engines.options import EngineOptions

_log = logging.getLogger("throttle.engines")

#: vLLM's names of weight quantization -> the protocol's; others are left to the model's config.
_WEIGHT_DTYPES = {"fp8": "fp8", "mxfp4": "mxfp4", "fbgemm_fp8": "fp8"}


def read_path(root: object, path: str, default: Any = None) -> Any:
    """The attribute at a dotted path; the default where any part is missing or None."""
    for name in path.split("."):
        root = getattr(root, name, None)
        if root is None:
            return default
    return root


def vllm_registration(
    vllm_config: object,
    options: EngineOptions,
    *,
    engine_index: int = 0,
    kv_blocks_count: int = 0,
    kv_block_tokens: int = 0,
) -> engine_pb2.EngineRegistration:
    """The registration of one vLLM engine core.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        options: What the operator said; wins over what vLLM says.
        engine_index: Data-parallel rank.
        kv_blocks_count: KV blocks where the caller knows better than the configuration; else 0.
        kv_block_tokens: Tokens per block, likewise.

    Raises:
        OptionsError: vLLM does not tell which GPUs it runs on and the operator did not either.
    """

    def count(path: str, default: int = 1) -> int:
        value = read_path(vllm_config, path, default)
        return int(value) if isinstance(value, int) and value > 0 else default

    tensor = count("parallel_config.tensor_parallel_size")
    pipeline = count("parallel_config.pipeline_parallel_size")
    data = count("parallel_config.data_parallel_size")
    expert = (
        tensor * data if read_path(vllm_config, "parallel_config.enable_expert_parallel") else 1
    )
    registration = engine_pb2.EngineRegistration(
        engine_id=f"vllm-{socket.gethostname()}",
        engine_name="vllm",
        engine_version=_version(),
        model=_model(vllm_config),
        parallelism=engine_pb2.Parallelism(
            tensor_parallel_count=tensor,
            pipeline_parallel_count=pipeline,
            data_parallel_count=1,  # each rank has an engine core and a stream of its own
            expert_parallel_count=expert,
        ),
        role=_role(vllm_config),
        limits=engine_pb2.EngineLimits(
            running_requests_count=count("scheduler_config.max_num_seqs"),
            batched_tokens_count=count("scheduler_config.max_num_batched_tokens"),
            kv_blocks_count=kv_blocks_count or count("cache_config.num_gpu_blocks"),
            kv_block_tokens=kv_block_tokens or count("cache_config.block_size", 16),
        ),
    )
    options.apply(registration)
    if data > 1:
        registration.engine_id += f"-{engine_index}"
    registration.gpu_uuids.extend(_gpu_uuids(options, tensor * pipeline, data, engine_index))
    return registration


def _gpu_uuids(
    options: EngineOptions, world: int, data_parallel: int, engine_index: int
) -> list[str]:
    if options.gpu_uuids:
        given = list(options.gpu_uuids)
        if len(given) == world * data_parallel and data_parallel > 1:
            return given[engine_index * world : (engine_index + 1) * world]
        return given
    start = engine_index * world if data_parallel > 1 else 0
    try:
        platform = importlib.import_module("vllm.platforms").current_platform
        return [str(platform.get_device_uuid(start + rank)) for rank in range(world)]
    except Exception as error:  # noqa: BLE001 - whatever a platform raises, the answer is the same
        raise OptionsError(
            f"vLLM does not tell the UUIDs of its GPUs ({type(error).__name__}: {error}); set "
            "THROTTLE_ENGINE_GPUS to them, separated by commas"
        ) from None


def _model(vllm_config: object) -> engine_pb2.ModelDescriptor:
    text = ""
    config = read_path(vllm_config, "model_config.hf_text_config") or read_path(
        vllm_config, "model_config.hf_config"
    )
    if config is not None and hasattr(config, "to_json_string"):
        text = str(config.to_json_string(use_diff=False))
    quantization = str(read_path(vllm_config, "model_config.quantization", ""))
    cache_dtype = str(read_path(vllm_config, "cache_config.cache_dtype", ""))
    return engine_pb2.ModelDescriptor(
        config_json=text,
        weight_dtype=_WEIGHT_DTYPES.get(quantization, ""),
        kv_dtype="fp8" if cache_dtype.startswith("fp8") else "",
    )


def _role(vllm_config: object) -> engine_pb2.EngineRole.ValueType:
    role = read_path(vllm_config, "kv_transfer_config.kv_role", "")
    if role == "kv_producer":
        return engine_pb2.ENGINE_ROLE_PREFILL
    if role == "kv_consumer":
        return engine_pb2.ENGINE_ROLE_DECODE
    return engine_pb2.ENGINE_ROLE_MIXED


def _version() -> str:
    try:
        return str(importlib.import_module("vllm").__version__)
    except (ImportError, AttributeError):
        return ""
