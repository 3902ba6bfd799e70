from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from throttle.simulation.experiment import on_common_horizon
from throttle.simulation.policies.static import FixedClock, MaximumClock
from throttle.simulation.report import page, write_report
from throttle.simulation.workload import load_trace

VOID = {"meta", "br", "link", "input", "hr", "img"}


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def text(bench, plant):
    requests = load_trace("azure2023_conv_10min").window(60.0, 75.0).requests
    runs = {
        "max": bench(plant, requests).play(MaximumClock()),
        "throttle <1>": bench(plant, requests).play(FixedClock(1200)),
    }
    return page(
        on_common_horizon(runs),
        title="One H200 & a trace",
        ttft_seconds=1.0,
        tpot_seconds=0.05,
        slack_seconds={"throttle <1>": [(0.1 * n, 0.5 - 0.001 * n) for n in range(200)]},
        more_figures={"throttle <1>": {"decision_p50_seconds": 0.0002}},
    )


def test_the_page_asks_nothing_of_the_outside(text):
    assert "http" not in text
    assert "<script" not in text
    assert "@import" not in text
    for target in re.findall(r'(?:href|src)="([^"]*)"', text):
        assert target.startswith("#")
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#")


def test_every_heading_and_chart_says_simulated(text):
    assert text.count("<section>") == 4
    assert len(re.findall(r'<h2>[^<]*<span class="mark">simulated', text)) == 4
    assert len(re.findall(r'aria-label="[^"]*\(simulated\)"', text)) == text.count("<svg") == 3
    assert "(simulated)</title>" in text


def test_the_page_is_well_formed_and_its_ids_are_unique(text):
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))


def test_names_are_escaped_and_units_are_told(text):
    assert "throttle &lt;1&gt;" in text
    assert "One H200 &amp; a trace" in text
    for unit in ("(kJ)", "(ms)", "(MHz)", "(W)", "(s)", "simulated time (minutes)"):
        assert unit in text


def test_a_single_run_makes_a_page_too(bench, plant, tmp_path):
    requests = load_trace("azure2023_conv_10min").window(60.0, 65.0).requests
    path = tmp_path / "report.html"
    write_report(
        path,
        {"max": bench(plant, requests).play()},
        title="One run",
        ttft_seconds=1.0,
        tpot_seconds=0.05,
    )
    assert "One run" in path.read_text(encoding="utf-8")
