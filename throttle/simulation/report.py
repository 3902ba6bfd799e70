"""One self-contained HTML page about simulated runs: no scripts, no outside requests."""

from __future__ import annotations

import html
import itertools
from typing import TYPE_CHECKING

from throttle.simulation.charts import COLORS, distributions, energy_bars, timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from throttle.simulation.experiment import RunResult

_CSS = """
:root { color-scheme: light; --ink: #1f2937; --soft: #5b6472; --rule: #e2e5ea; }
* { box-sizing: border-box; }
body { margin: 0; background: #f7f8fa; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 36px 28px 56px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 0 0 10px; max-width: 76ch; }
.soft { color: var(--soft); }
.mark { display: inline-block; margin-left: 8px; padding: 1px 9px; border-radius: 999px;
  background: #fdf0d5; color: #7a4b00; font-size: 12px; font-weight: 600; vertical-align: 3px;
  letter-spacing: 0.02em; }
h2 .mark { vertical-align: 1px; }
section { background: #fff; border: 1px solid var(--rule); border-radius: 10px;
  padding: 18px 20px; margin-top: 18px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
  margin-top: 20px; }
.figure { background: #fff; border: 1px solid var(--rule); border-radius: 10px;
  padding: 14px 18px; }
.figure b { display: block; font-size: 27px; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; margin-top: 8px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody tr:last-child td { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: 13px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 6px 0 10px; font-size: 13.5px; }
.key i { display: inline-block; width: 18px; height: 4px; border-radius: 2px; margin-right: 7px;
  vertical-align: 3px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
footer { margin-top: 22px; font-size: 13px; color: var(--soft); }
@media print { body { background: #fff; } section, .figure { break-inside: avoid; } }
"""

_UNKNOWN = "&ndash;"

#: Rows of the headline table: label, key of `RunResult.summary`, how to print it.
_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Energy (kJ)", "energy_joules", lambda v: f"{v / 1000:,.1f}"),
    ("Energy per output token (J)", "energy_per_output_token_joules", lambda v: f"{v:.3f}"),
    ("Requests within limits", "attainment_ratio", lambda v: f"{v:.2%}"),
    ("TTFT p50 (ms)", "ttft_p50_seconds", lambda v: f"{v * 1000:,.0f}"),
    ("TTFT p99 (ms)", "ttft_p99_seconds", lambda v: f"{v * 1000:,.0f}"),
    ("TPOT p50 (ms)", "tpot_p50_seconds", lambda v: f"{v * 1000:.1f}"),
    ("TPOT p99 (ms)", "tpot_p99_seconds", lambda v: f"{v * 1000:.1f}"),
    ("Gap between tokens p99 (ms)", "tbt_p99_seconds", lambda v: f"{v * 1000:.1f}"),
    ("End to end p99 (s)", "e2e_p99_seconds", lambda v: f"{v:.2f}"),
    ("Requests", "requests_count", lambda v: f"{v:,.0f}"),
    ("Output tokens", "output_tokens_count", lambda v: f"{v:,.0f}"),
    ("Clock changes", "clock_changes_count", lambda v: f"{v:,.0f}"),
    ("Horizon (s)", "horizon_seconds", lambda v: f"{v:,.1f}"),
)
_DECISIONS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Decision p50 (ms)", "decision_p50_seconds", lambda v: f"{v * 1000:.2f}"),
    ("Decision p99 (ms)", "decision_p99_seconds", lambda v: f"{v * 1000:.2f}"),
)


def write_report(
    path: Path,
    results: Mapping[str, RunResult],
    *,
    title: str,
    subtitle: str = "",
    ttft_seconds: float,
    tpot_seconds: float,
    slack_seconds: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    more_figures: Mapping[str, Mapping[str, float]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the page.

    Args:
        path: HTML file to write.
        results: Runs by name, the reference first, all on one horizon.
        title: Heading.
        subtitle: One line under it: plant, trace, limits.
        ttft_seconds: Limit for the time to first token.
        tpot_seconds: Limit for the mean time per output token.
        slack_seconds: By run, time and slack of the binding limit, in seconds.
        more_figures: By run, further figures, such as decision_p50_seconds and
            decision_p99_seconds.
        notes: Sentences for the foot of the page.
    """
    path.write_text(
        page(
            results,
            title=title,
            subtitle=subtitle,
            ttft_seconds=ttft_seconds,
            tpot_seconds=tpot_seconds,
            slack_seconds=slack_seconds,
            more_figures=more_figures,
            notes=notes,
        ),
        encoding="utf-8",
    )


def page(
    results: Mapping[str, RunResult],
    *,
    title: str,
    subtitle: str = "",
    ttft_seconds: float,
    tpot_seconds: float,
    slack_seconds: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    more_figures: Mapping[str, Mapping[str, float]] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page as text; arguments as in `write_report`."""
    summaries = {
        name: {
            **result.summary(ttft_seconds, tpot_seconds),
            **(more_figures or {}).get(name, {}),
        }
        for name, result in results.items()
    }
    mark = '<span class="mark">simulated</span>'
    key = _key(list(results))
    limits = (
        f"Limits: first token within {ttft_seconds:g} s, mean gap between tokens within "
        f"{tpot_seconds * 1000:g} ms."
    )
    over_time = timeline(results, slack_seconds or {})
    latency = distributions(results, ttft_seconds, tpot_seconds)
    sections = (
        _section(f"Side by side{mark}", limits, _table(summaries)),
        _section(
            f"Energy{mark}",
            "All runs over the same horizon, idle time included.",
            energy_bars(results),
        ),
        _section(
            f"Over time{mark}", "Means over half a second of simulated time.", key + over_time
        ),
        _section(
            f"Latency{mark}",
            "A curve further left is faster; the dashed line is the limit.",
            key + latency,
        ),
    )
    foot = " ".join(html.escape(note) for note in notes)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)} (simulated)</title><style>{_CSS}</style></head><body><main>"
        f'<h1>{html.escape(title)}{mark}</h1><p class="soft">{html.escape(subtitle)}</p>'
        f"{_headline(summaries)}{''.join(sections)}"
        "<footer>Every figure on this page is simulated: GPU and engine are models, not "
        f"measurements. {foot}</footer></main></body></html>\n"
    )


def _section(heading: str, text: str, body: str) -> str:
    return f'<section><h2>{heading}</h2><p class="soft">{text}</p>{body}</section>'


def _headline(summaries: Mapping[str, Mapping[str, float]]) -> str:
    """Cards that compare the last run with the first."""
    names = list(summaries)
    if len(names) < 2:
        return ""
    first, last = summaries[names[0]], summaries[names[-1]]
    energy = last["energy_joules"] / first["energy_joules"] - 1.0
    points = 100.0 * (last["attainment_ratio"] - first["attainment_ratio"])
    gap = 1000.0 * (last["tpot_p50_seconds"] - first["tpot_p50_seconds"])
    before = first["energy_per_output_token_joules"]
    reference = html.escape(names[0])
    cards = (
        (_signed(100.0 * energy, 1) + "%", f"energy against {reference}"),
        (
            f"{last['attainment_ratio']:.2%}",
            f"requests within limits ({_signed(points, 2)} points)",
        ),
        (
            f"{last['energy_per_output_token_joules']:.3f} J",
            f"per output token ({reference}: {before:.3f} J)",
        ),
        (_signed(gap, 1) + " ms", "median time per output token"),
    )
    inner = "".join(f'<div class="figure"><b>{a}</b><span>{b}</span></div>' for a, b in cards)
    return f'<div class="figures">{inner}</div>'


def _signed(value: float, digits: int) -> str:
    """A difference with its sign; a true minus, and none on zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0.0:
        return f"±{text}"
    return ("+" if value > 0 else "\N{MINUS SIGN}") + text


def _table(summaries: Mapping[str, Mapping[str, float]]) -> str:
    names = list(summaries)
    first = summaries[names[0]]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    ratio_head = "<th>ratio</th>" if len(names) == 2 else ""
    rows = []
    for label, key, text in (*_ROWS, *_DECISIONS):
        if not any(key in summary for summary in summaries.values()):
            continue
        cells = "".join(
            f"<td>{text(summary[key]) if key in summary else _UNKNOWN}</td>"
            for summary in summaries.values()
        )
        ratio = ""
        if ratio_head:
            last = summaries[names[1]]
            whole = key in first and key in last and first[key]
            ratio = f"<td>{last[key] / first[key]:.3f}</td>" if whole else f"<td>{_UNKNOWN}</td>"
        rows.append(f"<tr><td>{label}</td>{cells}{ratio}</tr>")
    return (
        f"<table><thead><tr><th></th>{head}{ratio_head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _key(names: Sequence[str]) -> str:
    items = "".join(
        f'<span><i style="background:{color}"></i>{html.escape(name)}</span>'
        for color, name in zip(itertools.cycle(COLORS), names)
    )
    return f'<div class="key">{items}</div>'
