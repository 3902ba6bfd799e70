from __future__ import annotations

import sys

import pyarrow.parquet as pq
import pytest

from predictors.dataset import RECORD_COLUMNS, read_records
from throttle.daemon.recording import (
    Recording,
    read_states,
    recording_path,
    records_metadata,
    require_pyarrow,
)
from throttle.daemon.telemetry import GpuWindow
from throttle.errors import InvalidInputError, NotFoundError, ThrottleError
from throttle.v1 import engine_pb2

WINDOW = GpuWindow(900, 1200, 120.0, 60.0, 0.5)


@pytest.fixture
def recording(tmp_path, registered):
    metadata = records_metadata(registered(), "h200-sxm", (600, 900, 1200), simulated=True)
    recording = Recording(tmp_path / "run.parquet", metadata, "registration", rows_per_group=3)
    yield recording
    recording.close()


def test_training_reads_what_was_recorded(recording, arrival, tmp_path):
    for _ in range(7):
        one = arrival(kv_cache=engine_pb2.KvCache(used_blocks_count=10))
        recording.append(one.state, one.message, WINDOW, 900)
    recording.close()
    records = read_records([tmp_path])
    frame = records.frame
    assert list(frame["sequence_number"]) == [1, 2, 3, 4, 5, 6, 7]
    first = frame.iloc[0]
    assert first["phase"] == "completed"
    assert first["registration_id"] == "registration"
    assert (first["clock_target_mhz"], first["clock_observed_mhz"]) == (900, 900)
    assert first["clock_previous_mhz"] == 1200
    assert (first["power_watts"], first["energy_joules"]) == (120.0, 60.0)
    assert first["energy_window_seconds"] == 0.5
    assert first["iteration_duration_seconds"] == 0.02
    assert first["timing_source"] == "host_interval"
    assert first["num_decode_requests"] == 2
    assert first["sum_decode_kv_tokens"] == 64
    assert first["kv_used_blocks_count"] == 10
    (described,) = records.metadata.values()
    assert described.provenance == "simulated"
    assert described.gpu_clocks_mhz == (600, 900, 1200)
    assert described.registration["engine_id"] == "engine"
    assert described.registration["role"] == "mixed"


def test_every_column_of_the_schema_is_filled_from_the_field_of_its_name(recording, arrival):
    message = {
        "queued": engine_pb2.QueuedRequests(
            num_prefill_requests=1, sum_prefill_tokens=2, var_prefill_length=3.0,
            num_decode_requests=4, sum_decode_kv_tokens=5, var_decode_kv_tokens=6.0,
        ),
        "kv_cache": engine_pb2.KvCache(
            used_blocks_count=7, total_blocks_count=8, usage_ratio=0.875
        ),
        "speculative_decoding": engine_pb2.SpeculativeDecoding(
            draft_tokens_count=9, accepted_tokens_count=8
        ),
        "work_counters": engine_pb2.WorkCounters(flops_count=10, read_bytes=11, write_bytes=12),
        "expert_load": engine_pb2.ExpertLoad(
            balancedness_ratio=0.5, mean_active_experts_count=60.5
        ),
    }  # fmt: skip
    one = arrival(**message)
    recording.append(one.state, one.message, WINDOW, 900)
    recording.close()
    table = pq.read_table(recording.path)
    assert table.column_names == list(RECORD_COLUMNS)
    (row,) = table.to_pylist()
    queued = [row[name] for name in RECORD_COLUMNS if name.startswith("queued_")]
    assert queued == [1, 2, 3.0, 4, 5, 6.0]
    assert [row[name] for name in RECORD_COLUMNS if name.startswith("kv_")] == [7, 8, 0.875]
    assert (row["draft_tokens_count"], row["accepted_tokens_count"]) == (9, 8)
    assert (row["flops_count"], row["read_bytes"], row["write_bytes"]) == (10, 11, 12)
    assert (row["balancedness_ratio"], row["mean_active_experts_count"]) == (0.5, 60.5)
    assert engine_pb2.IterationState.FromString(row["state_message"]) == one.message


def test_heartbeats_have_no_duration_and_planned_states_are_no_record(recording, arrival):
    for phase in (engine_pb2.ITERATION_PHASE_PLANNED, engine_pb2.ITERATION_PHASE_HEARTBEAT):
        one = arrival(phase)
        recording.append(one.state, one.message, GpuWindow(900, 900), 0)
    recording.close()
    (row,) = pq.read_table(recording.path).to_pylist()
    assert row["phase"] == "heartbeat"
    assert row["iteration_duration_seconds"] is None
    assert row["timing_source"] is None
    assert row["power_watts"] is None


def test_recorded_states_are_read_back_for_replay(recording, arrival):
    arrivals = [arrival() for _ in range(5)]
    for one in arrivals:
        recording.append(one.state, one.message, WINDOW, 1200)
    recording.close()
    states = list(read_states(recording.path))
    assert [state.message for state in states] == [one.message for one in arrivals]
    assert {(state.clock_target_mhz, state.clock_observed_mhz) for state in states} == {(1200, 900)}


def test_rows_are_written_in_groups_and_the_file_has_its_name_only_when_it_is_whole(
    recording, arrival, tmp_path
):
    for _ in range(7):
        one = arrival()
        recording.append(one.state, one.message, WINDOW, 900)
    assert not recording.path.exists()
    recording.close()
    recording.close()
    assert pq.ParquetFile(recording.path).num_row_groups == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run.parquet"]


def test_an_empty_recording_leaves_no_file(recording, tmp_path):
    recording.close()
    assert list(tmp_path.iterdir()) == []


def test_what_comes_after_the_end_is_left_out(recording, arrival):
    one, late = arrival(), arrival()
    recording.append(one.state, one.message, WINDOW, 900)
    recording.close()
    recording.append(late.state, late.message, WINDOW, 900)
    assert recording.rows_count == 1


def test_an_engine_id_cannot_lead_out_of_the_directory(tmp_path):
    path = recording_path(tmp_path, "../../etc/x y", "registration")
    assert path.parent == tmp_path
    assert path.name == "registration-.._.._etc_x_y.parquet"


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path, registered):
    (tmp_path / "file").write_text("")
    metadata = records_metadata(registered(), "h200-sxm", (600,), simulated=True)
    with pytest.raises(ThrottleError, match="cannot be written"):
        Recording(tmp_path / "file" / "run.parquet", metadata, "registration")


def test_a_file_that_is_no_recording_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="does not exist"):
        next(read_states(tmp_path / "none.parquet"))
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(InvalidInputError, match=r"text\.parquet"):
        next(read_states(tmp_path / "text.parquet"))


def test_without_pyarrow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ThrottleError, match=r"install moe-throttle\[train\]"):
        require_pyarrow()


def test_the_events_of_a_plan_are_recorded_with_the_iteration_after_it(recording, arrival):
    def event(kind, age):
        return engine_pb2.RequestEvent(
            kind=kind, request_number=7, age_seconds=age, prompt_tokens=20
        )

    arrived = engine_pb2.REQUEST_EVENT_KIND_ARRIVED
    first_token = engine_pb2.REQUEST_EVENT_KIND_FIRST_TOKEN
    plan = arrival(engine_pb2.ITERATION_PHASE_PLANNED, request_events=[event(arrived, 0.5)])
    done = arrival(request_events=[event(first_token, 0.0)])
    later = arrival()
    for one in (plan, done, later):
        recording.append(one.state, one.message, WINDOW, 900)
    recording.close()
    first, second = (state.message for state in read_states(recording.path))
    between = done.message.engine_time_seconds - plan.message.engine_time_seconds
    assert [(each.kind, each.age_seconds) for each in first.request_events] == [
        (arrived, pytest.approx(0.5 + between)),
        (first_token, 0.0),
    ]
    assert second == later.message
