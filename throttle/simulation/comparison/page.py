"""One self-contained HTML page about a comparison: a table and a picture; no scripts."""

from __future__ import annotations

import html
import io
import itertools
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping

_CSS: Final = """
body { margin: 0 auto; max-width: 1100px; padding: 32px 24px; color: #1f2937; background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Arial, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } .soft { color: #5b6472; }
.mark { padding: 1px 9px; border-radius: 999px; background: #fdf0d5; color: #7a4b00;
  font-size: 12px; font-weight: 600; }
table { border-collapse: collapse; width: 100%; margin: 18px 0; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid #e2e5ea; }
th:first-child, td:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
tr.apart td { color: #9ca3af; } svg { width: 100%; height: auto; }
"""
_COLUMNS: Final = (
    "load",
    "policy",
    "energy / max",
    "at equal attainment",
    "/ best static",
    "/ hindsight",
    "within limits %",
    "loss, points",
    "changes per s",
)
_MARKERS: Final = "osD^vP*Xph<>d"
_COLORS: Final = (
    "#6b7280",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#1f2937",
)


def write_page(document: Mapping[str, Any]) -> str:
    """The page of a document that `compare` made."""
    title = f"Clock policies on {document['plant']}, {document['trace']}"
    limits = ", ".join(
        f"{name.removesuffix('_seconds').upper()} {value * 1000:g} ms"
        for name, value in document["limits"].items()
        if value is not None
    )
    rows = "".join(
        _row(load, name, figures)
        for load, policies in document["summary"].items()
        for name, figures in policies.items()
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head><body>"
        f'<h1>{html.escape(title)} <span class="mark">simulated</span></h1>'
        f'<p class="soft">Limits: {html.escape(limits)}. Loads are shares of the maximum-clock '
        f"goodput, which is {document['goodput_compression_ratio']:.3g} times the recorded rate. "
        "Energy over one horizon; &plusmn; is the 95 % interval over seeds. Grey rows attain over "
        "half a point less than maximum clock and are not comparable.</p>"
        f"{_scatter(document)}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        "</body></html>\n"
    )


def _row(load: str, name: str, figures: Mapping[str, Any]) -> str:
    cells = (
        load,
        html.escape(name),
        _figure(figures["energy_ratio"], 1.0, 3),
        _figure(figures["equal_attainment_energy_ratio"], 1.0, 3),
        _figure(figures["energy_over_best_static"], 1.0, 3),
        _figure(figures["energy_over_hindsight"], 1.0, 3),
        _figure(figures["attainment_ratio"], 100.0, 2),
        _figure(figures["attainment_loss"], 100.0, 2),
        _figure(figures["clock_changes_per_second"], 1.0, 2),
    )
    kind = "" if figures["comparable"] else ' class="apart"'
    return f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _figure(value: Mapping[str, Any] | None, scale: float, digits: int) -> str:
    if value is None:
        return "&ndash;"
    text = f"{value['mean'] * scale:.{digits}f}"
    if value["half_width"] is not None:
        text += f" &plusmn; {value['half_width'] * scale:.{digits}f}"
    return text


def _scatter(document: Mapping[str, Any]) -> str:
    """Energy over maximum clock against attainment, one panel per load."""
    summary = document["summary"]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "throttle", "font.size": 9.5}):
        figure = Figure(figsize=(10.5, 3.9), layout="constrained")
        axes = figure.subplots(1, len(summary), sharey=False, squeeze=False)[0]
        for axis, (load, policies) in zip(axes, summary.items(), strict=True):
            styles = zip(itertools.cycle(_COLORS), itertools.cycle(_MARKERS))
            for (name, figures), (color, marker) in zip(policies.items(), styles, strict=False):
                axis.plot(
                    figures["energy_ratio"]["mean"],
                    figures["attainment_ratio"]["mean"] * 100.0,
                    marker,
                    color=color,
                    label=name,
                    markersize=7,
                )
            axis.set_title(f"load {load}", fontsize=10)
            axis.set_xlabel("energy over maximum clock")
            axis.grid(visible=True, color="#e8ebef")
        axes[0].set_ylabel("requests within limits (%)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
