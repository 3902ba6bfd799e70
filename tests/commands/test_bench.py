"""`throttle bench`: figures by stable names, from few samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from throttle import cli
from throttle.bench.segments import HORIZON_ITERATIONS, judge_segment_counts, segment_lengths
from throttle.bench.states import record, shipped_predictor
from throttle.bench.timing import Result, time_calls
from throttle.control.projection import DECODE_SEGMENT_ITERATIONS

MODELS = Path(__file__).resolve().parents[2] / "models"
FIELDS = {
    "case",
    "requests_count",
    "clocks_count",
    "pacing_seconds",
    "p50_seconds",
    "p99_seconds",
    "p999_seconds",
    "samples_count",
}


def _bench(tmp_path, *arguments):
    path = tmp_path / "figures.json"
    assert cli.main(["bench", *arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())["results"]


def _checked(results):
    for each in results:
        assert set(each) >= FIELDS
        assert 0.0 < each["p50_seconds"] <= each["p99_seconds"] <= each["p999_seconds"]
    return results


def test_decisions_are_timed_back_to_back_and_paced_with_the_share_of_each_step(tmp_path):
    arguments = ("--requests", "4", "--samples", "20", "--pacing-seconds", "0.002")
    fixed, results = np.split(_checked(_bench(tmp_path, "decision", *arguments)), [2])
    assert [each["case"] for each in fixed] == ["fixed computation"] * 2
    assert [each["pacing_seconds"] for each in fixed] == [0.0, 0.002]
    assert [each["pacing_seconds"] for each in results] == [0.0, 0.0, 0.002, 0.002]
    assert {each["samples_count"] for each in results} == {20}
    assert {each["clocks_count"] for each in results} == {110}
    steps = results[0]["step_p50_seconds"]
    assert steps["decide"] > steps["gathering"] > 0.0
    assert steps["decide, step by step"] > steps["prediction"] > steps["slack"] > 0.0
    assert "parsing" not in steps
    assert results[1]["step_p50_seconds"]["parsing"] > 0.0
    assert results[0]["allocated_bytes"] > 0
    assert all(0.0 < each["processor_p50_seconds"] < 1.0 for each in results)


def test_echoes_are_timed_by_both_servers_for_each_number_of_engines(tmp_path):
    arguments = ("--requests", "4", "--samples", "20", "--engines", "1", "2")
    results = _checked(_bench(tmp_path, "transport", *arguments))
    assert [each["engines_count"] for each in results] == [1, 1, 2, 2] * 2
    assert len({each["case"] for each in results}) == 2


@pytest.mark.slow
def test_round_trips_to_a_daemon_of_its_own_answer_every_newest_state(tmp_path):
    arguments = ("--requests", "4", "--samples", "20", "--engines", "1", "2")
    results = _checked(_bench(tmp_path, "daemon", *arguments))
    trips = [each for each in results if each["case"] == "round trip"]
    assert [each["engines_count"] for each in trips] == [1, 1, 2]
    assert not any(each["unanswered_count"] for each in trips)
    assert {each["case"] for each in results} >= {"serve until SERVING", "import throttle.client"}


@pytest.mark.parametrize(("limit", "status"), [("1e9", 0), ("1e-9", 1)])
def test_the_guard_fails_above_its_limit(limit, status, capsys):
    assert cli.main(["bench", "guard", "--samples", "20", "--limit-ratio", limit]) == status
    assert "reference computations" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [("--samples", "1"), ("--requests", "0"), ("--engines", "0"), ("--pacing-seconds", "nan")],
)
def test_counts_that_time_nothing_are_refused(arguments, capsys):
    assert cli.main(["bench", "decision", *arguments]) == 1
    assert arguments[0] in capsys.readouterr().err


def test_no_two_recorded_states_are_alike():
    predictor = shipped_predictor(MODELS)
    states = record(4, 30, predictor).states
    seen = {(each.engine_time_seconds, tuple(each.progress.generated_tokens)) for each in states}
    assert len(seen) == len(states)


def test_quantiles_are_those_of_the_samples():
    seconds = list(np.linspace(1.0, 2.0, 1001))
    result = Result.of("case", seconds, requests_count=1)
    assert (result.p50_seconds, result.p99_seconds) == pytest.approx((1.5, 1.99))
    assert result.document()["samples_count"] == 1001


def test_every_call_is_made_once():
    called = []
    times = time_calls([lambda: called.append(1), lambda: called.append(2)], 0.0)
    assert called == [1, 2]
    assert len(times.seconds) == len(times.processor_seconds) == 2


@pytest.mark.parametrize("count", [8, 16, 24, 32, 64, 128])
def test_segments_of_every_number_fill_the_horizon(count):
    lengths = segment_lengths(count)
    assert len(lengths) == count
    assert sum(lengths) == HORIZON_ITERATIONS == sum(DECODE_SEGMENT_ITERATIONS)
    assert min(lengths) >= 1


def test_one_segment_for_each_iteration_chooses_as_the_exact_projection_does():
    judged = judge_segment_counts(shipped_predictor(MODELS), (8, HORIZON_ITERATIONS), 3)
    assert [each.states_count for each in judged] == [3, 3]
    assert judged[1].same_clock_ratio == 1.0
    assert judged[1].violation_ratio == 0.0
