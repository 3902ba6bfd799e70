"""Writes docs/metrics.md from the metrics themselves.

Use: metrics_page.py [FILE].
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector

from throttle.actuation.simulated import SimulatedGpu, SimulatedGpuFile
from throttle.daemon.assembly import build_server
from throttle.daemon.config import DaemonConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

_HEAD = """# Metrics

Served at `metrics_address` under `/metrics`, in a registry of their own. Off by default. Names
follow Prometheus: base units, `_total` for counters; clocks are in hertz (DCGM has MHz). `gpu` is a
UUID, `engine` an engine's id; requests are never labels. What is predicted says so.

This page is written by `make metrics-page`; a test keeps it current. The dashboard is
`docker/grafana/dashboards/throttle.json`, the alerts are `docker/prometheus/alerts.yaml`.

| name | type | labels | meaning |
|---|---|---|---|
"""
_TAIL = """
Besides, `process_*` as every Prometheus client has them: `process_resident_memory_bytes`,
`process_cpu_seconds_total`, `process_start_time_seconds`, `process_open_fds` and others.
"""


def families(registry: CollectorRegistry) -> list[tuple[str, str, tuple[str, ...], str]]:
    """Name, type, labels and help of everything in a registry, by name."""
    found = []
    for collector in registry._collector_to_names:  # noqa: SLF001 - there is no public listing
        if isinstance(collector, ProcessCollector):
            continue
        labels = getattr(collector, "_labelnames", None)
        for family in collector.collect():
            own: Iterable[str] = (
                labels if labels is not None else getattr(family, "_labelnames", ())
            )
            name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
            if family.name == "throttle_build":
                own = ("version",)
            found.append((name, family.type, tuple(own), family.documentation))
    return sorted(found)


def daemon_families() -> list[tuple[str, str, tuple[str, ...], str]]:
    """The families of a daemon, which need not run for it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpus"
        SimulatedGpuFile.create(path, [SimulatedGpu("GPU-0", "h200-sxm", (1000,))]).close()
        daemon = build_server(DaemonConfig(simulated_gpus=path))
        try:
            return families(daemon.registry)
        finally:
            daemon.close()


def page() -> str:
    """The page's text."""
    rows = [
        f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {text} |"
        for name, kind, labels, text in daemon_families()
    ]
    return _HEAD + "\n".join(rows) + "\n" + _TAIL


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(page(), "utf-8")
