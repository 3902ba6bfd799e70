"""Metrics, their page, the dashboard and the alerts speak of the same names."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "throttle.json"
ALERTS = ROOT / "docker" / "prometheus" / "alerts.yaml"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (package prometheus) is not installed"
)


@pytest.fixture(scope="module")
def metrics_page():
    spec = importlib.util.spec_from_file_location("metrics_page", ROOT / "scripts/metrics_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def families(metrics_page):
    return {name: (kind, labels) for name, kind, labels, _ in metrics_page.daemon_families()}


def queries():
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")


def expressions():
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["expr"] for rule in group["rules"]]


def used(expression):
    """Names of metrics and the labels asked of them."""
    for name, matchers in re.findall(r"((?:throttle|process)_\w+)(?:\{([^}]*)\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))


def test_the_page_is_what_the_metrics_say(metrics_page):
    assert metrics_page.PAGE.read_text("utf-8") == metrics_page.page(), "run `make metrics-page`"


def test_names_have_a_prefix_a_unit_or_a_meaning_and_help(metrics_page):
    for name, kind, _, text in metrics_page.daemon_families():
        assert name.startswith("throttle_")
        assert (kind == "counter") == name.endswith("_total")
        assert not re.search(r"_(mhz|ms|milliseconds|percent|kwh)\b", name)
        assert text.endswith(".")


@pytest.mark.parametrize("expression", [*queries(), *expressions()])
def test_every_query_asks_for_metrics_and_labels_that_exist(expression, families):
    names = list(used(expression))
    assert names or expression.startswith("up{")
    for name, labels in names:
        if name.startswith("process_"):
            assert name == "process_resident_memory_bytes"
            continue
        family = re.sub(r"_bucket$", "", name)
        assert family in families, name
        kind, own = families[family]
        assert (kind == "histogram") == name.endswith("_bucket")
        assert labels <= {*own, "instance", "job"}, expression


def test_every_metric_is_on_the_dashboard_or_says_who_it_is(families):
    shown = {re.sub(r"_bucket$", "", name) for query in queries() for name, _ in used(query)}
    hidden = {"throttle_build_info", "throttle_engine_info", "throttle_reloads_total",
              "throttle_slo_breaker_trips_total", "throttle_state_age_seconds"}  # fmt: skip
    assert set(families) - shown == hidden


@needs_promtool
def test_every_query_is_valid(tmp_path):
    rules = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(queries())]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", path], check=True, capture_output=True)


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then(tmp_path):
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yaml"), tmp_path)
    result = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yaml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


@needs_promtool
def test_the_prometheus_configuration_is_valid(tmp_path):
    shutil.copytree(ALERTS.parent, tmp_path / "prometheus")
    path = tmp_path / "prometheus" / "prometheus.yml"
    subprocess.run(["promtool", "check", "config", path], check=True, capture_output=True)
