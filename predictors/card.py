"""The model card: what a bundle is, for humans, made from its manifest alone."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from predictors.bundle import Manifest


def model_card(manifest: Manifest) -> str:
    """Markdown text; the same manifest gives the same text."""
    model, data, metrics = manifest.architecture, manifest.data, manifest.metrics
    spread = manifest.parallelism
    simulated = manifest.provenance == "simulated"
    origin = (
        "**Simulated.** The records come from a simulated GPU; no figure here says what a real GPU "
        "does."
        if simulated
        else "Measured on a real GPU."
    )
    power = metrics.get("power_mape_ratio")
    rows = [
        ("rows", f"{metrics['rows_count']}"),
        ("latency, mean absolute error", f"{metrics['latency_mape_ratio']:.2%}"),
        ("latency, bias", f"{metrics['latency_bias_ratio']:+.2%}"),
        ("power, mean absolute error", "unknown" if power is None else f"{power:.2%}"),
        ("latency below its bound", f"{metrics['coverage_ratio']:.2%}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    parts = ", ".join(
        f"{name} {count}" for name, count in sorted(data["parts_rows_counts"].items())
    )
    size = f"{model.total_parameters_count / 1e9:.1f} billion parameters"
    engine = " ".join(
        str(manifest.engine.get(key) or "") for key in ("engine_name", "engine_version")
    ).strip()
    paragraphs = {
        "what": f"Latency and power of one serving iteration of {model.name} ({size}, "
        f"{model.weight_dtype} weights, {model.kv_dtype} KV cache) on {manifest.gpu}, tensor "
        f"parallel {spread.tensor_parallel_count}, expert parallel {spread.expert_parallel_count}, "
        f"at each of {len(manifest.clocks_mhz)} SM clocks.",
        "data": f"{data['rows_count']} iterations and {data['idle_rows_count']} idle rows at "
        f"{data['clocks_count']} clocks from {data['lowest_clock_mhz']:.0f} to "
        f"{data['highest_clock_mhz']:.0f} MHz; predictions at other clocks are extrapolated. Rows "
        f"by part, split by {data['split_by']}: {parts}. Idle power: {manifest.idle_source}. "
        f"Engine: {engine or 'unknown'}.",
        "bound": f"The bound allows {manifest.calibration.violation_ratio:.1%} violations, if "
        "future iterations are like the calibration part.",
        "limits": "Iterations outside the envelope of `manifest.json` (more than "
        f"{manifest.envelope_margin_ratio:.0%} beyond the loads seen in training) are not covered. "
        "Another engine version, weight format or attention backend needs new records.",
    }
    what, used, bound, limits = (textwrap.fill(text, 100) for text in paragraphs.values())
    return f"""# {manifest.name}

{what}

{origin}

## Data
{used}

## Accuracy on the test part
| figure | value |
|---|---|
{table}

{bound}

## Limits
{limits}
"""
