"""Training beside the usual way: on a cluster, and with settings searched for."""

from __future__ import annotations

import dataclasses

import pytest

from predictors.cli import main
from predictors.dataset import read_records
from predictors.errors import PredictorsError
from predictors.evaluation import evaluate
from predictors.predictor import fastest_predictor
from predictors.search import search
from predictors.training import train
from predictors.training_rows import training_frame


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the cluster's libraries are theirs
def test_two_workers_train_as_well_as_one_process(bundle, recordings, invented):
    distributed = pytest.importorskip("distributed", reason="Dask is in the optional extra search")
    from predictors.dask_training import DaskTrainer  # noqa: PLC0415

    records = read_records([recordings])
    frame = training_frame(records, 700.0)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        DaskTrainer(cluster.scheduler_address) as trainer,
    ):
        spread = train(records, invented.QUICK, trainer=trainer)
    alone, together = (evaluate(fastest_predictor(b), frame) for b in (bundle, spread))
    for figure in ("latency_mape_ratio", "power_mape_ratio"):
        assert together[figure] == pytest.approx(alone[figure], rel=0.1)
    assert together["coverage_ratio"] == pytest.approx(alone["coverage_ratio"], abs=0.005)


def test_a_scheduler_that_is_not_there_is_one_line(recordings, tmp_path, capsys):
    pytest.importorskip("distributed", reason="Dask is in the optional extra search")
    arguments = ["train", "--data", str(recordings), "--out", str(tmp_path)]
    assert main([*arguments, "--dask", str(tmp_path / "missing.json")]) == 1
    shown = capsys.readouterr().err
    assert "cannot be reached" in shown
    assert len(shown.splitlines()) == 1


def test_a_search_is_no_worse_than_where_it_starts_and_repeats(recordings, invented):
    pytest.importorskip("optuna", reason="Optuna is in the optional extra search")
    records = read_records([recordings])
    poor = dataclasses.replace(invented.QUICK, latency_trees_count=2, power_trees_count=2)
    found = search(records, poor, 3)
    assert found == search(records, poor, 3)
    frame = training_frame(records, 700.0)
    before, after = (
        evaluate(fastest_predictor(train(records, settings)), frame) for settings in (poor, found)
    )
    assert after["latency_mape_ratio"] <= before["latency_mape_ratio"]


def test_a_search_without_trials_is_refused(recordings, invented):
    with pytest.raises(PredictorsError, match="number of trials is 0; allowed: 1 or more"):
        search(read_records([recordings]), invented.QUICK, 0)
