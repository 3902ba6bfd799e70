"""What the engine said, as validated values.

The field meanings and units are those of `proto/throttle/v1/engine.proto`. These values are built
once, at the boundary, and never changed after.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Phase(enum.IntEnum):
    """When, in the life of an iteration, a state was taken (values as in the protocol)."""

    PLANNED = 1
    COMPLETED = 2
    HEARTBEAT = 3


class EventKind(enum.IntEnum):
    """What happened to a request (values as in the protocol)."""

    ARRIVED = 1
    FIRST_TOKEN = 2
    FINISHED = 3
    PREEMPTED = 4
    ABORTED = 5


class Mode(enum.IntEnum):
    """What the service may do with the engine's GPUs (values as in the protocol)."""

    ACT = 1
    SHADOW = 2
    RECORD = 3


class Role(enum.IntEnum):
    """Which phases of a request an engine runs (values as in the protocol)."""

    PREFILL = 1
    DECODE = 2
    MIXED = 3


class TimingSource(enum.IntEnum):
    """How an iteration's duration was measured (values as in the protocol)."""

    HOST_STEP = 1
    HOST_INTERVAL = 2
    GPU_EVENT = 3


@dataclass(frozen=True, slots=True)
class Slos:
    """Latency limits in seconds; None means that the limit does not apply."""

    ttft_seconds: float | None = None
    tbt_seconds: float | None = None
    tpot_seconds: float | None = None
    e2e_seconds: float | None = None

    def over(self, defaults: Slos) -> Slos:
        """These limits, and where one is missing, the default's."""
        return Slos(
            self.ttft_seconds if self.ttft_seconds is not None else defaults.ttft_seconds,
            self.tbt_seconds if self.tbt_seconds is not None else defaults.tbt_seconds,
            self.tpot_seconds if self.tpot_seconds is not None else defaults.tpot_seconds,
            self.e2e_seconds if self.e2e_seconds is not None else defaults.e2e_seconds,
        )


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """Who the engine is and what it cannot exceed."""

    engine_id: str
    engine_name: str
    engine_version: str
    model_name: str
    model_config_json: str
    weight_dtype: str
    kv_dtype: str
    tensor_parallel_count: int
    pipeline_parallel_count: int
    data_parallel_count: int
    expert_parallel_count: int
    gpu_uuids: tuple[str, ...]
    role: Role
    running_requests_limit: int
    batched_tokens_limit: int
    kv_blocks_count: int
    kv_block_tokens: int
    default_slos: Slos
    mode: Mode
    lease_seconds: float
    wants_advice: bool = False


@dataclass(frozen=True, slots=True)
class ScheduledRequests:
    """Work of one iteration; names and meanings of ForwardPassMetrics."""

    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0
    var_prefill_length: float = 0.0
    sum_prefill_kv_tokens: int = 0
    num_decode_requests: int = 0
    sum_decode_kv_tokens: int = 0
    var_decode_kv_tokens: float = 0.0
    num_decode_tokens: int | None = None
    prefill_attention_pairs: float | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing runs."""
        return self.num_prefill_requests == 0 and self.num_decode_requests == 0


@dataclass(frozen=True, slots=True)
class QueuedRequests:
    """Work that waits; names and meanings of ForwardPassMetrics."""

    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0
    var_prefill_length: float = 0.0
    num_decode_requests: int = 0
    sum_decode_kv_tokens: int = 0
    var_decode_kv_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class KvCache:
    """Fill of the paged KV cache; None where the engine does not say."""

    used_blocks_count: int | None = None
    total_blocks_count: int | None = None
    usage_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class SpeculativeDecoding:
    """Drafted and accepted tokens of one iteration."""

    draft_tokens_count: int
    accepted_tokens_count: int


@dataclass(frozen=True, slots=True)
class WorkCounters:
    """The engine's own count of work for one GPU and iteration."""

    flops_count: float
    read_bytes: float
    write_bytes: float


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Expert load of one iteration; None where the engine does not say."""

    balancedness_ratio: float | None = None
    mean_active_experts_count: float | None = None


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """One event in a request's life; `age_seconds` before the state's engine time."""

    kind: EventKind
    request_number: int
    age_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    max_output_tokens: int | None = None
    predicted_output_tokens: int | None = None
    slos: Slos = Slos()
    length_class: str = ""


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """Where every running request stands; three sequences of one length."""

    request_numbers: Sequence[int]
    computed_prompt_tokens: Sequence[int]
    generated_tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class IterationState:
    """What one iteration holds."""

    sequence_number: int
    phase: Phase
    engine_time_seconds: float
    iteration_duration_seconds: float | None = None
    timing_source: TimingSource = TimingSource.HOST_INTERVAL
    scheduled: ScheduledRequests = ScheduledRequests()
    queued: QueuedRequests = QueuedRequests()
    kv_cache: KvCache = KvCache()
    progress: RequestProgress | None = None
    request_events: Sequence[RequestEvent] = ()
    speculative_decoding: SpeculativeDecoding | None = None
    work_counters: WorkCounters | None = None
    expert_load: ExpertLoad | None = None
