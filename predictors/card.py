"""The model card: what a bundle is, for humans, made from its manifest alone."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from predictors.bundle import Manifest

_ROUTING = {
    "uniform": "a uniform router (assumed)",
    "reported": "a skew fitted to counts that the engine reported",
    "residuals": "an effective skew fitted to latency, which is no measurement of the router",
}


def model_card(manifest: Manifest) -> str:
    """Markdown text; the same manifest gives the same text."""
    data, metrics = manifest.data, manifest.metrics
    simulated = manifest.provenance == "simulated"
    origin = (
        "**Simulated.** The records come from a simulated GPU; no figure here says what a real GPU "
        "does."
        if simulated
        else "Measured on a real GPU."
    )
    details = metrics["details"]
    rows = [
        ("rows", f"{metrics['rows_count']}"),
        ("latency, mean absolute error", _percent(metrics["latency_mape_ratio"])),
        ("latency, bias", f"{details['latency_bias_ratio']:+.2%}"),
        ("power, mean absolute error", _percent(metrics["power_mape_ratio"])),
        ("latency below its bound", _percent(metrics["coverage_ratio"])),
    ]
    rows += [
        (
            f"{phase}: latency, power",
            f"{_percent(part['latency_mape_ratio'])}, {_percent(part['power_mape_ratio'])}",
        )
        for phase, part in metrics["breakdown"]["phase"].items()
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    parts = ", ".join(
        f"{name} {count}" for name, count in sorted(data["parts_rows_counts"].items())
    )
    engine = " ".join(
        str(manifest.engine.get(key) or "") for key in ("engine_name", "engine_version")
    ).strip()
    used = (
        f"{data['rows_count']} iterations and {data['idle_rows_count']} idle rows at "
        f"{data['clocks_count']} clocks from {data['lowest_clock_mhz']:.0f} to "
        f"{data['highest_clock_mhz']:.0f} MHz; predictions at other clocks are extrapolated. Rows "
        f"by part, split by {data['split_by']}: {parts}. Idle power: {manifest.idle_source}. "
        f"Engine: {engine or 'unknown'}."
    )
    bound = (
        f"The bound allows {manifest.calibration.violation_ratio:.1%} violations, if future "
        "iterations are like those it was calibrated on."
    )
    limits = (
        "Iterations outside the envelope of `manifest.json` (more than "
        f"{manifest.envelope_margin_ratio:.0%} beyond the loads seen in training) are not covered. "
        + _LIMITS[manifest.kind]
    )
    what, used, bound, limits = (
        textwrap.fill(text, 100) for text in (_what(manifest), used, bound, limits)
    )
    return f"""# {manifest.name}

{what}

{origin}

## Data
{used}

## Accuracy on rows that training did not see
| figure | value |
|---|---|
{table}

{bound}

## Limits
{limits}
"""


_LIMITS = {
    "model": "Another engine version, weight format or attention backend needs new records.",
    "generic": "The figures above are for models left out of training. A bundle of the model's own "
    "is better; so are ten minutes of serving, through the online correction.",
    "table": "Nothing is known of the model or the GPU but these rows: other batches, contexts and "
    "clocks than theirs are extrapolated.",
}


def _what(manifest: Manifest) -> str:
    if manifest.kind == "table":
        return (
            f"Latency and power of one serving iteration on {manifest.gpu}, from a table of "
            f"measured points, at each of {len(manifest.clocks_mhz)} SM clocks."
        )
    if manifest.architecture is None or manifest.parallelism is None:
        models = ", ".join(manifest.data["models"])
        return (
            "Latency and power of one serving iteration of any mixture-of-experts model on any "
            f"known GPU, from its dimensions and nominal figures. Trained on {models}."
        )
    model, spread = manifest.architecture, manifest.parallelism
    return (
        f"Latency and power of one serving iteration of {model.name} "
        f"({model.total_parameters_count / 1e9:.1f} billion parameters, {model.weight_dtype} "
        f"weights, {model.kv_dtype} KV cache) on {manifest.gpu}, tensor parallel "
        f"{spread.tensor_parallel_count}, expert parallel {spread.expert_parallel_count}, at each "
        f"of {len(manifest.clocks_mhz)} SM clocks. Active experts: by "
        f"{_ROUTING[manifest.routing.source]}"
        + (
            f", exponent {manifest.routing.skew_exponent:g}."
            if manifest.routing.skew_exponent
            else "."
        )
    )


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2%}"
