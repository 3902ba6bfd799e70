"""Charts of a judged bundle as inline SVG, drawn by matplotlib; none needs anything outside."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

#: Decode, prefill: told apart by color-blind readers (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00")
_INK, _RULE, _FAINT, _LIMIT = "#1f2937", "#9ca3af", "#e8ebef", "#b3261e"
_STYLE: dict[Any, Any] = {
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
    "legend.frameon": False,
    "text.color": _INK,
}

#: Most points of a cloud: more only make the page heavier.
_POINTS_COUNT = 1200


def parity(
    recorded: NDArray[np.float64],
    predicted: NDArray[np.float64],
    phases: NDArray[np.intp],
    unit: str,
    *,
    logarithmic: bool,
) -> str:
    """Predicted over recorded values, with the line on which they agree."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.7, 4.2), layout="constrained")
        axis = figure.subplots()
        chosen = _thinned(len(recorded))
        for phase, name in enumerate(("decode", "with prompts")):
            rows = chosen[phases[chosen] == phase]
            if len(rows):
                axis.plot(
                    recorded[rows],
                    predicted[rows],
                    ".",
                    color=COLORS[phase],
                    markersize=3,
                    alpha=0.5,
                    label=name,
                )
        ends = [float(recorded.min()), float(recorded.max())]
        axis.plot(ends, ends, color=_INK, linewidth=0.9)
        if logarithmic:
            axis.set_xscale("log")
            axis.set_yscale("log")
        axis.set_xlabel(f"recorded ({unit})")
        axis.set_ylabel(f"predicted ({unit})")
        axis.legend(loc="upper left", markerscale=3)
        return svg(figure, f"parity-{unit}", f"Predicted over recorded {unit}")


def residuals(
    clocks_mhz: NDArray[np.float64],
    errors: Mapping[str, NDArray[np.float64]],
    phases: NDArray[np.intp],
) -> str:
    """Relative error over clock: median and the band of 90 %, by phase; one panel per target."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.3), layout="constrained")
        panels = figure.subplots(1, len(errors), squeeze=False)[0]
        for axis, (name, values) in zip(panels, errors.items(), strict=True):
            for phase in (0, 1):
                _draw_bands(axis, clocks_mhz, values, phases == phase, COLORS[phase])
            axis.axhline(0.0, color=_INK, linewidth=0.8)
            axis.set_xlabel("SM clock (MHz)")
            axis.set_ylabel(f"{name}: predicted / recorded - 1")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        return svg(figure, "residuals", "Relative error over clock")


def coverage(ratios: Mapping[str, float], wanted: float) -> str:
    """Share of rows below their bound, by band, against what was asked for."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 0.33 * len(ratios) + 0.9), layout="constrained")
        axis = figure.subplots()
        names = list(ratios)
        axis.plot([ratios[name] for name in names], range(len(names)), "o", color=COLORS[0])
        axis.axvline(wanted, color=_LIMIT, linewidth=1.1, linestyle=(0, (4, 3)))
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        low = min(*ratios.values(), wanted) - 0.005
        axis.set_xlim(low, 1.001)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1%}"))
        axis.set_xlabel(f"share of rows below the bound; asked for: {wanted:.1%}")
        return svg(figure, "coverage", "Coverage of the bound")


def contributions(values: Mapping[str, Mapping[str, float]]) -> str:
    """Mean absolute contribution of each feature, one panel per model."""
    with mpl.rc_context(_STYLE):
        longest = max(len(found) for found in values.values())
        figure = Figure(figsize=(9.6, 0.24 * longest + 0.9), layout="constrained")
        panels = figure.subplots(1, len(values), squeeze=False)[0]
        for axis, color, (name, found) in zip(panels, COLORS, values.items(), strict=False):
            ordered = sorted(found.items(), key=lambda item: item[1])
            axis.barh([key for key, _ in ordered], [value for _, value in ordered], color=color)
            axis.grid(visible=False, axis="y")
            axis.tick_params(axis="y", labelsize=8.5, length=0)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1%}"))
            axis.set_xlabel(f"{name}: mean share of the base corrected")
        return svg(figure, "contributions", "Feature contributions")


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str
) -> str:
    """Lines of shares over a logarithmic axis, such as a learning curve."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        axis = figure.subplots()
        for color, (name, (x, y)) in zip(
            (*COLORS, "#009e73", "#cc79a7"), lines.items(), strict=False
        ):
            axis.plot(x, y, "o-", color=color, markersize=4, linewidth=1.3, label=name)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1%}"))
        axis.set_ylim(bottom=0.0)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.legend()
        return svg(figure, "curves", f"{y_label} over {x_label}")


def svg(figure: Figure, salt: str, description: str) -> str:
    """The figure as an element to put inside HTML: no prologue, metadata or namespace."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):  # ids differ between charts, not between runs
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # not unique between charts, and unused
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    # marks are referred to by the old attribute, whose prefix went with its namespace
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def _draw_bands(
    axis: Axes,
    clocks_mhz: NDArray[np.float64],
    errors: NDArray[np.float64],
    rows: NDArray[np.bool_],
    color: str,
) -> None:
    """Median and 90 % band in up to 24 stretches of clocks."""
    if np.count_nonzero(rows) < 20:
        return
    edges = np.unique(np.quantile(clocks_mhz[rows], np.linspace(0.0, 1.0, 25)))
    stretch = np.clip(np.searchsorted(edges, clocks_mhz, side="right") - 1, 0, len(edges) - 2)
    groups = [errors[rows & (stretch == index)] for index in range(len(edges) - 1)]
    middles = 0.5 * (edges[1:] + edges[:-1])
    kept = [index for index, group in enumerate(groups) if len(group) >= 5]
    if not kept:
        return
    low, middle, high = np.array(
        [np.quantile(groups[index], (0.05, 0.5, 0.95)) for index in kept]
    ).T
    axis.fill_between(middles[kept], low, high, color=color, alpha=0.18, linewidth=0)
    axis.plot(middles[kept], middle, color=color, linewidth=1.4)


def _thinned(count: int) -> NDArray[np.intp]:
    return np.linspace(0, count - 1, min(count, _POINTS_COUNT)).astype(np.intp)
