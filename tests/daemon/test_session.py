from __future__ import annotations

import pytest
import structlog

from throttle.actuation.local import LocalActuator
from throttle.daemon.brains import EngineBrain
from throttle.daemon.session import Session
from throttle.daemon.telemetry import GpuMeter
from throttle.errors import ActuationError, ConflictError
from throttle.v1 import decision_pb2, engine_pb2

REASON = decision_pb2.DecisionReason


@pytest.fixture
def open_session(actuator, brain, metrics, clock, registered):
    """Opens sessions and closes them at the end."""
    opened = []

    def make(profile=None, actuator=actuator, meter=None, engine_brain="scripted"):
        profile = profile or registered()
        session = Session(
            registration_id=f"registration-{len(opened)}",
            profile=profile,
            engine_brain=EngineBrain(brain, "scripted", ()) if engine_brain else None,
            actuator=actuator,
            meter=meter or GpuMeter(actuator.read, profile.gpu_uuids, clock),
            recording=None,
            metrics=metrics,
            clock=clock,
            log=structlog.get_logger(),
        )
        opened.append(session)
        return session

    yield make
    for session in opened:
        session.close()


def test_a_decision_is_applied_and_answered(open_session, arrival, gpus):
    decision = open_session().handle([arrival()])
    assert gpus.read_lock_mhz("GPU-a") == 900
    assert decision.applied
    assert (decision.target_clock_mhz, decision.applied_clock_mhz) == (900, 900)
    assert (decision.reason, decision.sequence_number) == (REASON.DECISION_REASON_CRUISE, 1)


def test_every_state_is_observed_in_order_and_the_newest_is_decided_on(
    open_session, arrival, brain
):
    decision = open_session().handle([arrival(), arrival(), arrival()])
    assert [number for number, _ in brain.observed] == [1, 2, 3]
    assert brain.decided == [3]
    assert decision.sequence_number == 3


def test_states_that_came_while_an_engine_waited_for_its_turn_overtake(
    open_session, arrival, brain
):
    decision = open_session().handle([arrival()], lambda: [arrival(), arrival()])
    assert [number for number, _ in brain.observed] == [1, 2, 3]
    assert brain.decided == [3]
    assert decision.sequence_number == 3


def test_the_clock_read_from_the_gpu_reaches_the_brain(open_session, arrival, brain, gpus):
    gpus.gpu("GPU-a").publish(1200.0, 300.0, 1.0, 1.0)
    open_session().handle([arrival()])
    assert brain.observed == [(1, 1200)]


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (engine_pb2.CONTROL_MODE_SHADOW, "DECISION_REASON_CRUISE"),
        (engine_pb2.CONTROL_MODE_RECORD, "DECISION_REASON_RECORDING"),
    ],
)
def test_other_modes_answer_and_touch_nothing(
    open_session, arrival, *, registered, gpus, actuator, mode, reason
):
    session = open_session(
        registered(mode), engine_brain="" if "RECORDING" in reason else "scripted"
    )
    writes = gpus.read_write_count("GPU-a")
    decision = session.handle([arrival()])
    assert not decision.applied
    assert decision.applied_clock_mhz == 0
    assert REASON.Name(decision.reason) == reason
    assert gpus.read_write_count("GPU-a") == writes
    assert actuator.owner("GPU-a") == ""
    assert session.lease_deadline_seconds is None


def test_silence_beyond_the_lease_returns_the_gpus_and_the_next_state_takes_them_again(
    open_session, arrival, gpus, clock, actuator
):
    session = open_session()
    assert session.lease_deadline_seconds is None  # nothing is at stake before the first state
    session.handle([arrival()])
    assert session.lease_deadline_seconds == clock.seconds + 2.0
    clock.seconds += 2.0
    expired = session.expire()
    assert gpus.read_lock_mhz("GPU-a") == 0
    assert (expired.reason, expired.sequence_number) == (REASON.DECISION_REASON_LEASE_EXPIRED, 1)
    assert actuator.owner("GPU-a") == ""
    assert session.lease_deadline_seconds is None
    assert session.handle([arrival()]).applied
    assert gpus.read_lock_mhz("GPU-a") == 900


def test_gpus_that_another_engine_took_meanwhile_stay_its_own(
    open_session, arrival, gpus, registered
):
    first = open_session()
    first.handle([arrival()])
    first.expire()
    second = open_session(registered(engine_id="second"))
    answer = first.handle([arrival()])
    assert answer.reason == REASON.DECISION_REASON_LEASE_EXPIRED
    assert not answer.applied
    assert gpus.read_lock_mhz("GPU-a") == 0
    assert second.handle([arrival()]).applied


def test_a_brain_that_raises_means_default_clocks_and_one_log_line_per_transition(
    logs, open_session, arrival, *, gpus, brain, registry
):
    session = open_session()
    session.handle([arrival()])
    brain.error = ValueError("no such thing")
    for _ in range(3):
        answer = session.handle([arrival()])
        assert answer.reason == REASON.DECISION_REASON_FAULT
        assert not answer.applied
        assert gpus.read_lock_mhz("GPU-a") == 0
    brain.error = None
    assert session.handle([arrival()]).applied
    events = [entry["event"] for entry in logs]
    assert events.count("control_fault") == 1
    assert events.count("control_recovered") == 1
    assert registry.get_sample_value("throttle_faults_total") == 3


def test_one_log_line_per_clock_change(logs, open_session, arrival, brain):
    session = open_session()
    for target in (900, 900, 900, 1200):
        brain.target_mhz = target
        session.handle([arrival()])
    changes = [entry for entry in logs if entry["event"] == "clock_changed"]
    assert [(entry["from_mhz"], entry["to_mhz"]) for entry in changes] == [(0, 900), (900, 1200)]


class DisobedientBackend:
    """Passes everything on to another backend, but refuses to set clocks."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def set_maximum_clock(self, uuid, clock_mhz):
        raise ActuationError(f"{uuid} does not obey")


def test_a_gpu_that_does_not_obey_is_a_fault(open_session, arrival, gpus, actuator, clock):
    disobedient = LocalActuator(DisobedientBackend(actuator._backend), ["GPU-a"], clock)
    answer = open_session(actuator=disobedient).handle([arrival()])
    assert answer.reason == REASON.DECISION_REASON_FAULT
    assert not answer.applied
    assert gpus.read_lock_mhz("GPU-a") == 0


def test_a_gpu_that_cannot_be_read_is_a_fault_of_the_meter_alone(
    logs, open_session, arrival, *, registered, actuator, clock, brain
):
    meter = GpuMeter(actuator.read, registered().gpu_uuids, clock)

    def fail(uuid):
        raise ActuationError(f"{uuid} cannot be read")

    meter._read = fail
    session = open_session(meter=meter)
    assert session.handle([arrival()]).applied
    assert session.handle([arrival()]).applied
    assert brain.observed == [(1, 0), (2, 0)]
    assert [entry["event"] for entry in logs].count("control_fault") == 1


def test_an_operators_release_holds_until_the_engine_registers_anew(
    open_session, arrival, gpus, actuator
):
    session = open_session()
    session.handle([arrival()])
    assert session.release() == ("GPU-a",)
    assert gpus.read_lock_mhz("GPU-a") == 0
    answer = session.handle([arrival()])
    assert answer.reason == REASON.DECISION_REASON_RELEASED
    assert not answer.applied
    assert gpus.read_lock_mhz("GPU-a") == 0
    assert session.release() == ()
    session.close()
    assert open_session().handle([arrival()]).applied


def test_closing_returns_the_gpus_and_nothing_takes_them_back(
    open_session, arrival, gpus, actuator
):
    session = open_session()
    session.handle([arrival()])
    session.close()
    session.close()
    assert gpus.read_lock_mhz("GPU-a") == 0
    assert not session.handle([arrival()]).applied  # a decision that was under way
    assert actuator.owner("GPU-a") == ""


def test_a_second_engine_cannot_have_the_same_gpu(open_session, registered):
    open_session()
    with pytest.raises(ConflictError, match="held by 'engine'"):
        open_session(registered(engine_id="second"))


def test_states_that_wait_a_whole_lease_for_a_decision_return_the_gpus(
    logs, open_session, arrival, gpus, clock
):
    session = open_session()
    session.handle([arrival()])
    waiting_since = clock.seconds
    clock.seconds += 1.9
    session.release_if_stuck(waiting_since)
    assert gpus.read_lock_mhz("GPU-a") == 900
    clock.seconds += 0.2
    session.release_if_stuck(None)  # nothing waits: silence is the control thread's business
    assert gpus.read_lock_mhz("GPU-a") == 900
    session.release_if_stuck(waiting_since)
    assert gpus.read_lock_mhz("GPU-a") == 0
    assert "control_stuck" in [entry["event"] for entry in logs]
    assert session.handle([arrival()]).applied


def test_the_status_says_what_has_happened(open_session, arrival, clock):
    session = open_session()
    assert session.status().state_age_seconds == -1.0
    assert not session.status().HasField("last_decision")
    session.handle([arrival(), arrival()])
    clock.seconds += 0.5
    status = session.status()
    assert (status.states_count, status.decisions_count, status.clock_changes_count) == (2, 1, 1)
    assert status.state_age_seconds == 0.5
    assert status.last_decision.applied_clock_mhz == 900
    assert status.coverage_ratio == -1.0
    assert status.bundle == "scripted"
    assert status.mode == engine_pb2.CONTROL_MODE_ACT


def test_metrics_count_states_decisions_and_changes(open_session, arrival, registry):
    open_session().handle([arrival(), arrival()])

    def value(name, **labels):
        return registry.get_sample_value(name, labels)

    assert value("throttle_iterations_received_total") == 2
    assert value("throttle_iterations_dropped_total", reason="overtaken") == 1
    assert value("throttle_decisions_total", outcome="applied", reason="cruise") == 1
    assert value("throttle_clock_changes_total", gpu="GPU-a") == 1


def test_predicted_energy_is_counted_by_engine_time_and_not_beyond_the_lease(
    open_session, arrival, brain, registry
):
    session = open_session()

    def counted():
        return [
            registry.get_sample_value("throttle_predicted_energy_joules_total", {"clocks": clocks})
            for clocks in ("decided", "default")
        ]

    brain.long_run_watts = (200.0, 500.0)
    session.handle([arrival()])
    assert counted() in ([0.0, 0.0], [None, None])  # nothing was decided before
    session.handle([arrival(), arrival()])  # two seconds of engine time
    assert counted() == [400.0, 1000.0]
    brain.long_run_watts = (0.0, 0.0)
    for _ in range(6):
        late = arrival()
    session.handle([late])  # six seconds after the last; the lease is two
    assert counted() == [800.0, 2000.0]
    session.handle([arrival()])  # by a decision without figures
    assert counted() == [800.0, 2000.0]
