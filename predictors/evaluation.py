"""How well a predictor does on records: one document for humans, tests and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.calibration import CLOCK_BAND_EDGES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from predictors.prediction import Predictor
    from predictors.training_rows import TrainingFrame

#: Decoding requests at which batch bands begin.
BATCH_BAND_EDGES: tuple[int, ...] = (1, 9, 33, 129)
_BATCH_BANDS = ("0", "1-8", "9-32", "33-128", "129 and more")

#: Rows predicted at once: all clocks of this many rows fit in a few MB.
_CHUNK_ROWS_COUNT = 2048


def predict_rows(
    predictor: Predictor, shapes: NDArray[np.float64], clocks_mhz: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Predict each shape at its own clock, linear between the candidate clocks around it.

    Args:
        predictor: The predictor as it serves.
        shapes: (N, 6).
        clocks_mhz: (N,); outside the candidate clocks the nearest one counts.

    Returns:
        Latency, its bound (seconds) and power (watts), each (N,).
    """
    candidates = predictor.clocks_mhz
    position = np.interp(clocks_mhz, candidates, np.arange(len(candidates)))
    low = np.floor(position).astype(np.intp)
    high = np.minimum(low + 1, len(candidates) - 1)
    weight = position - low
    out = np.empty((3, len(shapes)))
    for start in range(0, len(shapes), _CHUNK_ROWS_COUNT):
        part = slice(start, start + _CHUNK_ROWS_COUNT)
        prediction = predictor.predict(shapes[part])
        rows = np.arange(len(prediction.latency_seconds))
        for index, values in enumerate(
            (
                prediction.latency_seconds,
                prediction.latency_upper_seconds,
                prediction.power_watts,
            )
        ):
            out[index, part] = (1.0 - weight[part]) * values[rows, low[part]] + weight[
                part
            ] * values[rows, high[part]]
    return out[0], out[1], out[2]


def evaluate(
    predictor: Predictor, frame: TrainingFrame, maximum_clock_mhz: float
) -> dict[str, Any]:
    """Compare predictions with what was recorded.

    Args:
        predictor: The predictor as it serves.
        frame: Rows to judge it on.
        maximum_clock_mhz: Clock that ratios refer to.

    Returns:
        A JSON document: figures over all rows (see `_figures`), and under `breakdown` the same by
        phase, clock band and batch band.
    """
    latency, upper, power = predict_rows(predictor, frame.shapes, frame.clocks_mhz)
    covered = frame.seconds <= upper
    inside = predictor.covers(frame.shapes)
    ratios = frame.clocks_mhz / maximum_clock_mhz
    edges = (0.0, *CLOCK_BAND_EDGES)
    clock_names = [f"{low:g} and more of maximum" for low in edges]
    bands = {
        "phase": (frame.shapes[:, 1] > 0).astype(np.intp),
        "clock_band": np.searchsorted(CLOCK_BAND_EDGES, ratios, side="right"),
        "batch_band": np.searchsorted(BATCH_BAND_EDGES, frame.shapes[:, 3], side="right"),
    }
    names = {"phase": ("decode", "prefill"), "clock_band": clock_names, "batch_band": _BATCH_BANDS}

    def figures(rows: NDArray[np.bool_]) -> dict[str, Any]:
        return _figures(
            frame.seconds[rows], latency[rows], covered[rows], frame.watts[rows], power[rows]
        )

    document = figures(np.ones(len(latency), dtype=bool))
    document["inside_envelope_ratio"] = float(np.mean(inside))
    document["breakdown"] = {
        kind: {
            name: figures(found)
            for index, name in enumerate(names[kind])
            if (found := numbers == index).any()
        }
        for kind, numbers in bands.items()
    }
    return document


def _figures(
    seconds: NDArray[np.float64],
    latency: NDArray[np.float64],
    covered: NDArray[np.bool_],
    watts: NDArray[np.float64],
    power: NDArray[np.float64],
) -> dict[str, Any]:
    """Accuracy over some rows; null where there is nothing to compare with."""
    known = np.isfinite(watts)
    spread = float(np.sum((seconds - seconds.mean()) ** 2))
    errors = latency / seconds - 1.0
    power_mape = float(np.mean(np.abs(power[known] / watts[known] - 1.0))) if known.any() else None
    return {
        "latency_mape_ratio": float(np.mean(np.abs(errors))),
        "power_mape_ratio": power_mape,
        "latency_r2_ratio": 1.0 - float(np.sum((seconds - latency) ** 2)) / spread
        if spread > 0.0
        else None,
        "coverage_ratio": float(np.mean(covered)),
        "rows_count": len(seconds),
        "latency_p95_error_ratio": float(np.quantile(np.abs(errors), 0.95)),
        "latency_bias_ratio": float(np.mean(errors)),
        "power_rows_count": int(np.count_nonzero(known)),
    }
