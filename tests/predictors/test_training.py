"""Training, its settings, evaluation and the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from predictors.cli import main
from predictors.dataset import read_records
from predictors.errors import PredictorsError, RecordsError
from predictors.prediction import SHAPE_COLUMNS
from predictors.training import save, split, train
from predictors.training_rows import training_frame
from predictors.training_settings import TrainingSettings


def test_the_same_records_give_the_same_bundle(bundle, recordings, invented):
    assert train(read_records([recordings]), invented.QUICK) == bundle


def test_csv_and_parquet_train_the_same_bundle(invented, tmp_path):
    frames = [invented.records_frame(600, seed=run, run=f"run-{run}") for run in range(3)]
    bundles = []
    for kind, write in (("csv", invented.write_csv), ("parquet", invented.write_parquet)):
        (tmp_path / kind).mkdir()
        for run, frame in enumerate(frames):
            write(frame, tmp_path / kind / f"{run}.{kind}")
        bundles.append(train(read_records([tmp_path / kind]), invented.QUICK))
    assert bundles[0] == bundles[1]


def test_figures_on_the_test_part_are_good(bundle):
    metrics = bundle.manifest.metrics
    assert metrics["latency_mape_ratio"] < 0.03
    assert metrics["power_mape_ratio"] < 0.03
    assert metrics["latency_r2_ratio"] > 0.99
    assert 0.97 <= metrics["coverage_ratio"] <= 1.0
    assert set(metrics["breakdown"]) == {"phase", "clock_band", "batch_band"}


def test_models_stay_small(bundle):
    assert len(bundle.latency_model) + len(bundle.power_model) < 3e6


def test_parts_are_split_by_run(bundle, recordings):
    data = bundle.manifest.data
    assert data["split_by"] == "runs"
    rows = training_frame(read_records([recordings]))
    sizes = {int((rows.groups == run).sum()) for run in np.unique(rows.groups)}
    assert data["parts_rows_counts"]["validation"] <= 2 * max(sizes)
    assert sum(data["parts_rows_counts"].values()) == data["rows_count"]


@pytest.mark.parametrize("seed", range(5))
def test_runs_with_much_kv_are_dealt_to_training_and_calibration(recordings, seed):
    groups = np.repeat(np.arange(10), 40)
    shapes = np.ones((400, len(SHAPE_COLUMNS)))
    deep = np.random.default_rng(seed).choice(10, 4, replace=False)
    shapes[np.isin(groups, deep), SHAPE_COLUMNS.index("decode_kv_tokens")] = 500_000.0
    recorded = training_frame(read_records([recordings]))
    frame = replace(recorded, shapes=shapes, groups=groups, seconds=np.ones(400))
    parts = split(frame, TrainingSettings(seed=seed))
    whole = sum(part.astype(int) for part in parts.values())
    assert (whole == 1).all()
    assert {name: len(np.unique(groups[part])) for name, part in parts.items()} == {
        "train": 6,
        "validation": 1,
        "calibration": 2,
        "test": 1,
    }
    furthest = {name: shapes[part].max() for name, part in parts.items()}
    assert furthest["train"] == furthest["calibration"] == 500_000.0


def test_a_single_run_is_split_by_contiguous_blocks(invented, tmp_path):
    frame = invented.records_frame(3000)
    records = read_records([invented.write_parquet(frame, tmp_path / "a.parquet")])
    rows = training_frame(records)
    assert rows.grouping == "blocks"
    assert (np.diff(rows.groups) >= 0).all()
    assert len(np.unique(rows.groups)) >= 10
    assert train(records, invented.QUICK).manifest.data["split_by"] == "blocks"


def test_too_few_rows_are_refused(invented, tmp_path):
    path = invented.write_parquet(invented.records_frame(40), tmp_path / "a.parquet")
    with pytest.raises(PredictorsError, match="ecord longer"):
        train(read_records([path]), invented.QUICK)


@pytest.mark.parametrize(
    ("clocks", "source"), [([], "nominal"), ([1980], "nominal, scaled to one clock")]
)
def test_idle_power_that_was_not_recorded_is_nominal(clocks, source, invented, tmp_path):
    frame = invented.records_frame(3000)
    idle = frame["phase"] == "heartbeat"
    frame = frame[~idle | (frame["clock_observed_mhz"].isin(clocks))].copy()
    if clocks:
        row = frame.index[frame["phase"] == "completed"][500]
        beat = frame.loc[row].copy()
        beat["phase"], beat["iteration_duration_seconds"] = "heartbeat", None
        beat["clock_observed_mhz"] = beat["clock_previous_mhz"] = clocks[0]
        beat["power_watts"], beat["energy_window_seconds"] = 150.0, 1e-9
        frame.loc[row] = beat
    records = read_records([invented.write_parquet(frame, tmp_path / "a.parquet")])
    manifest = train(records, invented.QUICK).manifest
    assert manifest.idle_source == source
    assert manifest.idle_watts[-1] == (150.0 if clocks else 130.0)
    assert manifest.idle_watts[0] < manifest.idle_watts[-1]


def test_records_of_two_models_are_refused(invented, tmp_path):
    frame = invented.records_frame(200)
    invented.write_parquet(frame, tmp_path / "a.parquet")
    described = invented.metadata(model_name="mixtral-8x7b")
    invented.write_parquet(frame, tmp_path / "b.parquet", described)
    with pytest.raises(RecordsError, match=r"model_name of the records is .*mixtral.*allowed: one"):
        train(read_records([tmp_path]), invented.QUICK)


def test_settings_report_every_fault_at_once():
    with pytest.raises(RecordsError, match=r"tree_depth is 99.*; violation_ratio is 0.9"):
        TrainingSettings(tree_depth=99, violation_ratio=0.9)
    with pytest.raises(RecordsError, match=r"depth is not known.*; seed is 'x'"):
        TrainingSettings.from_toml('depth = 3\nseed = "x"')
    with pytest.raises(RecordsError, match="cannot be read as TOML"):
        TrainingSettings.from_toml("= 3")
    assert TrainingSettings.from_toml("tree_depth = 4").tree_depth == 4


def test_commands_train_evaluate_and_inspect(recordings, tmp_path, capsys):
    config = tmp_path / "settings.toml"
    config.write_text("latency_trees_count = 20\npower_trees_count = 20\nthreads_count = 1\n")
    train_arguments = ["train", "--data", str(recordings), "--out", str(tmp_path / "models")]
    assert main([*train_arguments, "--config", str(config)]) == 0
    bundle = tmp_path / "models" / "h200-sxm__qwen3-30b-a3b__tp1ep1"
    assert str(bundle) in capsys.readouterr().out
    figures = tmp_path / "figures.json"
    evaluate_arguments = ["evaluate", "--bundle", str(bundle), "--data", str(recordings)]
    assert main([*evaluate_arguments, "--json", str(figures)]) == 0
    document = json.loads(figures.read_text())
    assert list(document)[:5] == [
        "latency_mape_ratio",
        "power_mape_ratio",
        "latency_r2_ratio",
        "coverage_ratio",
        "rows_count",
    ]
    assert list(document)[5:] == ["breakdown", "details"]
    assert document["details"]["provenance"] == "simulated"
    assert main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "h200-sxm__qwen3-30b-a3b__tp1ep1" in shown
    assert "110 from 345 to 1980 MHz" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data", "missing", "--out", "models"],
        ["evaluate", "--bundle", "missing", "--data", "missing"],
        ["inspect", "missing"],
        ["train", "--data", "missing", "--out", "models", "--config", "missing.toml"],
    ],
)
def test_commands_say_on_stderr_what_is_wrong(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "missing" in shown.err
    assert len(shown.err.splitlines()) == 1


def test_a_bundle_is_not_judged_on_records_of_another_model(invented, bundle, tmp_path, capsys):
    described = invented.metadata(model_name="mixtral-8x7b")
    path = invented.write_parquet(invented.records_frame(200), tmp_path / "a.parquet", described)
    assert main(["evaluate", "--bundle", str(save(bundle, tmp_path)), "--data", str(path)]) == 1
    assert "mixtral-8x7b" in capsys.readouterr().err
