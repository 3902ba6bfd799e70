"""Takes the pictures of docs/images from running programs.

A daemon with simulated engines, its status page in a browser, the dashboard's queries asked of a
real Prometheus and drawn here (Grafana is not needed), and the demo's report with its two charts
for the README. Needs chromium and prometheus, and `make demo` before it.
Use: screenshots.py [--seconds 120] [--out docs/images] [--only-report]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "throttle.json"
DAEMON, PROMETHEUS = "127.0.0.1:19474", "127.0.0.1:19475"
ENGINES_COUNT = 3
STEP_SECONDS = 2


def start(stack: contextlib.ExitStack, folder: Path, *command: object) -> None:
    """Run a program until the stack unwinds."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=folder)  # noqa: S603

    def end() -> None:
        process.terminate()
        process.wait(30)

    stack.callback(end)


def browse(url: str, picture: Path, size: str, *options: str) -> None:
    """One picture of a page."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(  # noqa: S603
            [
                shutil.which("chromium") or "chromium", "--headless", "--no-sandbox",
                "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
                f"--window-size={size}", "--virtual-time-budget=20000", *options,
                f"--screenshot={picture}", url,
            ],
            check=True, capture_output=True, timeout=180,
        )  # fmt: skip


def asked(query: str, start_seconds: float, end_seconds: float) -> list[dict[str, Any]]:
    """What Prometheus answers to a query over a time."""
    arguments = urllib.parse.urlencode(
        {"query": query, "start": start_seconds, "end": end_seconds, "step": STEP_SECONDS}
    )
    url = f"http://{PROMETHEUS}/api/v1/query_range?{arguments}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return result


def draw_dashboard(picture: Path, start_seconds: float, end_seconds: float) -> int:
    """Draw every panel from its own queries; returns how many queries had no answer."""
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    columns, empty = 3, 0
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(15, 2.3 * rows), layout="constrained")
    figure.suptitle(
        "docker/grafana/dashboards/throttle.json: its queries, asked of Prometheus; simulated GPUs"
    )
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for panel, axes in zip(panels, grid.flat, strict=False):
        unit = panel["fieldConfig"]["defaults"]["unit"]
        axes.set_title(f"{panel['title']} [{unit}]", fontsize=9, loc="left")
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "20s").replace("$instance", ".*")
            series = asked(query, start_seconds, end_seconds)
            empty += not series
            if not series:
                print(f"no answer: {query}")
            for each in series:
                values = np.array(each["values"], dtype=float)
                name = target["legendFormat"]
                for label, value in each["metric"].items():
                    name = name.replace(f"{{{{{label}}}}}", value)
                axes.plot(values[:, 0] - start_seconds, values[:, 1], linewidth=1, label=name)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
        if axes.lines:
            axes.legend(fontsize=6, loc="upper right", framealpha=0.6)
    figure.savefig(picture, dpi=80)
    return empty


def browse_report(report: Path, out: Path) -> None:
    """The top of a report, and its charts of energy and time by themselves."""
    browse(report.as_uri(), out / "report.png", "1240,1160")
    charts = re.findall(r"<svg.*?</svg>", report.read_text("utf-8"), re.DOTALL)[:2]
    style = "<style>body {margin: 8px; font-family: sans-serif} svg {width: 100%}</style>"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "charts.html"
        page.write_text(f"<!doctype html><meta charset=utf-8>{style}{''.join(charts)}", "utf-8")
        browse(page.as_uri(), out / "demo.png", "1010,1020")


def play_and_browse(seconds: float, out: Path) -> int:
    """Status page and dashboard of a daemon with engines; how many queries had no answer."""
    mpl.use("Agg")
    throttle = (sys.executable, "-m", "throttle.cli")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gpus, socket = folder / "gpus", folder / "throttle.sock"
        simulate = (*throttle, "simulate", "--gpus-file", gpus, "--engines", ENGINES_COUNT)
        subprocess.run([*map(str, simulate), "--only-make-gpus"], check=True)  # noqa: S603
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 2s}\nscrape_configs:\n  - job_name: throttle\n"
            f"    static_configs: [{{targets: ['{DAEMON}']}}]\n"
        )
        start(
            stack, folder, "prometheus", "--config.file=prometheus.yml",
            f"--web.listen-address={PROMETHEUS}", "--storage.tsdb.path=data",
        )  # fmt: skip
        start(
            stack, folder, *throttle, "serve", "--socket", socket, "--simulated-gpus", gpus,
            "--bundles", ROOT / "models", "--metrics-address", DAEMON,
        )  # fmt: skip
        start(stack, folder, *simulate, "--target", f"unix:{socket}")
        started = time.time()
        time.sleep(seconds)
        url = f"http://{DAEMON}/"
        browse(url, out / "status.png", "1240,860")
        browse(url, out / "status-dark.png", "1240,860", "--force-dark-mode",
               "--blink-settings=preferredColorScheme=0")  # fmt: skip
        return draw_dashboard(out / "dashboard.png", started, time.time())


def main() -> int:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="how long the engines play")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--report", type=Path, default=ROOT / "out" / "demo" / "report.html")
    parser.add_argument("--only-report", action="store_true", help="nothing of the daemon")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.report.exists():
        browse_report(arguments.report, arguments.out)
    else:
        print(f"{arguments.report} is not there; run make demo first for report.png and demo.png")
    if not arguments.only_report:
        empty = play_and_browse(arguments.seconds, arguments.out)
        print(f"{empty} queries had no answer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
