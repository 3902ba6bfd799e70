from __future__ import annotations

import json
import subprocess

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_the_base_package_changes_no_version_in_vllms_environment(
    wheel, vllm_environment, tmp_path
):
    report = tmp_path / "report.json"
    subprocess.run(
        [
            vllm_environment, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--dry-run", "--force-reinstall", "--no-deps", "--report", report, wheel,
        ],
        check=True,
    )  # fmt: skip
    assert [_name(each) for each in json.loads(report.read_text())["install"]] == ["moe-throttle"]
    subprocess.run(
        [
            vllm_environment, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--dry-run", "--report", report, f"moe-throttle @ {wheel.as_uri()}",
        ],
        check=True,
    )  # fmt: skip
    changed = [_name(each) for each in json.loads(report.read_text())["install"]]
    assert set(changed) <= {"moe-throttle"}


def test_the_wheel_holds_the_protocol_for_other_languages(vllm_environment):
    list_files = "from importlib.resources import files; print(*files('throttle.v1').iterdir())"
    listing = subprocess.run(
        [vllm_environment, "-I", "-c", list_files], check=True, capture_output=True, text=True
    ).stdout.split()
    names = {path.rpartition("/")[2] for path in listing}
    assert {"engine.proto", "decision.proto", "throttle_service.proto"} <= names


def _name(entry):
    return entry["metadata"]["name"]
