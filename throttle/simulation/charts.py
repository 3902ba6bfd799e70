"""Charts of runs as inline SVG, drawn by matplotlib; none refers to anything outside itself."""

from __future__ import annotations

import io
import itertools
import re
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from throttle.simulation.experiment import RunResult

#: Okabe and Ito's palette, told apart by color-blind readers; the first run is the grey reference.
COLORS = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
LIMIT_COLOR = "#b3261e"
_INK, _RULE, _FAINT = "#1f2937", "#9ca3af", "#e8ebef"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: sharp, searchable, in the page's font
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.9,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "text.color": _INK,
    "path.simplify": True,
    "path.simplify_threshold": 0.4,
}
_PANELS = (
    ("clock_mhz", "SM clock\n(MHz)"),
    ("power_watts", "power\n(W)"),
    ("running_count", "batch\n(requests)"),
    ("waiting_count", "queue\n(requests)"),
)


def timeline(
    results: Mapping[str, RunResult],
    slack_seconds: Mapping[str, Sequence[tuple[float, float]]],
) -> str:
    """Clock, power, batch, queue, and where known slack, over time; one line per run.

    Args:
        results: Runs by name.
        slack_seconds: By name of the run, time and slack of the limit that binds, in seconds.
    """
    with mpl.rc_context(STYLE):
        panels = [panel for panel in _PANELS if _any_value(results, panel[0])]
        rows = len(panels) + bool(slack_seconds)
        figure = Figure(figsize=(9.6, 1.42 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for axis, (field, label) in zip(axes, panels, strict=False):
            for color, result in zip(itertools.cycle(COLORS), results.values()):
                axis.plot(
                    np.array(result.series.time_seconds) / 60.0,
                    getattr(result.series, field),
                    color=color,
                    linewidth=1.1,
                )
            axis.set_ylabel(label)
            axis.set_ylim(0, axis.get_ylim()[1] * 1.04)
        if slack_seconds:
            _draw_slack(axes[-1], list(results), slack_seconds)
        for axis in axes:
            axis.margins(x=0.01)
        axes[-1].set_xlabel("simulated time (minutes)")
        figure.align_ylabels(axes)
        return _svg(figure, "timeline", "Clock, power, batch, queue and slack over simulated time")


def distributions(
    results: Mapping[str, RunResult], ttft_seconds: float, tpot_seconds: float
) -> str:
    """Cumulative distributions of TTFT and mean TPOT, with their limits."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for color, result in zip(itertools.cycle(COLORS), results.values()):
            first = [item.ttft_seconds for item in result.outcomes]
            gaps = [o.tpot_seconds for o in result.outcomes if o.tpot_seconds is not None]
            _draw_distribution(left, first, color)
            _draw_distribution(right, [gap * 1000.0 for gap in gaps], color)
        _draw_limit(left, ttft_seconds, f"limit {ttft_seconds:g} s")
        _draw_limit(right, tpot_seconds * 1000.0, f"limit {tpot_seconds * 1000:g} ms")
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        right.set_xlim(left=0)
        left.set_xlabel("time to first token (s, log scale)")
        right.set_xlabel("mean time per output token (ms)")
        left.set_ylabel("share of requests")
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        return _svg(figure, "latency", "Distributions of time to first token and per output token")


def energy_bars(results: Mapping[str, RunResult]) -> str:
    """Energy of each run, serving and idle, with its ratio to the first run's."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 0.55 * len(results) + 0.75), layout="constrained")
        axis = figure.subplots()
        names = list(results)
        reference = next(iter(results.values())).energy_joules or 1.0
        for row, (color, name) in enumerate(zip(itertools.cycle(COLORS), names)):
            result = results[name]
            busy = (result.energy_joules - result.idle_energy_joules) / 1000.0
            idle = result.idle_energy_joules / 1000.0
            axis.barh(row, busy, color=color, height=0.62)
            axis.barh(row, idle, left=busy, color=color, alpha=0.45, height=0.62)
            ratio = result.energy_joules / reference
            text = f"{result.energy_joules / 1000.0:,.1f} kJ"
            axis.annotate(
                text + (f", {ratio:.1%} of {names[0]}" if row else ""),
                (busy + idle, row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
            )
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.16)
        axis.set_xlim(left=0)
        axis.set_xlabel("energy over the common horizon (kJ); the paler end is spent idle")
        return _svg(figure, "energy", "Energy of each run")


def _any_value(results: Mapping[str, RunResult], field: str) -> bool:
    return any(any(getattr(result.series, field)) for result in results.values())


def _draw_slack(
    axis: Axes, names: Sequence[str], slack: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    for name, points in slack.items():
        if not points:
            continue
        color = COLORS[list(names).index(name) % len(COLORS)] if name in names else COLORS[1]
        times, values = zip(*_thinned(points), strict=True)
        axis.plot(np.array(times) / 60.0, values, color=color, linewidth=1.1)
    axis.axhline(0.0, color=LIMIT_COLOR, linewidth=1.0)
    axis.set_ylabel("binding\nslack (s)")


def _thinned(points: Sequence[tuple[float, float]], limit: int = 1500) -> list[tuple[float, float]]:
    """At most `limit` points: of each stretch the one with the least slack."""
    size = -(-len(points) // limit)
    return [
        min(points[start : start + size], key=lambda point: point[1])
        for start in range(0, len(points), size)
    ]


def _draw_distribution(axis: Axes, values: Sequence[float], color: str) -> None:
    if not values:
        return
    shares = np.linspace(0.0, 1.0, 401)
    axis.plot(np.quantile(values, shares), shares, color=color, linewidth=1.6)


def _draw_limit(axis: Axes, value: float, text: str) -> None:
    axis.axvline(value, color=LIMIT_COLOR, linewidth=1.1, linestyle=(0, (4, 3)))
    axis.annotate(
        text,
        (value, 0.04),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        color=LIMIT_COLOR,
        fontsize=9.5,
    )


def _svg(figure: Figure, salt: str, description: str) -> str:
    """The figure as an element to put inside HTML: no prologue, metadata or namespace."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):  # ids differ between charts, not between runs
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # not unique between charts, and unused
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{description} (simulated)"', 1)
