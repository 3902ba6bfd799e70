"""Engine profiles and states as protocol messages, as an engine's adapter would build them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from throttle.control.state import (
        EngineProfile,
        IterationState,
        KvCache,
        QueuedRequests,
        RequestEvent,
        ScheduledRequests,
        Slos,
    )


def registration_message(profile: EngineProfile) -> engine_pb2.EngineRegistration:
    """The first message of a stream."""
    return engine_pb2.EngineRegistration(
        engine_id=profile.engine_id,
        engine_name=profile.engine_name,
        engine_version=profile.engine_version,
        model=engine_pb2.ModelDescriptor(
            name=profile.model_name,
            config_json=profile.model_config_json,
            weight_dtype=profile.weight_dtype,
            kv_dtype=profile.kv_dtype,
        ),
        parallelism=engine_pb2.Parallelism(
            tensor_parallel_count=profile.tensor_parallel_count,
            pipeline_parallel_count=profile.pipeline_parallel_count,
            data_parallel_count=profile.data_parallel_count,
            expert_parallel_count=profile.expert_parallel_count,
        ),
        gpu_uuids=profile.gpu_uuids,
        role=engine_pb2.EngineRole.ValueType(profile.role),
        limits=engine_pb2.EngineLimits(
            running_requests_count=profile.running_requests_limit,
            batched_tokens_count=profile.batched_tokens_limit,
            kv_blocks_count=profile.kv_blocks_count,
            kv_block_tokens=profile.kv_block_tokens,
        ),
        default_slos=_slos(profile.default_slos),
        mode=engine_pb2.ControlMode.ValueType(profile.mode),
        lease_timeout_seconds=profile.lease_seconds,
    )


def state_message(state: IterationState) -> engine_pb2.IterationState:
    """One state; what the state leaves unknown stays unset."""
    message = engine_pb2.IterationState(
        sequence_number=state.sequence_number,
        phase=engine_pb2.IterationPhase.ValueType(state.phase),
        engine_time_seconds=state.engine_time_seconds,
        iteration_duration_seconds=state.iteration_duration_seconds,
        timing_source=engine_pb2.TimingSource.ValueType(state.timing_source),
        scheduled=_scheduled(state.scheduled),
        queued=_queued(state.queued),
        kv_cache=_kv_cache(state.kv_cache),
    )
    progress = state.progress
    if progress is not None:
        message.progress.SetInParent()
        message.progress.request_numbers.extend(progress.request_numbers)
        message.progress.computed_prompt_tokens.extend(progress.computed_prompt_tokens)
        message.progress.generated_tokens.extend(progress.generated_tokens)
    if state.request_events:
        message.request_events.extend([_event(event) for event in state.request_events])
    if state.speculative_decoding is not None:
        message.speculative_decoding.draft_tokens_count = (
            state.speculative_decoding.draft_tokens_count
        )
        message.speculative_decoding.accepted_tokens_count = (
            state.speculative_decoding.accepted_tokens_count
        )
    if state.work_counters is not None:
        message.work_counters.flops_count = state.work_counters.flops_count
        message.work_counters.read_bytes = state.work_counters.read_bytes
        message.work_counters.write_bytes = state.work_counters.write_bytes
    if state.expert_load is not None:
        message.expert_load.CopyFrom(
            engine_pb2.ExpertLoad(
                balancedness_ratio=state.expert_load.balancedness_ratio,
                mean_active_experts_count=state.expert_load.mean_active_experts_count,
            )
        )
    return message


def _scheduled(scheduled: ScheduledRequests) -> engine_pb2.ScheduledRequests:
    return engine_pb2.ScheduledRequests(
        num_prefill_requests=scheduled.num_prefill_requests,
        sum_prefill_tokens=scheduled.sum_prefill_tokens,
        var_prefill_length=scheduled.var_prefill_length,
        sum_prefill_kv_tokens=scheduled.sum_prefill_kv_tokens,
        num_decode_requests=scheduled.num_decode_requests,
        sum_decode_kv_tokens=scheduled.sum_decode_kv_tokens,
        var_decode_kv_tokens=scheduled.var_decode_kv_tokens,
        num_decode_tokens=scheduled.num_decode_tokens,
        prefill_attention_pairs=scheduled.prefill_attention_pairs,
    )


def _queued(queued: QueuedRequests) -> engine_pb2.QueuedRequests:
    return engine_pb2.QueuedRequests(
        num_prefill_requests=queued.num_prefill_requests,
        sum_prefill_tokens=queued.sum_prefill_tokens,
        var_prefill_length=queued.var_prefill_length,
        num_decode_requests=queued.num_decode_requests,
        sum_decode_kv_tokens=queued.sum_decode_kv_tokens,
        var_decode_kv_tokens=queued.var_decode_kv_tokens,
    )


def _kv_cache(kv_cache: KvCache) -> engine_pb2.KvCache:
    return engine_pb2.KvCache(
        used_blocks_count=kv_cache.used_blocks_count,
        total_blocks_count=kv_cache.total_blocks_count,
        usage_ratio=kv_cache.usage_ratio,
    )


def _event(event: RequestEvent) -> engine_pb2.RequestEvent:
    return engine_pb2.RequestEvent(
        kind=engine_pb2.RequestEventKind.ValueType(event.kind),
        request_number=event.request_number,
        age_seconds=event.age_seconds,
        prompt_tokens=event.prompt_tokens,
        cached_tokens=event.cached_tokens,
        generated_tokens=event.generated_tokens,
        max_output_tokens=event.max_output_tokens,
        predicted_output_tokens=event.predicted_output_tokens,
        slos=_slos(event.slos),
        length_class=event.length_class,
    )


def _slos(slos: Slos) -> engine_pb2.ServiceLevelObjectives:
    return engine_pb2.ServiceLevelObjectives(
        ttft_seconds=slos.ttft_seconds,
        tbt_seconds=slos.tbt_seconds,
        tpot_seconds=slos.tpot_seconds,
        e2e_seconds=slos.e2e_seconds,
    )
