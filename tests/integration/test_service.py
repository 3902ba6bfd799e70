from __future__ import annotations

import math

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from predictors.dataset import read_records
from tests.integration.engines import DEADLINE_SECONDS, MODEL_NAME, idle, park, registration, state
from throttle.testing import FormulaPredictor
from throttle.v1 import decision_pb2, engine_pb2, throttle_service_pb2

CODE = grpc.StatusCode
CLOCKS = [int(clock) for clock in FormulaPredictor().clocks_mhz]


@pytest.fixture
def other(daemon):
    """An engine on a GPU of its own, to see that it goes on being served."""
    stream = daemon.stream(registration("other", ["GPU-f"]))
    stream.accepted()
    number = 0

    def serves():
        nonlocal number
        number += 1
        return stream.decide(state(number)).sequence_number == number

    assert serves()
    yield serves
    assert serves()
    stream.close()


def test_an_engine_registers_and_its_states_are_decided_on(daemon, gpus):
    stream = daemon.stream(registration(lease_timeout_seconds=7.5))
    accepted = stream.accepted()
    assert accepted.registration_id
    assert accepted.mode == engine_pb2.CONTROL_MODE_ACT
    assert accepted.bundle == f"h200-sxm__{MODEL_NAME}__tp1ep1"
    assert list(accepted.candidate_clocks_mhz) == CLOCKS
    assert accepted.lease_timeout_seconds == 7.5
    for number in range(1, 6):
        decision = stream.decide(state(number))
        assert decision.sequence_number == number
        assert decision.target_clock_mhz in CLOCKS
        assert decision.applied
        assert gpus.file.read_lock_mhz("GPU-a") == decision.applied_clock_mhz
        assert decision.predicted_iteration_seconds > 0
        assert decision.decision_duration_seconds > 0
    stream.close()
    assert gpus.file.read_lock_mhz("GPU-a") == 0


def test_a_steady_load_with_slack_is_served_below_the_highest_clock(daemon, gpus):
    stream = daemon.stream(registration())
    stream.accepted()
    for number in range(1, 1200):
        decision = stream.decide(state(number))
        if decision.reason == decision_pb2.DECISION_REASON_CRUISE:
            break
    assert decision.reason == decision_pb2.DECISION_REASON_CRUISE
    assert decision.applied_clock_mhz < CLOCKS[-1]
    assert gpus.file.read_lock_mhz("GPU-a") == decision.applied_clock_mhz
    assert decision.predicted_power_watts < decision.predicted_default_power_watts
    stream.close()


def test_advice_comes_with_the_decisions_of_an_engine_that_asked_for_it(daemon):
    stream = daemon.stream(registration(wants_advice=True))
    stream.accepted()
    arrival = engine_pb2.RequestEvent(
        kind=engine_pb2.REQUEST_EVENT_KIND_ARRIVED,
        request_number=900,
        age_seconds=9.0,
        prompt_tokens=500,
    )
    for number in range(1, 1200):
        events = {"request_events": [arrival]} if number == 1000 else {}
        advice = stream.decide(state(number, **events)).advice
    assert advice.load_headroom_ratio > 0
    assert advice.least_gpus_count == 1
    assert [(each.request_number, each.verdict, each.reason) for each in advice.admissions] == [
        (900, decision_pb2.ADMISSION_VERDICT_LOST, decision_pb2.ADMISSION_REASON_TOO_LATE)
    ]
    stream.close()


def test_an_idle_engine_is_parked_and_its_gpus_return_to_default_when_it_leaves(daemon, gpus):
    stream = daemon.stream(registration(gpu_uuids=["GPU-a", "GPU-b"]))
    stream.accepted()
    park(stream)
    assert gpus.file.read_lock_mhz("GPU-a") == gpus.file.read_lock_mhz("GPU-b") == CLOCKS[0]
    stream.close()
    assert gpus.file.read_lock_mhz("GPU-a") == gpus.file.read_lock_mhz("GPU-b") == 0


def test_shadow_mode_decides_and_touches_nothing(daemon, gpus):
    stream = daemon.stream(registration(mode=engine_pb2.CONTROL_MODE_UNSPECIFIED))
    assert stream.accepted().mode == engine_pb2.CONTROL_MODE_SHADOW
    writes = gpus.file.read_write_count("GPU-a")
    stream.decide(idle(1, 0.0))
    decision = stream.decide(idle(2, 100.0))
    assert decision.reason == decision_pb2.DECISION_REASON_PARKED
    assert decision.target_clock_mhz == CLOCKS[0]
    assert not decision.applied
    assert gpus.file.read_write_count("GPU-a") == writes
    stream.close()


def test_record_mode_needs_no_bundle_and_training_reads_the_file(start_daemon, tmp_path, own_gpus):
    daemon = start_daemon(
        "--bundles", tmp_path / "none", "--recordings", tmp_path / "records",
        "--simulated-gpus", own_gpus.path,
    )  # fmt: skip
    model = engine_pb2.ModelDescriptor(name="a-model-nobody-knows")
    stream = daemon.stream(registration(mode=engine_pb2.CONTROL_MODE_RECORD, model=model))
    assert stream.accepted().bundle == ""
    port = own_gpus.file.gpu("GPU-a")
    for number in range(1, 11):
        port.publish(1980.0, 400.0, 40.0 * number, 0.1 * number)
        decision = stream.decide(state(number))
        assert decision.reason == decision_pb2.DECISION_REASON_RECORDING
        assert not decision.applied
    stream.close()
    records = read_records([tmp_path / "records"])
    assert {metadata.provenance for metadata in records.metadata.values()} == {"simulated"}
    frame = records.frame
    assert list(frame["sequence_number"]) == list(range(1, 11))
    assert frame["power_watts"].iloc[1:].to_list() == pytest.approx([400.0] * 9)
    assert set(frame["clock_observed_mhz"]) == {1980}


def test_record_mode_without_a_place_to_record_is_refused(start_daemon, own_gpus):
    daemon = start_daemon("--simulated-gpus", own_gpus.path)
    error = daemon.stream(registration(mode=engine_pb2.CONTROL_MODE_RECORD)).error()
    assert error.code() is CODE.FAILED_PRECONDITION
    assert "--recordings DIRECTORY" in error.details()


def test_the_lease_ends_when_the_engine_is_silent_and_its_next_state_renews_it(daemon, gpus):
    stream = daemon.stream(registration(lease_timeout_seconds=0.1))
    stream.accepted()
    park(stream)
    expired = next(stream.call).decision
    assert expired.reason == decision_pb2.DECISION_REASON_LEASE_EXPIRED
    assert expired.sequence_number == 2
    assert gpus.file.read_lock_mhz("GPU-a") == 0
    assert stream.decide(idle(3, 200.0)).applied
    stream.cancel()


@pytest.mark.parametrize(
    ("first", "part"),
    [
        (state(1), "message is 'state'; allowed: a registration first"),
        (registration(engine_id=""), "registration.engine_id is ''"),
        (registration(gpu_uuids=[]), "registration.gpu_uuids is ()"),
        (registration(lease_timeout_seconds=math.nan), "registration.lease_timeout_seconds is nan"),
        (registration(mode=17), "registration.mode is 17"),
        (registration(limits=engine_pb2.EngineLimits()), "registration.limits.running_requests"),
        (
            registration(model=engine_pb2.ModelDescriptor(config_json="{")),
            "registration.model.config_json",
        ),
    ],
)
def test_a_malformed_first_message_is_refused_and_others_go_on(daemon, other, first, part):
    error = daemon.stream(first).error()
    assert error.code() is CODE.INVALID_ARGUMENT
    assert part in error.details()
    assert "allowed: " in error.details()


def test_an_empty_first_message_is_refused(daemon, other):
    stream = daemon.stream(None)
    stream.send_raw(throttle_service_pb2.StreamIterationsRequest())
    error = stream.error()
    assert error.code() is CODE.INVALID_ARGUMENT
    assert "message is None; allowed: a registration first" in error.details()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"engine_time_seconds": math.nan}, "state.engine_time_seconds is nan"),
        ({"iteration_duration_seconds": None}, "state.iteration_duration_seconds is None"),
        (
            {"scheduled": engine_pb2.ScheduledRequests(num_decode_requests=-4)},
            "state.scheduled.num_decode_requests is -4",
        ),
        (
            {"kv_cache": engine_pb2.KvCache(used_blocks_count=40_001)},
            "state.kv_cache.used_blocks_count is 40001; allowed: 0 to the capacity, 40000",
        ),
        ({"phase": 0}, "state.phase is 0"),
    ],
)
def test_a_bad_state_ends_its_stream_resets_its_gpus_and_others_go_on(
    daemon, other, gpus, *, changes, part
):
    stream = daemon.stream(registration())
    stream.accepted()
    park(stream)
    assert gpus.file.read_lock_mhz("GPU-a") == CLOCKS[0]
    stream.send(state(3, **{"engine_time_seconds": 200.0} | changes))
    error = stream.error()
    assert error.code() is CODE.INVALID_ARGUMENT
    assert part in error.details()
    assert gpus.file.read_lock_mhz("GPU-a") == 0


def test_a_second_registration_in_one_stream_is_refused(daemon):
    stream = daemon.stream(registration())
    stream.accepted()
    stream.send_raw(throttle_service_pb2.StreamIterationsRequest(registration=registration()))
    error = stream.error()
    assert error.code() is CODE.INVALID_ARGUMENT
    assert "message is 'registration'; allowed: states" in error.details()


def test_an_unknown_gpu_is_not_found_and_those_there_are_named(daemon, other):
    error = daemon.stream(registration(gpu_uuids=["GPU-a", "GPU-x"])).error()
    assert error.code() is CODE.NOT_FOUND
    assert "'GPU-x'" in error.details()
    assert "GPU-a, GPU-b" in error.details()


def test_an_unknown_model_is_not_found(daemon):
    error = daemon.stream(registration(model=engine_pb2.ModelDescriptor(name="gpt-9"))).error()
    assert error.code() is CODE.NOT_FOUND
    assert "'gpt-9'" in error.details()


def test_a_model_without_a_bundle_is_told_which_bundles_there_are(daemon):
    model = engine_pb2.ModelDescriptor(name="mixtral-8x7b")
    error = daemon.stream(registration(model=model)).error()
    assert error.code() is CODE.FAILED_PRECONDITION
    assert f"h200-sxm__{MODEL_NAME}__tp1ep1" in error.details()


def test_a_bundle_for_other_weights_is_refused(daemon):
    model = engine_pb2.ModelDescriptor(name=MODEL_NAME, weight_dtype="fp8")
    error = daemon.stream(registration(model=model)).error()
    assert error.code() is CODE.FAILED_PRECONDITION
    assert "weight_dtype" in error.details()


def test_a_second_engine_on_the_same_gpu_is_told_who_holds_it(daemon):
    first = daemon.stream(registration("first", ["GPU-b"]))
    first.accepted()
    error = daemon.stream(registration("second", ["GPU-a", "GPU-b"])).error()
    assert error.code() is CODE.FAILED_PRECONDITION
    assert "GPU-b is held by 'first'" in error.details()
    assert first.decide(idle(1, 0.0)).applied
    third = daemon.stream(registration("third", ["GPU-a"]))  # the refused one has left nothing
    third.accepted()
    third.close()
    first.close()


def test_an_engine_id_is_taken_once(daemon):
    first = daemon.stream(registration("twin", ["GPU-a"]))
    first.accepted()
    error = daemon.stream(registration("twin", ["GPU-b"])).error()
    assert error.code() is CODE.FAILED_PRECONDITION
    assert "'twin' is connected already" in error.details()
    first.close()


def test_evaluate_judges_every_clock_and_touches_nothing(daemon, gpus):
    writes = [gpus.file.read_write_count(uuid) for uuid in gpus.file.uuids()]
    for uuids in (["GPU-a"], ["GPU-elsewhere"]):
        answer = daemon.stub.Evaluate(
            throttle_service_pb2.EvaluateRequest(
                registration=registration(gpu_uuids=uuids), state=state(1)
            ),
            timeout=DEADLINE_SECONDS,
        )
        assert [row.clock_mhz for row in answer.clocks] == CLOCKS
        seconds = [row.iteration_seconds for row in answer.clocks]
        assert seconds == sorted(seconds, reverse=True)
        for row in answer.clocks:
            assert row.iteration_upper_seconds >= row.iteration_seconds
            assert row.iteration_energy_joules == pytest.approx(
                row.iteration_seconds * row.power_watts
            )
            assert row.feasible == all(limit.slack_seconds >= 0 for limit in row.slacks)
        assert answer.bundle == f"h200-sxm__{MODEL_NAME}__tp1ep1"
        assert answer.decision.sequence_number == 1
        assert not answer.decision.applied
    assert [gpus.file.read_write_count(uuid) for uuid in gpus.file.uuids()] == writes


@pytest.mark.parametrize(
    ("request_message", "part"),
    [
        (throttle_service_pb2.EvaluateRequest(), "registration.engine_id"),
        (throttle_service_pb2.EvaluateRequest(registration=registration()), "state is None"),
        (
            throttle_service_pb2.EvaluateRequest(
                registration=registration(), state=state(1, phase=0)
            ),
            "state.phase is 0",
        ),
    ],
)
def test_evaluate_refuses_bad_input(daemon, request_message, part):
    with pytest.raises(grpc.RpcError) as raised:
        daemon.stub.Evaluate(request_message, timeout=DEADLINE_SECONDS)
    assert raised.value.code() is CODE.INVALID_ARGUMENT
    assert part in raised.value.details()


def test_the_status_tells_of_engines_and_gpus(daemon):
    stream = daemon.stream(registration("watched", ["GPU-c"]))
    accepted = stream.accepted()
    park(stream)
    status = daemon.status()
    assert status.version
    assert status.uptime_seconds > 0
    (engine,) = [each for each in status.engines if each.engine_id == "watched"]
    assert engine.registration_id == accepted.registration_id
    assert (engine.states_count, engine.decisions_count) == (2, 2)
    assert engine.last_decision.reason == decision_pb2.DECISION_REASON_PARKED
    assert engine.state_age_seconds >= 0
    (gpu,) = [each for each in status.gpus if each.gpu_uuid == "GPU-c"]
    assert (gpu.target_clock_mhz, gpu.engine_id) == (CLOCKS[0], "watched")
    stream.close()
    (gpu,) = [each for each in daemon.status().gpus if each.gpu_uuid == "GPU-c"]
    assert (gpu.target_clock_mhz, gpu.engine_id) == (0, "")


def test_released_gpus_stay_at_default_until_their_engine_registers_anew(daemon, gpus):
    stream = daemon.stream(registration("loose", ["GPU-d"]))
    stream.accepted()
    park(stream)
    request = throttle_service_pb2.ReleaseControlRequest(engine_id="loose")
    answer = daemon.stub.ReleaseControl(request, timeout=DEADLINE_SECONDS)
    assert list(answer.released_gpu_uuids) == ["GPU-d"]
    assert gpus.file.read_lock_mhz("GPU-d") == 0
    decision = stream.decide(idle(3, 200.0))
    assert decision.reason == decision_pb2.DECISION_REASON_RELEASED
    assert gpus.file.read_lock_mhz("GPU-d") == 0
    stream.close()
    again = daemon.stream(registration("loose", ["GPU-d"]))
    again.accepted()
    park(again)
    again.close()


def test_releasing_an_unknown_engine_is_not_found(daemon):
    with pytest.raises(grpc.RpcError) as raised:
        daemon.stub.ReleaseControl(
            throttle_service_pb2.ReleaseControlRequest(engine_id="nobody"),
            timeout=DEADLINE_SECONDS,
        )
    assert raised.value.code() is CODE.NOT_FOUND


@pytest.mark.parametrize("service", ["", "throttle.v1.ThrottleService"])
def test_health_says_serving(daemon, service):
    answer = health_pb2_grpc.HealthStub(daemon.channel).Check(
        health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_SECONDS
    )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_services(daemon):
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(daemon.channel).ServerReflectionInfo(
        iter([request]), timeout=DEADLINE_SECONDS
    )
    names = {service.name for service in answer.list_services_response.service}
    assert {"throttle.v1.ThrottleService", "grpc.health.v1.Health"} <= names
