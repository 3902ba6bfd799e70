from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from throttle import cli
from throttle.commands.replay import (
    decision_document,
    decisions_digest,
    read_metadata,
    recorded_profile,
    replay,
)
from throttle.control.controller import Controller
from throttle.control.settings import ControlSettings
from throttle.daemon.recording import read_states
from throttle.testing import FormulaPredictor

ROOT = Path(__file__).resolve().parent.parent.parent


def _script():
    path = ROOT / "scripts" / "golden_recording.py"
    spec = importlib.util.spec_from_file_location("golden_recording", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden():
    return _script()


def replayed(path):
    profile = recorded_profile(read_metadata(path), path.name)
    controller = Controller(profile, FormulaPredictor(), ControlSettings())
    return [decision_document(*each) for each in replay(read_states(path), profile, controller)]


def test_the_policy_decides_as_it_did(golden):
    wanted = json.loads(golden.DECISIONS.read_text())
    found = golden.golden_decisions()
    assert len(found) == len(wanted)
    differing = [(one, other) for one, other in zip(found, wanted, strict=True) if one != other]
    assert not differing, (
        f"{len(differing)} of {len(wanted)} decisions differ, the first: now {differing[0][0]}, "
        f"before {differing[0][1]}. If the policy is meant to change, run "
        "`python scripts/golden_recording.py` and commit what it writes."
    )


def test_two_replays_give_the_same_bytes(golden):
    first, second = (replayed(golden.RECORDING) for _ in range(2))
    assert decisions_digest(first) == decisions_digest(second)
    assert decisions_digest(first) != decisions_digest(first[:-1])


def test_the_recording_exercises_the_policy(golden):
    reasons = {each["reason"] for each in replayed(golden.RECORDING)}
    assert {"cruise", "slack", "held", "infeasible", "parked"} <= reasons


def test_a_missing_recording_is_an_error_that_says_so(capsys, tmp_path):
    assert cli.main(["replay", str(tmp_path / "none.parquet")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_a_file_that_is_no_recording_is_refused(capsys, tmp_path):
    path = tmp_path / "not.parquet"
    path.write_text("no")
    assert cli.main(["replay", str(path)]) == 1
    assert "Parquet" in capsys.readouterr().err


def decided(golden, tmp_path, *arguments):
    out = tmp_path / "decisions.json"
    assert cli.main(["replay", str(golden.RECORDING), "--json", str(out), *arguments]) == 0
    return json.loads(out.read_text())


def test_a_generic_bundle_is_bound_to_the_recorded_engine(golden, tmp_path):
    found = decided(golden, tmp_path, "--bundle", str(ROOT / "models" / "generic-moe"))
    assert found["bundle"] == "generic-moe"
    clocks = read_metadata(golden.RECORDING).gpu_clocks_mhz
    chosen = {each["target_clock_mhz"] for each in found["decisions"]}
    assert chosen <= {0, *clocks}
    assert len(chosen) > 3
    predicted = [each["predicted_power_watts"] for each in found["decisions"]]
    assert all(0.0 < watts <= 700.0 for watts in predicted if watts)
    assert any(predicted)


def test_a_bundle_of_another_gpu_is_refused(golden, capsys):
    other = ROOT / "models" / "h100-sxm__qwen3-30b-a3b__tp1ep1"
    assert cli.main(["replay", str(golden.RECORDING), "--bundle", str(other)]) == 1
    assert "made for GPU 'h100-sxm'; the engine's is 'h200-sxm'" in capsys.readouterr().err


def test_the_control_part_of_a_configuration_counts(golden, tmp_path):
    bundles = ["--bundle", str(ROOT / "models")]
    file = tmp_path / "throttle.toml"
    # a daemon's file may leave to flags what replaying needs nothing of
    file.write_text('tcp_address = "127.0.0.1:7077"\n[control]\nfloor_clock_ratio = 0.9\n')
    plain = decided(golden, tmp_path, *bundles)
    floored = decided(golden, tmp_path, *bundles, "--config", str(file))
    assert floored["control"] == plain["control"] | {"floor_clock_ratio": 0.9}
    cruising = [each for each in floored["decisions"] if each["reason"] == "cruise"]
    assert cruising
    assert min(each["target_clock_mhz"] for each in cruising) >= 0.9 * 1980
    assert any(
        each["reason"] == "cruise" and each["target_clock_mhz"] < 0.9 * 1980
        for each in plain["decisions"]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[control]\nfloor_clock_ratio = 7\n", "control.floor_clock_ratio is 7"),
        ("[control]\nflor_clock_ratio = 0.5\n", "did you mean control.floor_clock_ratio?"),
    ],
)
def test_a_configuration_that_serving_would_refuse_is_refused(text, said, golden, tmp_path, capsys):
    file = tmp_path / "throttle.toml"
    file.write_text(text)
    assert cli.main(["replay", str(golden.RECORDING), "--config", str(file)]) == 1
    assert said in capsys.readouterr().err
