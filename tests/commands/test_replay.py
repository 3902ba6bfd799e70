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
