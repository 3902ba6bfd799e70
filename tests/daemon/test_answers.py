from __future__ import annotations

import pytest

from throttle.control.evaluation import ClockRow, Evaluation
from throttle.control.selection import Binding, Decision, Reason
from throttle.control.slack import Slo
from throttle.daemon.answers import decision_message, evaluation_message
from throttle.v1 import decision_pb2


def test_a_decision_becomes_a_message():
    decision = Decision(
        1500,
        Reason.SLACK,
        Binding(Slo.TPOT, 7, -0.25),
        predicted_iteration_seconds=0.02,
        predicted_iteration_upper_seconds=0.025,
        predicted_power_watts=400.0,
        predicted_default_iteration_seconds=0.015,
        predicted_default_power_watts=600.0,
        cruise_clock_mhz=1200,
        lost_requests_count=3,
        long_run_power_watts=250.0,
        default_long_run_power_watts=500.0,
    )
    message = decision_message(
        decision, 42, applied=True, applied_clock_mhz=1485, decision_duration_seconds=1e-4
    )
    assert message == decision_pb2.Decision(
        sequence_number=42,
        target_clock_mhz=1500,
        reason=decision_pb2.DECISION_REASON_SLACK,
        binding_limit=decision_pb2.BindingLimit(
            slo=decision_pb2.SLO_KIND_TPOT, request_number=7, slack_seconds=-0.25
        ),
        applied=True,
        applied_clock_mhz=1485,
        predicted_iteration_seconds=0.02,
        predicted_iteration_upper_seconds=0.025,
        predicted_power_watts=400.0,
        cruise_clock_mhz=1200,
        lost_requests_count=3,
        decision_duration_seconds=1e-4,
        predicted_default_power_watts=600.0,
        predicted_default_iteration_seconds=0.015,
        long_run_power_watts=250.0,
        default_long_run_power_watts=500.0,
    )


def test_reasons_and_limits_have_the_protocols_numbers():
    for reason in Reason:
        assert decision_pb2.DecisionReason.Name(reason) == f"DECISION_REASON_{reason.name}"
    for slo in Slo:
        assert decision_pb2.SloKind.Name(slo) == f"SLO_KIND_{slo.name}"
    assert len(decision_pb2.DecisionReason.keys()) == len(Reason) + 1


def test_an_evaluation_becomes_rows_with_their_energy():
    row = ClockRow(
        1200, 0.02, 0.03, 500.0, None, 0.002, feasible=True, slacks=(Binding(Slo.TTFT, 1, 0.5),)
    )
    message = evaluation_message(Evaluation(Decision(1200, Reason.CRUISE), (row,)), 3, "b", 0.001)
    assert message.bundle == "b"
    assert message.decision.sequence_number == 3
    assert not message.decision.HasField("binding_limit")
    assert message.clocks[0].iteration_energy_joules == pytest.approx(10.0)
    assert not message.clocks[0].HasField("long_run_power_watts")
    assert message.clocks[0].late_ratio == 0.002
    assert message.clocks[0].slacks[0].slo == decision_pb2.SLO_KIND_TTFT
