"""The boundary: protocol messages in, validated values out.

Everything behind this module may trust its values. Checks are written by hand: a state passes here
after every iteration, and this costs some 20 microseconds for a batch of 64 requests.
"""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING, Final, TypeVar

from throttle.control.state import (
    EngineProfile,
    EventKind,
    ExpertLoad,
    IterationState,
    KvCache,
    Mode,
    Phase,
    QueuedRequests,
    RequestEvent,
    RequestProgress,
    Role,
    ScheduledRequests,
    Slos,
    SpeculativeDecoding,
    TimingSource,
    WorkCounters,
)
from throttle.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from throttle.v1 import engine_pb2

#: Limits of a lease, seconds, and what 0 stands for.
LEASE_MINIMUM_SECONDS: Final = 0.1
LEASE_MAXIMUM_SECONDS: Final = 60.0
LEASE_DEFAULT_SECONDS: Final = 5.0

_Member = TypeVar("_Member", bound=enum.IntEnum)

_ENGINE_ID_CHARACTERS = 128
_WEIGHT_DTYPES = ("bf16", "fp8", "fp8_block", "mxfp4")
_KV_DTYPES = ("bf16", "fp8")

_PHASES: Mapping[int, Phase] = {int(phase): phase for phase in Phase}
_EVENT_KINDS: Mapping[int, EventKind] = {int(kind): kind for kind in EventKind}
_MODES: Mapping[int, Mode] = {0: Mode.SHADOW, **{int(mode): mode for mode in Mode}}
_ROLES: Mapping[int, Role] = {0: Role.MIXED, **{int(role): role for role in Role}}
_TIMING_SOURCES: Mapping[int, TimingSource] = {
    0: TimingSource.HOST_INTERVAL,
    **{int(source): source for source in TimingSource},
}

_NO_SLOS = Slos()
_NOT_SCHEDULED = ScheduledRequests()
_NOT_QUEUED = QueuedRequests()
_NO_KV = KvCache()


def read_registration(message: engine_pb2.EngineRegistration) -> EngineProfile:
    """Validate a registration.

    Raises:
        InvalidInputError: Names the first field that is not allowed, under `registration.`.
    """
    identifier = message.engine_id
    if not 1 <= len(identifier) <= _ENGINE_ID_CHARACTERS or not identifier.isprintable():
        raise InvalidInputError(
            "registration.engine_id",
            identifier,
            f"1 to {_ENGINE_ID_CHARACTERS} printable characters",
        )
    uuids = tuple(message.gpu_uuids)
    if not uuids or not all(uuids) or len(set(uuids)) != len(uuids):
        raise InvalidInputError("registration.gpu_uuids", uuids, "at least one UUID, each once")
    model = message.model
    if not model.name and not model.config_json:
        raise InvalidInputError(
            "registration.model.name", "", "a name in the catalogue, or config_json instead"
        )
    _one_of("registration.model.weight_dtype", model.weight_dtype, _WEIGHT_DTYPES)
    _one_of("registration.model.kv_dtype", model.kv_dtype, _KV_DTYPES)
    spread, limits = message.parallelism, message.limits
    prefix = "registration.parallelism."
    return EngineProfile(
        engine_id=identifier,
        engine_name=message.engine_name,
        engine_version=message.engine_version,
        model_name=model.name,
        model_config_json=model.config_json,
        weight_dtype=model.weight_dtype,
        kv_dtype=model.kv_dtype,
        tensor_parallel_count=_count(
            prefix + "tensor_parallel_count", spread.tensor_parallel_count or 1, 1
        ),
        pipeline_parallel_count=_count(
            prefix + "pipeline_parallel_count", spread.pipeline_parallel_count or 1, 1
        ),
        data_parallel_count=_count(
            prefix + "data_parallel_count", spread.data_parallel_count or 1, 1
        ),
        expert_parallel_count=_count(
            prefix + "expert_parallel_count", spread.expert_parallel_count or 1, 1
        ),
        gpu_uuids=uuids,
        role=_enum("registration.role", message.role, _ROLES),
        running_requests_limit=_count(
            "registration.limits.running_requests_count", limits.running_requests_count, 1
        ),
        batched_tokens_limit=_count(
            "registration.limits.batched_tokens_count", limits.batched_tokens_count, 1
        ),
        kv_blocks_count=_count("registration.limits.kv_blocks_count", limits.kv_blocks_count, 1),
        kv_block_tokens=_count("registration.limits.kv_block_tokens", limits.kv_block_tokens, 1),
        default_slos=_read_slos("registration.default_slos", message.default_slos),
        mode=_enum("registration.mode", message.mode, _MODES),
        lease_seconds=_read_lease(message.lease_timeout_seconds),
        wants_advice=message.wants_advice,
    )


class StateReader:
    """Validates the states of one stream, each against the registration and the one before."""

    def __init__(self, profile: EngineProfile) -> None:
        self._kv_blocks_count = profile.kv_blocks_count
        self._sequence_number = -1
        self._engine_time_seconds = -math.inf

    def read(self, message: engine_pb2.IterationState) -> IterationState:
        """Validate a state.

        Raises:
            InvalidInputError: Names the first field that is not allowed, under `state.`.
        """
        number = message.sequence_number
        if number <= self._sequence_number:
            raise InvalidInputError(
                "state.sequence_number", number, f"above the last one's, {self._sequence_number}"
            )
        now = message.engine_time_seconds
        if not math.isfinite(now) or now < self._engine_time_seconds:
            raise InvalidInputError(
                "state.engine_time_seconds",
                now,
                f"finite, not below the last one's, {self._engine_time_seconds}",
            )
        state = self._read(message, number, now)
        self._sequence_number = number
        self._engine_time_seconds = now
        return state

    def _read(self, message: engine_pb2.IterationState, number: int, now: float) -> IterationState:
        has = message.HasField
        phase = _enum("state.phase", message.phase, _PHASES)
        duration = None
        if has("iteration_duration_seconds"):
            duration = message.iteration_duration_seconds
            if not 0 < duration < math.inf:
                raise InvalidInputError(
                    "state.iteration_duration_seconds", duration, "finite, above 0"
                )
        elif phase is Phase.COMPLETED:
            raise InvalidInputError(
                "state.iteration_duration_seconds", None, "a value when the phase is COMPLETED"
            )
        events = message.request_events
        return IterationState(
            number,
            phase,
            now,
            duration,
            _enum("state.timing_source", message.timing_source, _TIMING_SOURCES),
            _read_scheduled(message.scheduled) if has("scheduled") else _NOT_SCHEDULED,
            _read_queued(message.queued) if has("queued") else _NOT_QUEUED,
            self._read_kv_cache(message.kv_cache) if has("kv_cache") else _NO_KV,
            _read_progress(message.progress) if has("progress") else None,
            tuple(_read_event(index, event) for index, event in enumerate(events))
            if events
            else (),
            _read_speculation(message.speculative_decoding)
            if has("speculative_decoding")
            else None,
            _read_work(message.work_counters) if has("work_counters") else None,
            _read_expert_load(message.expert_load) if has("expert_load") else None,
        )

    def _read_kv_cache(self, message: engine_pb2.KvCache) -> KvCache:
        has = message.HasField
        total = used = ratio = None
        if has("total_blocks_count"):
            total = _count("state.kv_cache.total_blocks_count", message.total_blocks_count, 1)
        if has("used_blocks_count"):
            used = message.used_blocks_count
            capacity = self._kv_blocks_count if total is None else total
            if not 0 <= used <= capacity:
                raise InvalidInputError(
                    "state.kv_cache.used_blocks_count", used, f"0 to the capacity, {capacity}"
                )
        if has("usage_ratio"):
            ratio = _ratio("state.kv_cache.usage_ratio", message.usage_ratio)
        return KvCache(used, total, ratio)


def _read_lease(seconds: float) -> float:
    if seconds == 0:
        return LEASE_DEFAULT_SECONDS
    if not LEASE_MINIMUM_SECONDS <= seconds <= LEASE_MAXIMUM_SECONDS:
        raise InvalidInputError(
            "registration.lease_timeout_seconds",
            seconds,
            f"{LEASE_MINIMUM_SECONDS} to {LEASE_MAXIMUM_SECONDS}, or 0 for {LEASE_DEFAULT_SECONDS}",
        )
    return seconds


def _read_slos(prefix: str, message: engine_pb2.ServiceLevelObjectives) -> Slos:
    values: list[float | None] = []
    for name in ("ttft_seconds", "tbt_seconds", "tpot_seconds", "e2e_seconds"):
        if not message.HasField(name):
            values.append(None)
            continue
        value = getattr(message, name)
        if not 0 < value < math.inf:
            raise InvalidInputError(f"{prefix}.{name}", value, "finite, above 0")
        values.append(value)
    return Slos(*values)


def _read_scheduled(message: engine_pb2.ScheduledRequests) -> ScheduledRequests:
    prefix = "state.scheduled."
    return ScheduledRequests(
        _count(prefix + "num_prefill_requests", message.num_prefill_requests),
        _count(prefix + "sum_prefill_tokens", message.sum_prefill_tokens),
        _amount(prefix + "var_prefill_length", message.var_prefill_length),
        _count(prefix + "sum_prefill_kv_tokens", message.sum_prefill_kv_tokens),
        _count(prefix + "num_decode_requests", message.num_decode_requests),
        _count(prefix + "sum_decode_kv_tokens", message.sum_decode_kv_tokens),
        _amount(prefix + "var_decode_kv_tokens", message.var_decode_kv_tokens),
        _count(prefix + "num_decode_tokens", message.num_decode_tokens)
        if message.HasField("num_decode_tokens")
        else None,
        _amount(prefix + "prefill_attention_pairs", message.prefill_attention_pairs)
        if message.HasField("prefill_attention_pairs")
        else None,
    )


def _read_queued(message: engine_pb2.QueuedRequests) -> QueuedRequests:
    prefix = "state.queued."
    return QueuedRequests(
        _count(prefix + "num_prefill_requests", message.num_prefill_requests),
        _count(prefix + "sum_prefill_tokens", message.sum_prefill_tokens),
        _amount(prefix + "var_prefill_length", message.var_prefill_length),
        _count(prefix + "num_decode_requests", message.num_decode_requests),
        _count(prefix + "sum_decode_kv_tokens", message.sum_decode_kv_tokens),
        _amount(prefix + "var_decode_kv_tokens", message.var_decode_kv_tokens),
    )


def _read_progress(message: engine_pb2.RequestProgress) -> RequestProgress:
    # whole arrays at C speed: nothing is made per request
    numbers = message.request_numbers[:]
    computed = message.computed_prompt_tokens[:]
    generated = message.generated_tokens[:]
    if not len(numbers) == len(computed) == len(generated):
        raise InvalidInputError(
            "state.progress",
            f"{len(numbers)} request_numbers, {len(computed)} computed_prompt_tokens, "
            f"{len(generated)} generated_tokens",
            "three arrays of one length",
        )
    if numbers:
        if min(numbers) < 1 or len(set(numbers)) != len(numbers):
            raise InvalidInputError("state.progress.request_numbers", numbers, "from 1, each once")
        _count("state.progress.computed_prompt_tokens", min(computed))
        _count("state.progress.generated_tokens", min(generated))
    return RequestProgress(numbers, computed, generated)


def _read_event(index: int, message: engine_pb2.RequestEvent) -> RequestEvent:
    prefix = f"state.request_events[{index}]."
    kind = _enum(prefix + "kind", message.kind, _EVENT_KINDS)
    number = _count(prefix + "request_number", message.request_number, 1)
    age = _amount(prefix + "age_seconds", message.age_seconds)
    if kind is not EventKind.ARRIVED:
        generated = _count(prefix + "generated_tokens", message.generated_tokens)
        return RequestEvent(kind, number, age, generated_tokens=generated)
    prompt = _count(prefix + "prompt_tokens", message.prompt_tokens, 1)
    cached = message.cached_tokens
    if not 0 <= cached <= prompt:
        raise InvalidInputError(prefix + "cached_tokens", cached, f"0 to prompt_tokens, {prompt}")
    has = message.HasField
    return RequestEvent(
        kind,
        number,
        age,
        prompt,
        cached,
        0,
        _count(prefix + "max_output_tokens", message.max_output_tokens, 1)
        if has("max_output_tokens")
        else None,
        _count(prefix + "predicted_output_tokens", message.predicted_output_tokens, 1)
        if has("predicted_output_tokens")
        else None,
        _read_slos(prefix + "slos", message.slos) if has("slos") else _NO_SLOS,
        message.length_class,
    )


def _read_speculation(message: engine_pb2.SpeculativeDecoding) -> SpeculativeDecoding:
    prefix = "state.speculative_decoding."
    drafted = _count(prefix + "draft_tokens_count", message.draft_tokens_count)
    accepted = message.accepted_tokens_count
    if not 0 <= accepted <= drafted:
        raise InvalidInputError(
            prefix + "accepted_tokens_count", accepted, f"0 to draft_tokens_count, {drafted}"
        )
    return SpeculativeDecoding(drafted, accepted)


def _read_work(message: engine_pb2.WorkCounters) -> WorkCounters:
    prefix = "state.work_counters."
    return WorkCounters(
        _amount(prefix + "flops_count", message.flops_count),
        _amount(prefix + "read_bytes", message.read_bytes),
        _amount(prefix + "write_bytes", message.write_bytes),
    )


def _read_expert_load(message: engine_pb2.ExpertLoad) -> ExpertLoad:
    prefix = "state.expert_load."
    return ExpertLoad(
        _ratio(prefix + "balancedness_ratio", message.balancedness_ratio)
        if message.HasField("balancedness_ratio")
        else None,
        _amount(prefix + "mean_active_experts_count", message.mean_active_experts_count)
        if message.HasField("mean_active_experts_count")
        else None,
    )


def _count(field: str, value: int, minimum: int = 0) -> int:
    if value < minimum:
        raise InvalidInputError(field, value, f"{minimum} or more")
    return value


def _amount(field: str, value: float) -> float:
    if not 0 <= value < math.inf:  # false for NaN too
        raise InvalidInputError(field, value, "finite, 0 or more")
    return value


def _ratio(field: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise InvalidInputError(field, value, "0 to 1")
    return value


def _enum(field: str, value: int, known: Mapping[int, _Member]) -> _Member:
    member = known.get(value)
    if member is None:
        allowed = ", ".join(f"{number} ({name.name})" for number, name in known.items())
        raise InvalidInputError(field, value, allowed)
    return member


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value and value not in allowed:
        raise InvalidInputError(field, value, f"{', '.join(allowed)}, or empty")
