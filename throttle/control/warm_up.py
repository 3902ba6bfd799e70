"""Decisions about no engine, so that the first real one waits for no compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from throttle.control.controller import Controller
from throttle.control.settings import ControlSettings
from throttle.control.state import (
    EngineProfile,
    EventKind,
    IterationState,
    Mode,
    Phase,
    RequestEvent,
    RequestProgress,
    Role,
    ScheduledRequests,
    Slos,
)

if TYPE_CHECKING:
    from predictors.prediction import Predictor

_PROFILE = EngineProfile(
    engine_id="warm-up",
    engine_name="",
    engine_version="",
    model_name="",
    model_config_json="",
    weight_dtype="bf16",
    kv_dtype="bf16",
    tensor_parallel_count=1,
    pipeline_parallel_count=1,
    data_parallel_count=1,
    expert_parallel_count=1,
    gpu_uuids=("GPU-warm-up",),
    role=Role.MIXED,
    running_requests_limit=8,
    batched_tokens_limit=512,
    kv_blocks_count=10_000,
    kv_block_tokens=16,
    default_slos=Slos(1.0, 0.1, 0.05, 60.0),
    mode=Mode.SHADOW,
    lease_seconds=5.0,
)


#: So many states, so far apart, that load and prompt work are known before the last.
_STATES_COUNT = 64
_STEP_SECONDS = 0.2


def warm_up(predictor: Predictor) -> None:
    """Compile, or load from where compiled code is kept, all that a decision runs through."""
    controller = Controller(_PROFILE, predictor, ControlSettings())
    for number in range(_STATES_COUNT):
        state = _state(number)
        controller.observe(state, 0)
        controller.decide(state)


def _state(number: int) -> IterationState:
    """One of many: a prompt computed in every other, so that the load becomes known."""
    prompts = number % 2
    arrivals = tuple(RequestEvent(EventKind.ARRIVED, each, prompt_tokens=256) for each in (1, 2, 3))
    return IterationState(
        sequence_number=number + 1,
        phase=Phase.COMPLETED,
        engine_time_seconds=1.0 + _STEP_SECONDS * number,
        iteration_duration_seconds=0.01,
        scheduled=ScheduledRequests(
            num_prefill_requests=prompts,
            sum_prefill_tokens=256 * prompts,
            num_decode_requests=1,
            sum_decode_kv_tokens=300,
        ),
        progress=RequestProgress([1, 2], [256, 128], [1 + number, 0]),
        request_events=arrivals if number == 0 else (),
    )
