from __future__ import annotations

import json

import pytest

from throttle import cli
from throttle.commands.compare import read_slos
from throttle.control.state import Slos
from throttle.errors import InvalidInputError, NotFoundError


def test_a_comparison_writes_json_and_a_page(tmp_path, capsys):
    arguments = ["compare", "--duration", "20", "--policies", "max,fixed-1200", "--load", "0.4,0.6"]
    arguments += ["--jobs", "1", "--cache", str(tmp_path / "cache")]
    arguments += ["--json", str(tmp_path / "c.json"), "--html", str(tmp_path / "c.html")]
    assert cli.main(arguments) == 0
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["simulated"] is True
    assert {run["policy"] for run in document["runs"]} == {"max", "fixed-1200"}
    assert set(document["summary"]) == {"0.4", "0.6"}
    assert (tmp_path / "c.html").read_text().startswith("<!doctype html>")
    output = capsys.readouterr()
    assert "simulated" in output.out
    assert "policies: 2 of 2" in output.err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--policies", "fastest"], "policies is 'fastest'"),
        (["--load", "many"], "--load is 'many'"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--outage", "30"], "EVERY:FOR"),
        (["--set", "nothing"], "KEY=VALUE"),
        (["--trace", "none"], "no trace"),
        (["--plant", "none"], "no plant"),
        (["--predictor-ratio", "0"], "--predictor-ratio"),
        (["--slo", "missing.toml"], "missing.toml"),
    ],
)
def test_what_is_not_allowed_is_named(capsys, tmp_path, extra, message):
    arguments = ["compare", "--jobs", "1", "--cache", str(tmp_path), "--policies", "max", *extra]
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_limits_are_read_from_toml_and_json(tmp_path):
    toml, text = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text("ttft_seconds = 2\ne2e_seconds = 30.0\n")
    text.write_text('{"tbt_seconds": 0.1}')
    assert read_slos(toml) == Slos(ttft_seconds=2.0, e2e_seconds=30.0)
    assert read_slos(text) == Slos(tbt_seconds=0.1)


def test_limits_that_are_not_allowed_are_named(tmp_path):
    path = tmp_path / "a.toml"
    for content, message in (("tpot = 1", "keys"), ("tpot_seconds = -1", "tpot_seconds")):
        path.write_text(content)
        with pytest.raises(InvalidInputError, match=message):
            read_slos(path)
    with pytest.raises(NotFoundError):
        read_slos(tmp_path / "none.toml")
