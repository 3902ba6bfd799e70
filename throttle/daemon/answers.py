"""The boundary, outwards: decisions and tables into protocol messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from throttle.actuation.backend import EventReason
from throttle.errors import ActuationError
from throttle.v1 import decision_pb2, throttle_service_pb2

if TYPE_CHECKING:
    from throttle.actuation.actuator import Actuator
    from throttle.actuation.backend import GpuReading
    from throttle.control.advice import Advice
    from throttle.control.evaluation import Evaluation
    from throttle.control.selection import Binding, Decision
    from throttle.daemon.attribution import EngineEnergy, GpuEnergy


def decision_message(
    decision: Decision,
    sequence_number: int,
    *,
    applied: bool,
    applied_clock_mhz: int,
    decision_duration_seconds: float,
) -> decision_pb2.Decision:
    """The protocol's form of a decision.

    Args:
        decision: What the controller says.
        sequence_number: The state that it answers.
        applied: Whether the target was applied.
        applied_clock_mhz: What the GPUs were last told; 0 for default clocks.
        decision_duration_seconds: Time spent on it, actuation left out.
    """
    return decision_pb2.Decision(
        sequence_number=sequence_number,
        target_clock_mhz=decision.target_clock_mhz,
        reason=decision_pb2.DecisionReason.ValueType(decision.reason),
        binding_limit=_binding_message(decision.binding) if decision.binding else None,
        applied=applied,
        applied_clock_mhz=applied_clock_mhz,
        predicted_iteration_seconds=decision.predicted_iteration_seconds,
        predicted_iteration_upper_seconds=decision.predicted_iteration_upper_seconds,
        predicted_power_watts=decision.predicted_power_watts,
        cruise_clock_mhz=decision.cruise_clock_mhz,
        lost_requests_count=decision.lost_requests_count,
        decision_duration_seconds=decision_duration_seconds,
        predicted_default_power_watts=decision.predicted_default_power_watts,
        predicted_default_iteration_seconds=decision.predicted_default_iteration_seconds,
        advice=_advice_message(decision.advice) if decision.advice else None,
        long_run_power_watts=decision.long_run_power_watts,
        default_long_run_power_watts=decision.default_long_run_power_watts,
    )


def evaluation_message(
    evaluation: Evaluation, sequence_number: int, bundle: str, decision_duration_seconds: float
) -> throttle_service_pb2.EvaluateResponse:
    """The protocol's form of the what-if table."""
    return throttle_service_pb2.EvaluateResponse(
        clocks=[
            decision_pb2.ClockEvaluation(
                clock_mhz=row.clock_mhz,
                iteration_seconds=row.iteration_seconds,
                iteration_upper_seconds=row.iteration_upper_seconds,
                power_watts=row.power_watts,
                iteration_energy_joules=row.iteration_seconds * row.power_watts,
                long_run_power_watts=row.long_run_power_watts,
                feasible=row.feasible,
                slacks=[_binding_message(slack) for slack in row.slacks],
                late_ratio=row.late_ratio,
            )
            for row in evaluation.rows
        ],
        decision=decision_message(
            evaluation.decision,
            sequence_number,
            applied=False,
            applied_clock_mhz=0,
            decision_duration_seconds=decision_duration_seconds,
        ),
        bundle=bundle,
    )


def energy_message(energy: EngineEnergy | None) -> throttle_service_pb2.EngineEnergy | None:
    """The protocol's form of an engine's energy; None for none."""
    if energy is None:
        return None
    return throttle_service_pb2.EngineEnergy(
        requests_joules=energy.requests_joules,
        idle_joules=energy.idle_joules,
        unassigned_joules=energy.unassigned_joules,
        pending_joules=energy.pending_joules,
        requests_count=energy.requests_count,
        recent_requests=[
            throttle_service_pb2.RequestEnergy(
                request_number=request.request_number,
                energy_joules=request.energy_joules,
                tokens_count=request.tokens_count,
            )
            for request in energy.recent_requests
        ],
    )


def gpu_message(
    gpu_uuid: str, actuator: Actuator, reading: GpuReading | ActuationError, energy: GpuEnergy
) -> throttle_service_pb2.GpuStatus:
    """The protocol's form of what is known of a GPU.

    Args:
        gpu_uuid: It.
        actuator: Knows what it was told and who holds it.
        reading: Its newest reading, or why there is none.
        energy: What it drew.
    """
    message = throttle_service_pb2.GpuStatus(
        gpu_uuid=gpu_uuid,
        target_clock_mhz=max(0, actuator.target_mhz(gpu_uuid)),
        clock_state=throttle_service_pb2.ClockState.ValueType(actuator.clock_state(gpu_uuid)),
        problem=actuator.problems().get(gpu_uuid, ""),
        engine_id=actuator.owner(gpu_uuid),
        energy_joules=energy.counted_joules,
        unattributed_energy_joules=energy.unattributed_joules,
    )
    if isinstance(reading, ActuationError):
        message.reading_problem = str(reading)
        return message
    message.observed_clock_mhz = reading.clock_mhz
    message.power_watts = reading.power_watts
    message.power_scope = reading.power_scope.value
    message.clock_event_reasons.extend(reason_names(reading.event_reasons))
    if reading.temperature_celsius is not None:
        message.temperature_celsius = reading.temperature_celsius
    return message


def reason_names(reasons: EventReason) -> list[str]:
    """Event reasons one by one, in lower case; bits that have no name are left out."""
    return [reason.name.lower() for reason in EventReason if reason in reasons and reason.name]


def _advice_message(advice: Advice) -> decision_pb2.Advice:
    return decision_pb2.Advice(
        admissions=[
            decision_pb2.AdmissionAdvice(
                request_number=each.request_number,
                verdict=decision_pb2.AdmissionVerdict.ValueType(each.verdict),
                reason=decision_pb2.AdmissionReason.ValueType(each.reason),
                first_token_seconds=each.first_token_seconds,
            )
            for each in advice.admissions
        ],
        load_headroom_ratio=advice.load_headroom_ratio,
        least_gpus_count=advice.least_gpus_count,
    )


def _binding_message(binding: Binding) -> decision_pb2.BindingLimit:
    return decision_pb2.BindingLimit(
        slo=decision_pb2.SloKind.ValueType(binding.slo),
        request_number=binding.request_number,
        slack_seconds=binding.slack_seconds,
    )
