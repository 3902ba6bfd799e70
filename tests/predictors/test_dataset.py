"""Reading and checking records, and choosing rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from predictors.dataset import RECORD_COLUMNS, read_records
from predictors.errors import RecordsError
from predictors.training_rows import training_frame


def test_parquet_and_csv_hold_the_same_records(invented, tmp_path):
    frame = invented.records_frame(400)
    parquet = training_frame(read_records([invented.write_parquet(frame, tmp_path / "a.parquet")]))
    csv = training_frame(read_records([invented.write_csv(frame, tmp_path / "a.csv")]))
    assert len(parquet.seconds) > 300
    assert csv.data_hash() == parquet.data_hash()


def test_directories_are_searched(recordings):
    records = read_records([recordings])
    assert len(records.metadata) == 10
    assert records.frame["registration_id"].nunique() == 10


def test_every_bad_column_is_named_with_its_count(invented, tmp_path):
    frame = invented.records_frame(100)
    frame.loc[3:5, "num_decode_requests"] = -1
    frame.loc[7, "power_watts"] = np.inf
    frame.loc[8:9, "kv_usage_ratio"] = 1.5
    frame.loc[10, "phase"] = "planned"
    frame.loc[11:14, "clock_observed_mhz"] = 0
    frame.loc[20, "iteration_duration_seconds"] = 0.0
    with pytest.raises(RecordsError) as raised:
        read_records([invented.write_parquet(frame, tmp_path / "bad.parquet")])
    said = str(raised.value)
    for name, count in {
        "num_decode_requests": 3,
        "power_watts": 1,
        "kv_usage_ratio": 2,
        "phase": 1,
        "clock_observed_mhz": 4,
        "iteration_duration_seconds": 1,
    }.items():
        assert f"{name}: {count} of" in said


def test_text_in_a_number_column_of_a_csv_is_reported(invented, tmp_path):
    frame = invented.records_frame(50)
    frame["sum_prefill_tokens"] = frame["sum_prefill_tokens"].astype(object)
    frame.loc[4, "sum_prefill_tokens"] = "many"
    with pytest.raises(RecordsError, match="sum_prefill_tokens: 1 of"):
        read_records([invented.write_csv(frame, tmp_path / "bad.csv")])


def test_missing_columns_are_all_named(invented, tmp_path):
    frame = invented.records_frame(50).drop(columns=["phase", "clock_target_mhz"])
    with pytest.raises(RecordsError, match="lacks columns: phase, clock_target_mhz"):
        read_records([invented.write_csv(frame, tmp_path / "bad.csv")])


def test_columns_that_may_be_null_may_be_absent(invented, tmp_path):
    frame = invented.records_frame(50).drop(columns=["num_decode_tokens", "flops_count"])
    records = read_records([invented.write_csv(frame, tmp_path / "a.csv")])
    assert set(records.frame.columns) >= set(RECORD_COLUMNS) - {"state_message"}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".txt", ""])
def test_a_path_without_records_is_refused(suffix, tmp_path):
    path = tmp_path / f"nothing{suffix}"
    with pytest.raises(RecordsError, match="does not exist"):
        read_records([path])
    path.write_text("nothing")
    with pytest.raises(RecordsError, match=str(path)):
        read_records([path])


def test_an_empty_directory_and_no_rows_are_refused(invented, tmp_path):
    with pytest.raises(RecordsError, match="holds no"):
        read_records([tmp_path])
    frame = invented.records_frame(20).iloc[:0]
    with pytest.raises(RecordsError, match="no rows"):
        read_records([invented.write_parquet(frame, tmp_path / "a.parquet")])


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(RecordsError, match="has no metadata"):
        read_records([tmp_path])


def test_rows_during_a_clock_change_are_dropped_and_counted(invented, tmp_path):
    frame = invented.records_frame(400, hold=20)
    chosen = training_frame(read_records([invented.write_parquet(frame, tmp_path / "a.parquet")]))
    dropped = chosen.dropped["clock changed within the window"]
    assert 15 <= dropped <= 20  # one at each of twenty holds, but where the clock stayed
    assert len(chosen.seconds) == 400 - dropped


def test_power_of_windows_that_idled_is_not_learned(invented, tmp_path):
    frame = invented.records_frame(400)
    working = frame.index[frame["phase"] == "completed"]
    frame.loc[working[50:60], "energy_window_seconds"] = 5.0
    # the engine waited before these iterations
    frame.loc[working[50] :, "engine_time_seconds"] += 4.0
    chosen = training_frame(read_records([invented.write_parquet(frame, tmp_path / "a.parquet")]))
    unknown = int(np.isnan(chosen.watts).sum())
    assert unknown == chosen.dropped["power unknown or window partly idle"]
    assert 8 <= unknown <= 10


def test_a_row_at_the_power_limit_counts_for_the_clock_asked_for(invented, tmp_path):
    frame = invented.records_frame(400)
    row = frame.index[(frame["phase"] == "completed") & (frame["sequence_number"] > 200)][5]
    frame.loc[row, "clock_target_mhz"] = 0
    frame.loc[row, ["clock_observed_mhz", "clock_previous_mhz"]] = 1500
    frame.loc[row, "power_watts"] = 699.0
    records = read_records([invented.write_parquet(frame, tmp_path / "a.parquet")])
    duration = frame.loc[row, "iteration_duration_seconds"]
    known = training_frame(records, 700.0)
    # and for the clock that ran: asked for it, the GPU would run the same
    assert sorted(known.clocks_mhz[known.seconds == duration]) == [1500.0, 1980.0]
    unknown = training_frame(records)
    assert unknown.clocks_mhz[unknown.seconds == duration] == [1500.0]


def test_heartbeats_become_idle_rows(invented, tmp_path):
    frame = invented.records_frame(400)
    chosen = training_frame(read_records([invented.write_parquet(frame, tmp_path / "a.parquet")]))
    assert len(chosen.idle_watts) == 4
    assert (chosen.idle_watts < 131.0).all()


def test_speculative_tokens_are_taken_where_the_engine_says(invented, tmp_path):
    frame = invented.records_frame(100)
    frame["num_decode_tokens"] = frame["num_decode_requests"] * 3
    chosen = training_frame(read_records([invented.write_parquet(frame, tmp_path / "a.parquet")]))
    assert (chosen.shapes[:, 5] == 3 * chosen.shapes[:, 3]).all()


def test_attention_pairs_are_taken_where_the_engine_says_and_estimated_elsewhere(
    invented, tmp_path
):
    frame = invented.records_frame(200, seed=8)
    told = np.arange(len(frame)) % 2 == 0
    frame["prefill_attention_pairs"] = np.where(told, 77.0, np.nan)
    path = invented.write_parquet(frame, tmp_path / "run.parquet")
    shapes = training_frame(read_records([path])).shapes
    estimated = shapes[:, 1] * (shapes[:, 2] + shapes[:, 1] / 2) / np.maximum(shapes[:, 0], 1)
    assert ((shapes[:, 6] == 77.0) | (shapes[:, 6] == estimated)).all()
    assert 50 < np.count_nonzero(shapes[:, 6] == 77.0) < 150


def test_records_of_an_engine_that_completes_no_iterations_say_so(invented, tmp_path):
    frame = invented.records_frame(400)
    only_heartbeats = frame[frame["phase"] == "heartbeat"].reset_index(drop=True)
    records = read_records([invented.write_parquet(only_heartbeats, tmp_path / "a.parquet")])
    with pytest.raises(RecordsError, match="record completed iterations at steady clocks"):
        training_frame(records)


def test_sums_are_enough(invented, tmp_path):
    frame = invented.records_frame(400)
    whole = training_frame(read_records([invented.write_parquet(frame, tmp_path / "a.parquet")]))
    for name in ("var_prefill_length", "var_decode_kv_tokens", "kv_usage_ratio", "timing_source"):
        frame[name] = None
    sums = training_frame(read_records([invented.write_parquet(frame, tmp_path / "b.parquet")]))
    assert sums.data_hash() == whole.data_hash()


def test_a_clock_that_only_the_power_limit_moved_is_no_switch(invented, tmp_path):
    frame = invented.records_frame(400)
    late = frame.index[frame["phase"] == "completed"][300:]
    frame.loc[late, "clock_target_mhz"] = 1980
    frame.loc[late, "power_watts"] = 699.0
    clocks = [1980 if index % 2 else 1600 for index in range(len(late))]
    frame.loc[late, "clock_observed_mhz"] = clocks
    frame.loc[late, "clock_previous_mhz"] = [clocks[-1], *clocks[:-1]]
    path = invented.write_parquet(frame, tmp_path / "a.parquet")
    known, unknown = (training_frame(read_records([path]), limit) for limit in (700.0, None))
    dropped = "clock changed within the window"
    assert known.dropped[dropped] < unknown.dropped[dropped]
