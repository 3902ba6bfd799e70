from __future__ import annotations

import dataclasses
import json
import math

import pytest

from throttle.control.state import Slos
from throttle.errors import InvalidInputError
from throttle.simulation.comparison.comparing import Equalize, Plan, compare, interval
from throttle.simulation.comparison.execution import InProcess, LocalProcesses, Progress
from throttle.simulation.comparison.page import write_page
from throttle.simulation.comparison.runs import RunSpec, Scene, play_run, scaled
from throttle.simulation.comparison.searches import (
    _bisect_goodput,
    best_static,
    goodput_compression,
)

SCENE = Scene("h200-qwen3-30b-a3b", "azure2023_conv_10min", duration_seconds=60.0)
SUMMARY_FIELDS = {
    "energy_joules",
    "energy_per_output_token_joules",
    "attainment_ratio",
    "ttft_p99_seconds",
    "tpot_p99_seconds",
    "requests_count",
    "output_tokens_count",
    "clock_changes_count",
    "decision_p50_seconds",
    "decision_p99_seconds",
    "policy",
    "plant",
    "trace",
    "load",
    "seed",
    "horizon_seconds",
    "idle_energy_joules",
    "tbt_p99_seconds",
    "e2e_p99_seconds",
    "lost_count",
    "clock_changes_per_second",
}


def test_a_generic_bundle_is_bound_to_the_plant_that_is_compared():
    scene = dataclasses.replace(SCENE, bundle="models/generic-moe", duration_seconds=10.0)
    predictor = scene.build_predictor()
    assert predictor.manifest.kind == "generic"
    assert predictor.manifest.gpu == "h200-sxm"
    assert tuple(predictor.clocks_mhz) == scene.build_plant().clocks_mhz
    record = play_run(RunSpec(scene, "throttle", 0.6, 4.0, 1))
    assert record.requests_count > 0
    assert record.clock_mean_mhz < scene.build_plant().maximum_clock_mhz


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    plan = Plan(
        SCENE,
        ("max", "best-static", "fixed-900", "fixed-345"),
        loads=(0.4, 0.6),
        seeds=(1, 2),
        cache=tmp_path_factory.mktemp("cache"),
    )
    return compare(plan, InProcess())


def test_every_run_has_the_fields_that_are_promised(document):
    policies = {run["policy"] for run in document["runs"]}
    assert policies == {"max", "best-static", "best-static-equal", "fixed-900", "fixed-345"}
    assert len(document["runs"]) == 5 * 2 * 2
    for run in document["runs"]:
        assert run.keys() >= SUMMARY_FIELDS
        assert run["lost_count"] == round((1 - run["attainment_ratio"]) * run["requests_count"])
    assert json.loads(json.dumps(document)) == document


def test_energies_of_a_cell_speak_of_one_horizon(document):
    cells = {}
    for run in document["runs"]:
        cells.setdefault((run["load"], run["seed"]), set()).add(run["horizon_seconds"])
    assert all(len(horizons) == 1 for horizons in cells.values())


def test_the_summary_holds_ratios_with_intervals(document):
    figures = document["summary"]["0.6"]["fixed-900"]
    ratios = [
        run["energy_ratio"]
        for run in document["runs"]
        if run["policy"] == "fixed-900" and run["load"] == 0.6
    ]
    assert figures["energy_ratio"]["mean"] == pytest.approx(sum(ratios) / 2)
    assert figures["energy_ratio"]["count"] == 2
    assert document["summary"]["0.6"]["max"]["energy_ratio"]["mean"] == 1.0
    assert not document["summary"]["0.6"]["fixed-345"]["comparable"]


def test_the_best_static_clock_keeps_its_rule(document):
    for run in document["runs"]:
        if run["policy"] == "best-static":
            assert run["attainment_ratio"] >= 0.99
            assert run["attainment_loss"] <= 0.005 + 1e-9
            assert run["energy_ratio"] < 1.0
        if run["policy"] == "best-static-equal":
            assert run["attainment_loss"] <= 0.001 + 1e-9


def test_the_page_is_one_file_that_says_simulated(document):
    page = write_page(document)
    assert "simulated" in page
    assert "<svg" in page
    assert "<script" not in page
    assert 'src="http' not in page
    assert page.count("<tr") == 1 + 5 * 2


def test_no_static_clock_on_the_grid_beats_the_searched_one():
    spec = RunSpec(SCENE, "max", 0.6, 4.0, 1)
    maximum = play_run(spec)
    found = best_static(spec, maximum)
    floor = max(0.99, maximum.attainment_ratio - 0.005)
    clocks = SCENE.build_plant().clocks_mhz
    runs = [play_run(dataclasses.replace(spec, policy=f"fixed-{clock}")) for clock in clocks[::6]]
    horizon = max(run.horizon_seconds for run in (*runs, found.allowed))
    least = min(
        run.extended_to(horizon).energy_joules for run in runs if run.attainment_ratio >= floor
    )
    assert found.allowed.extended_to(horizon).energy_joules <= least * 1.005


def test_goodput_is_bisected_to_a_percent():
    for limit in (0.3, 1.0, 2.9, 17.0):
        found = _bisect_goodput(lambda ratio, limit=limit: ratio <= limit)
        assert found <= limit < found * 1.011


def test_goodput_is_kept_by_a_hash_of_the_scene(tmp_path):
    first = goodput_compression(SCENE, tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text(json.dumps({"compression_ratio": 1.25}))
    assert goodput_compression(SCENE, tmp_path) == 1.25
    tighter = dataclasses.replace(SCENE, slos=Slos(ttft_seconds=1.0, tpot_seconds=0.03))
    assert goodput_compression(tighter, tmp_path) < first


def test_limits_that_nothing_attains_are_named(tmp_path):
    scene = dataclasses.replace(SCENE, slos=Slos(tpot_seconds=1e-5), duration_seconds=5.0)
    with pytest.raises(InvalidInputError, match="trace"):
        goodput_compression(scene)


def test_processes_and_this_process_agree():
    specs = [RunSpec(SCENE, "fixed-1200", 0.5, 4.0, seed) for seed in (1, 2, 3)]
    with InProcess() as here:
        expected = here.map(play_run, specs, lambda: None)
    with LocalProcesses(2) as processes:
        found = processes.map(play_run, specs, lambda: None)
    assert [each.energy_joules for each in found] == [each.energy_joules for each in expected]


def test_progress_tells_the_time_left(capsys):
    progress = Progress("runs", 2)
    progress.done()
    progress.done()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "runs: 0 of 2"
    assert lines[-1].startswith("runs: 2 of 2, ")


def test_intervals_are_those_of_students_t():
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["half_width"] == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert interval([1.0])["half_width"] is None
    assert interval([]) is None


def test_scaled_limits_leave_missing_ones_missing():
    assert scaled(Slos(ttft_seconds=1.0), 0.5) == Slos(ttft_seconds=0.5)


def test_a_plan_with_an_unknown_policy_is_refused():
    with pytest.raises(InvalidInputError, match="policies"):
        Plan(SCENE, ("fastest",)).check()
    with pytest.raises(InvalidInputError, match="load"):
        Plan(SCENE, ("max",), loads=(0.0,), equalize=Equalize.NONE).check()
