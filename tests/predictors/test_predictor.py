"""What predictors promise, and that the sweep gives XGBoost's numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import xgboost
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from predictors.bundle import Bundle, load_bundle
from predictors.errors import BundleError, PredictorsError
from predictors.features import FEATURES
from predictors.predictor import XGBoostPredictor, load_predictor
from predictors.training import save

sweep = pytest.importorskip("predictors.sweep", reason="numba is an optional extra")
compiled_features = pytest.importorskip("predictors.compiled_features")
compiled_sweep = pytest.importorskip("predictors.compiled_sweep")

MODELS = Path(__file__).resolve().parents[2] / "models"
ANY_SHAPES = st.lists(
    st.tuples(
        st.floats(0.0, 8.0),
        st.floats(0.0, 4096.0),
        st.floats(0.0, 50_000.0),
        st.floats(0.0, 300.0),
        st.floats(0.0, 1e6),
        st.floats(0.25, 400.0),
        st.floats(0.0, 1e9),
    ),
    min_size=1,
    max_size=12,
)
QUIETLY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def predictors(bundle):
    return sweep.SweepPredictor(bundle), XGBoostPredictor(bundle)


@pytest.mark.parametrize("which", [0, 1])
@QUIETLY
@given(shapes=ANY_SHAPES)
def test_latency_never_rises_and_power_never_falls_with_clock(predictors, which, shapes):
    prediction = predictors[which].predict(np.array(shapes))
    assert (np.diff(prediction.latency_seconds, axis=1) <= 0.0).all()
    assert (np.diff(prediction.latency_upper_seconds, axis=1) <= 0.0).all()
    assert (np.diff(prediction.power_watts, axis=1) >= 0.0).all()
    assert (prediction.latency_upper_seconds >= prediction.latency_seconds).all()
    assert (prediction.latency_seconds > 0.0).all()
    assert (prediction.power_watts > 0.0).all()
    assert (prediction.power_watts <= predictors[which].manifest.power_limit_watts).all()


@QUIETLY
@given(shapes=ANY_SHAPES)
def test_sweep_gives_the_numbers_of_xgboost(predictors, shapes):
    fast, plain = (predictor.predict(np.array(shapes)) for predictor in predictors)
    for name in ("latency_seconds", "latency_upper_seconds", "power_watts"):
        np.testing.assert_allclose(getattr(fast, name), getattr(plain, name), rtol=1e-5)


def test_sweep_agrees_on_rows_like_those_of_training(predictors, invented):
    shapes = invented.random_shapes(np.random.default_rng(11), 500)
    fast, plain = (predictor.predict(shapes) for predictor in predictors)
    np.testing.assert_allclose(fast.latency_seconds, plain.latency_seconds, rtol=1e-5)
    np.testing.assert_allclose(fast.power_watts, plain.power_watts, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["h200-sxm__qwen3-30b-a3b__tp1ep1", "h100-sxm__mixtral-8x7b__tp2ep1"],
)
def test_sweep_of_a_shipped_bundle_agrees_on_a_hundred_thousand_random_rows(invented, name):
    bundle = load_bundle(MODELS / name)
    shapes = invented.random_shapes(np.random.default_rng(13), 1000)
    fast, plain = sweep.SweepPredictor(bundle), XGBoostPredictor(bundle)
    assert len(shapes) * len(fast.clocks_mhz) >= 100_000
    ours, theirs = fast.predict(shapes), plain.predict(shapes)
    np.testing.assert_allclose(ours.latency_seconds, theirs.latency_seconds, rtol=1e-5)
    np.testing.assert_allclose(ours.latency_upper_seconds, theirs.latency_upper_seconds, rtol=1e-5)
    np.testing.assert_allclose(ours.power_watts, theirs.power_watts, rtol=1e-5)
    np.testing.assert_array_equal(fast.covers(shapes), plain.covers(shapes))


def test_features_are_built_alike_by_compiled_code_and_by_the_definition(predictors, invented):
    fast = predictors[0]
    shapes = invented.random_shapes(np.random.default_rng(14), 300)
    weights = fast._base.weights, fast._power_base.weights
    features, parts, work = compiled_features.CompiledFeatures(fast._space, *weights).build(shapes)
    expected, terms = fast.space.build(shapes)
    np.testing.assert_allclose(features, expected, rtol=1e-6)
    np.testing.assert_allclose(parts, fast._base.parts(terms), rtol=1e-12)
    np.testing.assert_allclose(work, fast._power_base.work(terms), rtol=1e-12)


def test_predictions_are_close_to_the_truth(predictors, invented):
    shapes = invented.random_shapes(np.random.default_rng(12), 400)
    clocks = np.array(invented.CLOCKS_MHZ)
    prediction = predictors[0].predict(shapes)
    for index in (20, 60, 109):
        seconds, watts, _ = invented.truth(shapes, np.full(len(shapes), clocks[index]))
        errors = np.abs(prediction.latency_seconds[:, index] / seconds - 1.0)
        assert np.mean(errors) < 0.04
        assert np.mean(np.abs(prediction.power_watts[:, index] / watts - 1.0)) < 0.04


def test_loads_inside_training_are_covered_and_others_are_not(predictors):
    shapes = np.array(
        [
            [0.0, 0.0, 0.0, 64.0, 64_000.0, 64.0, 0.0],
            [1.0, 300.0, 0.0, 64.0, 64_000.0, 64.0, 45_000.0],
            [0.0, 0.0, 0.0, 900.0, 900_000.0, 900.0, 0.0],
            [1.0, 50_000.0, 0.0, 1.0, 1000.0, 1.0, 1.25e9],
            [0.0, 0.0, 0.0, 2.0, 80_000.0, 2.0, 0.0],
        ]
    )
    assert predictors[0].covers(shapes).tolist() == [True, True, False, False, False]


def test_idle_power_rises_with_clock_as_it_was_recorded(predictors):
    idle = predictors[0].idle_power_watts
    assert idle.shape == predictors[0].clocks_mhz.shape
    assert (np.diff(idle) >= 0.0).all()
    assert idle[-1] == pytest.approx(130.0, abs=3.0)
    assert predictors[0].manifest.idle_source == "recorded"


def test_no_form_of_the_matrix_is_compiled_for_while_serving(predictors):
    predictors[0].warm_up()
    walks = compiled_sweep.predict_shapes, compiled_sweep.shapes_covered
    compiled = [len(each.signatures) for each in walks]
    shapes = np.tile([1.0, 128.0, 0.0, 8.0, 4096.0, 8.0, 8192.0], (6, 1))
    frozen = shapes.copy()
    frozen.flags.writeable = False
    for form in (shapes, shapes[::2], np.asfortranarray(shapes), frozen, shapes.astype(int)):
        predictors[0].predict(form)
        predictors[0].covers(form)
    assert [len(each.signatures) for each in walks] == compiled


def test_a_matrix_of_another_form_is_refused(predictors):
    for predictor in predictors:
        with pytest.raises(PredictorsError, match=r"allowed: \(K, 7\)"):
            predictor.predict(np.ones((2, 5)))


def test_loading_takes_the_sweep_and_says_so(bundle, tmp_path):
    predictor = load_predictor(save(bundle, tmp_path))
    assert isinstance(predictor, sweep.SweepPredictor)
    assert not predictor.fallback_reason


def test_loading_without_numba_falls_back_and_says_so(bundle, tmp_path, monkeypatch):
    for name in ("sweep", "compiled_sweep", "compiled_features", "elementary", "compiling"):
        monkeypatch.delitem(sys.modules, f"predictors.{name}")
    monkeypatch.setitem(sys.modules, "numba", None)
    predictor = load_predictor(save(bundle, tmp_path))
    assert isinstance(predictor, XGBoostPredictor)
    assert "numba is not installed" in predictor.fallback_reason


@pytest.mark.parametrize(
    ("parameters", "names", "said"),
    [
        ({"booster": "gblinear", "updater": "coord_descent"}, list(FEATURES), "booster"),
        ({"objective": "reg:absoluteerror"}, list(FEATURES), "objective"),
        ({}, list(FEATURES)[::-1], "feature_names"),
    ],
)
# Newer XGBoost announces the end of linear boosters; the refusal must hold while they exist.
@pytest.mark.filterwarnings("ignore:.*gblinear.*deprecated")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sweep_refuses_models_that_it_cannot_walk(bundle, parameters, names, said):
    rng = np.random.default_rng(0)
    data = xgboost.DMatrix(rng.random((50, len(FEATURES))), rng.random(50), feature_names=names)
    booster = xgboost.train({"nthread": 1, **parameters}, data, 2)
    odd = Bundle(bundle.manifest, bytes(booster.save_raw("ubj")), bundle.power_model)
    with pytest.raises(BundleError, match=f"latency model of .* {said}"):
        sweep.SweepPredictor(odd)


def test_sweep_walks_categories_no_further_than_the_refusal(bundle):
    rng = np.random.default_rng(0)
    kinds = ["q"] * (len(FEATURES) - 1) + ["c"]
    rows = rng.random((200, len(FEATURES)))
    rows[:, -1] = rng.integers(0, 5, 200)
    data = xgboost.DMatrix(
        rows,
        rows[:, -1] == 3,
        feature_names=list(FEATURES),
        feature_types=kinds,
        enable_categorical=True,
    )
    booster = xgboost.train({"nthread": 1, "tree_method": "hist"}, data, 2)
    odd = Bundle(bundle.manifest, bytes(booster.save_raw("ubj")), bundle.power_model)
    with pytest.raises(BundleError, match="splits on categories"):
        sweep.SweepPredictor(odd)
