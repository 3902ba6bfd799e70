"""One self-contained HTML page about a judged bundle: no scripts, no outside requests."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import numpy as np
import xgboost

from predictors.charts import contributions, coverage, parity, residuals
from predictors.evaluation import predict_rows
from predictors.features import rows_at

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from predictors.bundle import Bundle
    from predictors.predictor import BundlePredictor
    from predictors.training_rows import TrainingFrame

#: Rows whose contributions are computed.
_CONTRIBUTION_ROWS_COUNT = 1000

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
  background: #fdf0d5; color: #7a4b00; font-size: 12px; font-weight: 600; vertical-align: 3px; }
section { background: #fff; border: 1px solid var(--rule); border-radius: 10px;
  padding: 18px 20px; margin-top: 18px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px;
  margin-top: 20px; }
.figure { background: #fff; border: 1px solid var(--rule); border-radius: 10px;
  padding: 14px 18px; }
.figure b { display: block; font-size: 25px; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: 13px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 14px; }
table { border-collapse: collapse; width: 100%; margin-top: 8px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
svg { width: 100%; height: auto; display: block; }
footer { color: var(--soft); font-size: 13px; margin-top: 22px; }
"""

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("rows", "rows_count", "{:d}"),
    ("latency error", "latency_mape_ratio", "{:.2%}"),
    ("its p95", "latency_p95_error_ratio", "{:.2%}"),
    ("bias", "latency_bias_ratio", "{:+.2%}"),
    ("R\N{SUPERSCRIPT TWO}", "latency_r2_ratio", "{:.4f}"),
    ("below bound", "coverage_ratio", "{:.2%}"),
    ("bound above mean", "bound_width_ratio", "{:.1%}"),
    ("power error", "power_mape_ratio", "{:.2%}"),
)


def write_report(
    path: Path,
    bundle: Bundle,
    predictor: BundlePredictor,
    frame: TrainingFrame,
    document: Mapping[str, Any],
) -> None:
    """Write the page.

    Args:
        path: HTML file to write.
        bundle: The judged bundle as it lies on disk.
        predictor: It, as it serves.
        frame: The rows it was judged on.
        document: Of `predictors.evaluation.evaluate`, with bundle and provenance in `details`.
    """
    path.write_text(page(bundle, predictor, frame, document), encoding="utf-8")


def page(
    bundle: Bundle,
    predictor: BundlePredictor,
    frame: TrainingFrame,
    document: Mapping[str, Any],
) -> str:
    """The page as text; arguments as in `write_report`."""
    latency, _, power = predict_rows(predictor, frame.shapes, frame.clocks_mhz)
    phases = (frame.shapes[:, 1] > 0).astype(np.intp)
    known = np.isfinite(frame.watts)
    errors = {"latency": latency / frame.seconds - 1.0}
    clouds = parity(frame.seconds * 1e3, latency * 1e3, phases, "ms", logarithmic=True)
    if known.any():
        errors["power"] = np.where(known, power, 1.0) / np.where(known, frame.watts, 1.0) - 1.0
        clouds += parity(frame.watts[known], power[known], phases[known], "W", logarithmic=False)
    wanted = 1.0 - predictor.manifest.calibration.violation_ratio
    covered = {"all rows": document["coverage_ratio"]} | {
        f"{kind.removesuffix('_band')}: {name}": part["coverage_ratio"]
        for kind, parts in document["breakdown"].items()
        for name, part in parts.items()
    }
    name = html.escape(predictor.manifest.name)
    provenance = html.escape(str(document["details"].get("provenance", "")))
    sections = (
        _section(
            "By load and clock",
            "Mean absolute errors relative to what was recorded.",
            _table(document),
        ),
        _section(
            "Parity",
            "Each dot is an iteration; on the line, prediction and record agree.",
            f'<div class="pair">{clouds}</div>',
        ),
        _section(
            "Error over clock",
            "Median and 90 % band. Blue: decode; orange: with prompts.",
            residuals(frame.clocks_mhz, errors, phases),
        ),
        _section(
            "Coverage", "How often the upper bound of latency held.", coverage(covered, wanted)
        ),
        _section(
            "Feature contributions",
            "Mean absolute SHAP value: how far a feature moves the "
            "trees' correction of the base. The base itself is not in it.",
            contributions(shap_contributions(bundle, predictor, frame)),
        ),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} ({provenance})</title><style>{_CSS}</style></head><body><main>"
        f'<h1>{name}<span class="mark">{provenance}</span></h1>'
        f'<p class="soft">{_subtitle(predictor, document)}</p>'
        f"{_headline(document)}{''.join(sections)}"
        f"<footer>The records are {provenance}. Active experts: "
        f"{html.escape(predictor.active_experts_source)}.</footer></main></body></html>\n"
    )


def shap_contributions(
    bundle: Bundle, predictor: BundlePredictor, frame: TrainingFrame
) -> dict[str, dict[str, float]]:
    """Mean absolute SHAP value of each feature, by model, over some rows (XGBoost computes them).

    Args:
        bundle: The trees.
        predictor: The same bundle, bound if it is generic.
        frame: Rows.
    """
    count = len(frame.seconds)
    rows = np.linspace(0, count - 1, min(count, _CONTRIBUTION_ROWS_COUNT)).astype(np.intp)
    ratios = frame.clocks_mhz[rows] / predictor.manifest.maximum_clock_mhz
    features, _ = rows_at(predictor.space, frame.shapes[rows], ratios)
    names = list(bundle.features)
    found = {}
    for what, model in (("latency", bundle.latency_model), ("power", bundle.power_model)):
        booster = xgboost.Booster({"nthread": 1})
        booster.load_model(bytearray(model))
        matrix = xgboost.DMatrix(features, feature_names=names)
        values: NDArray[np.float32] = booster.predict(matrix, pred_contribs=True)
        means = np.abs(values[:, :-1]).mean(axis=0)
        found[what] = dict(zip(names, map(float, means), strict=True))
    return found


def _subtitle(predictor: BundlePredictor, document: Mapping[str, Any]) -> str:
    clocks = predictor.clocks_mhz
    return (
        f"Judged on {document['rows_count']} iterations; "
        f"{len(clocks)} clocks from {clocks[0]} to {clocks[-1]} MHz."
    )


def _headline(document: Mapping[str, Any]) -> str:
    power, r2 = document["power_mape_ratio"], document["latency_r2_ratio"]
    cards = (
        (f"{document['latency_mape_ratio']:.2%}", "latency, mean absolute error"),
        ("unknown" if power is None else f"{power:.2%}", "power, mean absolute error"),
        ("unknown" if r2 is None else f"{r2:.4f}", "R\N{SUPERSCRIPT TWO} of latency"),
        (f"{document['coverage_ratio']:.2%}", "of iterations below their bound"),
    )
    inner = "".join(f'<div class="figure"><b>{a}</b><span>{b}</span></div>' for a, b in cards)
    return f'<div class="figures">{inner}</div>'


def _section(heading: str, text: str, body: str) -> str:
    return f'<section><h2>{heading}</h2><p class="soft">{text}</p>{body}</section>'


def _table(document: Mapping[str, Any]) -> str:
    lines = {"all rows": {**document["details"], **document}} | {
        f"{kind.removesuffix('_band')}: {name}": part
        for kind, parts in document["breakdown"].items()
        for name, part in parts.items()
    }
    head = "".join(f"<th>{name}</th>" for name, _, _ in _COLUMNS)
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(
            f"<td>{'-' if line.get(key) is None else form.format(line[key])}</td>"
            for _, key, form in _COLUMNS
        )
        + "</tr>"
        for name, line in lines.items()
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
