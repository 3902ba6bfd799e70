"""The generic bundle: models and GPUs that training did not see."""

from __future__ import annotations

import numpy as np
import pytest

from predictors.architecture import from_catalogue
from predictors.bundle import GENERIC_NAME, find_bundle, load_bundle
from predictors.cli import main
from predictors.dataset import read_records
from predictors.errors import BundleError, RecordsError
from predictors.features import Parallelism
from predictors.generic_training import SubjectRows, train_generic
from predictors.judging import leave_one_out, same_model
from predictors.predictor import Engine, load_predictor
from predictors.training import save

CLOCKS_MHZ = tuple(range(345, 1981, 15))


@pytest.fixture(scope="module")
def subjects(invented, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generic")
    found = []
    for index, model in enumerate(("qwen3-30b-a3b", "olmoe-1b-7b", "deepseek-v2-lite")):
        described = invented.metadata(model_name=model)
        frame = invented.records_frame(1500, seed=index)
        (folder / model).mkdir()
        path = invented.write_parquet(frame, folder / model / "a.parquet", described)
        found.append(SubjectRows.of(read_records([path])))
    return folder, found


@pytest.fixture(scope="module")
def generic(subjects, invented):
    return train_generic(subjects[1], invented.QUICK)


def test_a_model_without_a_bundle_gets_the_generic_one_by_its_own_name(generic, bundle, tmp_path):
    own = save(bundle, tmp_path)
    with pytest.raises(BundleError, match="no bundle"):
        find_bundle(tmp_path, "NVIDIA H200", "mixtral-8x7b")
    save(generic, tmp_path)
    assert find_bundle(tmp_path, "NVIDIA H200", "Qwen/Qwen3-30B-A3B") == own
    assert find_bundle(tmp_path, "NVIDIA H200", "mixtral-8x7b").name == GENERIC_NAME


def test_it_predicts_once_it_is_bound(generic, tmp_path):
    path = save(generic, tmp_path)
    assert load_bundle(path) == generic
    with pytest.raises(BundleError, match="bind it to one first"):
        load_predictor(path)
    engine = Engine("NVIDIA B200", from_catalogue("mixtral-8x7b"), Parallelism(2, 1), CLOCKS_MHZ)
    predictor = load_predictor(path, engine)
    assert predictor.manifest.name == GENERIC_NAME
    shapes = np.array(
        [[0.0, 0.0, 0.0, 8.0, 8e3, 8.0, 0.0], [1.0, 900.0, 0.0, 8.0, 8e3, 8.0, 405e3]]
    )
    prediction = predictor.predict(shapes)
    assert (np.diff(prediction.latency_seconds, axis=1) <= 0.0).all()
    assert (np.diff(prediction.power_watts, axis=1) >= 0.0).all()
    assert (prediction.power_watts <= 1000.0).all()


def test_its_figures_are_of_models_left_out(generic, subjects):
    assert generic.manifest.data["split_by"] == "models"
    judged = sum(min(len(item.frame.seconds), 1500) for item in subjects[1])
    assert generic.manifest.metrics["rows_count"] == judged


def test_leaving_a_model_out_leaves_out_its_rows(subjects, invented):
    left_out = subjects[1][0]
    predictor = leave_one_out(subjects[1], left_out, invented.QUICK, same_model)
    assert "qwen3-30b-a3b" not in predictor.manifest.data["models"]
    assert predictor.manifest.architecture.name == "qwen3-30b-a3b"


def test_one_model_is_too_few(subjects, invented):
    with pytest.raises(RecordsError, match="records of 1 models"):
        train_generic(subjects[1][:1], invented.QUICK)


def test_the_command_takes_a_folder_of_folders(subjects, tmp_path, capsys):
    config = tmp_path / "settings.toml"
    config.write_text("latency_trees_count = 10\npower_trees_count = 10\nthreads_count = 1\n")
    arguments = ["train", "--generic", "--data", str(subjects[0]), "--out", str(tmp_path)]
    assert main([*arguments, "--config", str(config)]) == 0
    data = ["--data", str(subjects[0] / "olmoe-1b-7b")]
    assert main(["evaluate", "--bundle", str(tmp_path / GENERIC_NAME), *data]) == 0
    assert main(["inspect", str(tmp_path / GENERIC_NAME)]) == 0
    assert "kind        generic" in capsys.readouterr().out


def test_the_same_subjects_give_the_same_bundle(generic, subjects, invented):
    assert train_generic(subjects[1], invented.QUICK) == generic
