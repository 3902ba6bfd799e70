"""What is left out, corrected while serving, and what clocks chosen by prediction cost."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from predictors.cli import main
from predictors.correction import OnlineCorrection
from predictors.dataset import read_records
from predictors.evaluation import evaluate, predict_rows
from predictors.generic_training import SubjectRows
from predictors.judging import BLIND, energy_regret, held_out_clocks, stream, train_rows
from predictors.prediction import Prediction
from predictors.predictor import fastest_predictor
from predictors.profiling_advice import advise
from predictors.report import page
from predictors.training import save
from predictors.training_rows import supported_clocks


@pytest.fixture(scope="module")
def rows(recordings):
    return SubjectRows.of(read_records([recordings]))


def slowed(rows, factor, watts_factor=1.0):
    frame = rows.frame
    return dataclasses.replace(
        frame, seconds=frame.seconds * factor, watts=frame.watts * watts_factor
    )


def test_clocks_left_out_are_predicted(rows, invented):
    document = held_out_clocks(rows, rows, invented.QUICK)
    assert 0 < document["rows_count"] < 0.5 * len(rows.frame.seconds)
    assert document["latency_mape_ratio"] < 0.03
    assert document["power_mape_ratio"] < 0.04


def test_a_blind_predictor_counts_every_expert(rows, invented):
    blind = train_rows(rows, invented.QUICK, BLIND)
    assert blind.active_experts_source == "all"
    features, _ = blind.space.build(np.array([[0.0, 0.0, 0.0, 1.0, 100.0, 1.0, 0.0]]))
    assert features[list(blind.space.features).index("active_experts_count")][0] == 128.0


def test_a_slower_engine_is_learned_while_serving(bundle, rows):
    predictor = fastest_predictor(bundle)
    frame = slowed(rows, 1.15, 0.9)
    before = evaluate(predictor, frame)
    assert before["latency_mape_ratio"] > 0.1
    found = stream(predictor, frame)
    late = slice(len(frame.seconds) // 2, None)
    assert np.mean(np.abs(found.latency / frame.seconds - 1.0)[late]) < 0.03
    assert np.nanmean(np.abs(found.power / frame.watts - 1.0)[late]) < 0.03
    assert 0.98 <= found.covered[late].mean() <= 1.0


def test_a_correction_keeps_predictions_monotone_and_bounds_above_them(bundle, rows):
    predictor = fastest_predictor(bundle)
    correction = OnlineCorrection()
    frame = rows.frame.rows(np.arange(len(rows.frame.seconds)) < 600)
    latency, upper, power = predict_rows(predictor, frame.shapes, frame.clocks_mhz)
    rng = np.random.default_rng(0)
    for row in range(600):  # nonsense, to bend the correction
        correction.learn(
            frame.shapes[row],
            frame.clocks_mhz[row] / 1980.0,
            observed_seconds=frame.seconds[row] * rng.uniform(0.3, 3.0),
            predicted_seconds=latency[row],
            upper_seconds=upper[row],
            observed_watts=power[row] * rng.uniform(0.5, 2.0),
            predicted_watts=power[row],
        )
    shapes = frame.shapes[:40]
    found = correction.corrected(predictor.predict(shapes), shapes, predictor.clocks_mhz / 1980.0)
    assert (np.diff(found.latency_seconds, axis=1) <= 0.0).all()
    assert (np.diff(found.latency_upper_seconds, axis=1) <= 0.0).all()
    assert (np.diff(found.power_watts, axis=1) >= 0.0).all()
    assert (found.latency_upper_seconds >= found.latency_seconds).all()


def test_a_new_correction_changes_nothing(bundle, rows):
    predictor = fastest_predictor(bundle)
    shapes = rows.frame.shapes[:20]
    before = predictor.predict(shapes)
    after = OnlineCorrection().corrected(before, shapes, predictor.clocks_mhz / 1980.0)
    for name in ("latency_seconds", "latency_upper_seconds", "power_watts"):
        assert getattr(after, name) == pytest.approx(getattr(before, name))


class _Known:
    """A predictor that says what it is given."""

    def __init__(self, seconds, watts):
        self._prediction = Prediction(seconds, seconds, watts)

    def predict(self, shapes):
        return self._prediction


def test_regret_is_none_with_the_truth_and_counts_what_a_wrong_clock_costs():
    seconds = np.array([[1.2, 1.1, 1.0], [1.6, 1.2, 1.0]])
    watts = np.array([[100.0, 150.0, 300.0], [100.0, 200.0, 300.0]])
    shapes = np.ones((2, 7))
    right = energy_regret(_Known(seconds, watts), shapes, seconds, watts)
    assert (right.mean_energy_ratio, right.violations_ratio) == (0.0, 0.0)
    assert right.saving_ratio == right.best_saving_ratio > 0.0
    # believes that the lowest clock is slow, and takes the next
    careful = seconds * np.array([2.0, 1.0, 1.0])
    wrong = energy_regret(_Known(careful, watts), shapes, seconds, watts)
    assert wrong.mean_energy_ratio == pytest.approx((165.0 / 120.0 - 1.0) / 2.0)
    # believes that every clock is fast
    bold = energy_regret(_Known(np.ones((2, 3)), watts), shapes, seconds, watts)
    assert bold.violations_ratio == 0.5


def test_the_page_stands_alone_and_shows_every_part(bundle, recordings, tmp_path):
    path = save(bundle, tmp_path)
    files = ["--json", str(tmp_path / "f.json"), "--html", str(tmp_path / "f.html")]
    assert main(["evaluate", "--bundle", str(path), "--data", str(recordings), *files]) == 0
    text = (tmp_path / "f.html").read_text()
    assert text.count("<svg") == 5
    for part in ("Parity", "Error over clock", "Coverage", "Feature contributions", "simulated"):
        assert part in text
    assert not re.search(r"<script|https?://|src=|url\((?!#)", text)


def test_the_same_rows_give_the_same_page(bundle, rows):
    predictor = fastest_predictor(bundle)
    document = evaluate(predictor, rows.frame)
    pages = [page(bundle, predictor, rows.frame, document) for _ in range(2)]
    assert pages[0] == pages[1]


def test_advice_knows_the_error_and_is_less_sure_far_from_the_rows(recordings):
    near = [[0.0, 0.0, 0.0, 16.0, 16_000.0, 16.0, 0.0]]
    far = [[1.0, 9000.0, 90_000.0, 900.0, 9_000_000.0, 900.0, 8.5e8]]
    records = read_records([recordings])
    advice = advise(records, np.array([near, far]), np.array([500.0, 1900.0]))
    assert 0.005 < advice.latency_error_ratio < 0.03
    assert advice.disagreement.shape == (2, 2)
    assert (advice.disagreement[1] > advice.disagreement[0]).all()


def test_supported_clocks_are_those_with_rows(rows):
    supported = supported_clocks(rows.frame)
    assert supported["decode"][0] <= 375.0
    assert supported["prefill"][1] >= 1950.0
    high = rows.frame.rows(rows.frame.clocks_mhz > 1500.0)
    assert supported_clocks(high)["decode"][0] > 1500.0
    few = rows.frame.rows(np.arange(len(rows.frame.seconds)) < 5)
    assert supported_clocks(few) == {}
