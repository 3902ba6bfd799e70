"""Tables of another tool: a GPU and a model that nobody described."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from predictors.cli import main
from predictors.errors import RecordsError
from predictors.evaluation import evaluate
from predictors.predictor import fastest_predictor
from predictors.table import TABLE_FEATURES, TABLE_TERMS, TableBase, TableSpace, read_tables
from predictors.table_training import table_frame, train_table

CLOCKS_MHZ = np.arange(600, 2401, 75)


def synthetic_table(rows_count, seed=0, *, experts=True, gpu="RTX 6000 Ada", noise=0.015):
    """Rows by smooth formulas that no code of ours knows: a knee in memory, one in voltage."""
    rng = np.random.default_rng(seed)
    clocks = rng.choice(CLOCKS_MHZ, rows_count)
    x = clocks / CLOCKS_MHZ[-1]
    prefill = rng.random(rows_count) < 0.33
    batch = np.floor(2 ** rng.uniform(0, 7, rows_count))
    batch = np.where(prefill, 1 + batch % 4, batch)
    context = np.floor(2 ** rng.uniform(6, 12, rows_count))
    tokens = np.where(prefill, batch * context, batch)
    active = 60 * (1 - (1 - 4 / 60) ** tokens) if experts else 60.0
    reading = 0.003 + 3.2e-4 * active + np.where(prefill, 0.0, 5e-8 * batch * context)
    reading *= (1 + (0.45 / x) ** 4) ** 0.25
    computing = (2.2e-5 * tokens + np.where(prefill, 2e-9 * batch * context**2, 0.0)) / x
    seconds = 0.004 * (0.5 + 0.5 / x) + np.hypot(reading, computing) + 2e-5 * batch
    voltage = np.maximum(0.72, 0.72 + 0.28 * (x - 0.6) / 0.4)
    busy = 90 + 60 * reading / seconds + 190 * computing / seconds
    watts = np.minimum(70 + 60 * reading / seconds + x * voltage**2 * busy, 320.0)
    return pd.DataFrame(
        {
            "gpu": gpu,
            "phase": np.where(prefill, "prefill", "decode"),
            "clock_mhz": clocks,
            "batch": batch.astype(int),
            "context_tokens": context.astype(int),
            "latency_seconds": seconds * np.exp(rng.normal(0, noise, rows_count)),
            "power_watts": watts * np.exp(rng.normal(0, noise, rows_count)),
        }
    )


def one_table(frame, path):
    frame.to_csv(path, index=False)
    return read_tables([path])[0]


@pytest.mark.parametrize("rows_count", [100, 200])
@pytest.mark.parametrize("experts", [True, False])
def test_a_small_table_predicts_clocks_that_it_does_not_hold(tmp_path, rows_count, experts):
    frame = synthetic_table(rows_count * 3 // 2, experts=experts)
    left_out = np.isin(frame["clock_mhz"], CLOCKS_MHZ[1::3])
    seen = frame[~left_out].head(rows_count)
    bundle = train_table(one_table(seen, tmp_path / "train.csv"))
    fresh = synthetic_table(2000, seed=9, experts=experts)
    fresh = fresh[np.isin(fresh["clock_mhz"], CLOCKS_MHZ[1::3])]
    judged = table_frame(one_table(fresh, tmp_path / "test.csv"))
    document = evaluate(fastest_predictor(bundle), judged)
    assert document["latency_mape_ratio"] < 0.06
    assert document["power_mape_ratio"] < 0.06
    assert document["breakdown"]["phase"]["prefill"]["latency_mape_ratio"] < 0.06
    assert document["latency_r2_ratio"] > 0.98


def test_commands_train_and_judge_a_table(tmp_path, capsys):
    path, out = tmp_path / "table.csv", tmp_path / "out"
    synthetic_table(150).to_csv(path, index=False)
    assert main(["train", "--schema", "simple", "--data", str(path), "--out", str(out)]) == 0
    assert (out / "rtx-6000-ada__table" / "manifest.json").is_file()
    arguments = ["--bundle", str(out), "--data", str(path), "--schema", "simple"]
    files = ["--json", str(tmp_path / "f.json"), "--html", str(tmp_path / "f.html")]
    assert main(["evaluate", *arguments, *files]) == 0
    document = json.loads((tmp_path / "f.json").read_text())
    assert document["rows_count"] == 150
    assert document["details"]["provenance"] == "measured"
    assert main(["inspect", str(out)]) == 0
    assert "kind        table" in capsys.readouterr().out


def test_every_gpu_of_a_table_gets_a_bundle(tmp_path):
    path, out = tmp_path / "table.csv", tmp_path / "out"
    both = [synthetic_table(60, seed, gpu=gpu) for seed, gpu in enumerate(("GPU A", "GPU B"))]
    pd.concat(both).to_csv(path, index=False)
    assert main(["train", "--schema", "simple", "--data", str(path), "--out", str(out)]) == 0
    assert sorted(inside.name for inside in out.iterdir()) == ["gpu-a__table", "gpu-b__table"]


def test_what_a_table_does_not_say_is_no_feature():
    described = " ".join((*TABLE_FEATURES, *TABLE_TERMS))
    assert not any(word in described for word in ("expert", "byte", "flop", "weight"))


def test_every_bad_column_is_named_with_its_count(tmp_path):
    frame = synthetic_table(50).astype({"latency_seconds": object, "phase": object})
    frame.loc[[3, 4], "latency_seconds"] = "slow"
    frame.loc[7, "phase"] = "training"
    frame.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(RecordsError, match=r"phase: 1 of 50 .*latency_seconds: 2 of 50"):
        read_tables([tmp_path / "a.csv"])
    frame.drop(columns=["batch", "gpu"]).to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(RecordsError, match="lacks columns: gpu, batch"):
        read_tables([tmp_path / "b.csv"])


def test_a_table_of_few_rows_states_the_rate_that_it_can_hold(tmp_path):
    bundle = train_table(one_table(synthetic_table(49), tmp_path / "a.csv"))
    assert bundle.manifest.calibration.violation_ratio == pytest.approx(1 / 50)
    with pytest.raises(RecordsError, match="holds 12 rows"):
        train_table(one_table(synthetic_table(12), tmp_path / "b.csv"))


def test_the_base_never_rises_with_clock(tmp_path):
    table = one_table(synthetic_table(150), tmp_path / "a.csv")
    bundle = train_table(table)
    _, terms = TableSpace().build(table.shapes)
    base = TableBase(bundle.manifest.base_coefficients)
    seconds = base.seconds(base.parts(terms), np.linspace(0.1, 1.0, 40))
    assert (seconds > 0.0).all()
    assert (np.diff(seconds, axis=1) <= 1e-12).all()


def test_the_same_table_gives_the_same_bundle(tmp_path):
    table = one_table(synthetic_table(80), tmp_path / "a.csv")
    assert train_table(table) == train_table(table)
