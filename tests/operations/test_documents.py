"""What the documents promise is there."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
THREATS = tomllib.loads((ROOT / "tests/operations/threats.toml").read_text())


def test_every_threat_has_a_test_and_every_test_a_threat():
    table = (ROOT / "docs/security.md").read_text().partition("## Threats")[2]
    names = re.findall(r"\| `([a-z-]+)` \|$", table, re.MULTILINE)
    assert names == sorted(names, key=names.index)
    assert set(names) == set(THREATS)


@pytest.mark.parametrize("name", THREATS)
def test_a_threats_defence_and_test_are_where_the_list_says(name):
    threat = THREATS[name]
    assert (ROOT / threat["file"]).read_text().count(threat["defence"]) == 1
    path, _, test = threat["test"].partition("::")
    assert f"def {test}(" in (ROOT / path).read_text()


def test_every_finding_of_the_doctor_is_explained_and_no_other():
    table = (ROOT / "docs/operating.md").read_text().partition("    throttle doctor\n")[2]
    explained = re.findall(r"^\| `([A-Za-z ]+)` \|", table.partition("\n## ")[0], re.MULTILINE)
    assert sorted(explained) == sorted(_checks_of_the_doctor())


def _checks_of_the_doctor():
    """The second argument of everything that makes a finding."""
    found = set()
    for path in ("throttle/actuation/examination.py", "throttle/commands/doctor.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in {"Finding", "_found"} and isinstance(node.args[1], ast.Constant):
                found.add(node.args[1].value)
    return found
