"""How well a predictor does on records: one document for humans, tests and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.calibration import CLOCK_BAND_EDGES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from predictors.prediction import Predictor
    from predictors.predictor import BundlePredictor
    from predictors.training_rows import TrainingFrame

#: Decoding requests at which batch bands begin.
BATCH_BAND_EDGES: tuple[int, ...] = (1, 9, 33, 129)
_BATCH_BANDS = ("0", "1-8", "9-32", "33-128", "129 and more")

#: Figures that a document starts with, in order.
HEADLINE: tuple[str, ...] = (
    "latency_mape_ratio",
    "power_mape_ratio",
    "latency_r2_ratio",
    "coverage_ratio",
    "rows_count",
)

#: Rows predicted at once: all clocks of this many rows fit in a few MB.
_CHUNK_ROWS_COUNT = 2048


def predict_rows(
    predictor: Predictor, shapes: NDArray[np.float64], clocks_mhz: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Predict each shape at its own clock, linear between the candidate clocks around it.

    Args:
        predictor: The predictor as it serves.
        shapes: (N, 7).
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


def evaluate(predictor: BundlePredictor, frame: TrainingFrame) -> dict[str, Any]:
    """Compare predictions with what was recorded.

    Args:
        predictor: The predictor as it serves.
        frame: Rows to judge it on.

    Returns:
        A JSON document: `HEADLINE` over all rows, then `breakdown` (every figure by phase, clock
        band and batch band) and `details` (the other figures over all rows).
    """
    latency, upper, power = predict_rows(predictor, frame.shapes, frame.clocks_mhz)
    inside = predictor.covers(frame.shapes)
    return judged(frame, predictor.manifest.maximum_clock_mhz, latency, upper, power, inside)


def judged(  # noqa: PLR0917 (each is one thing that callers name)
    frame: TrainingFrame,
    maximum_clock_mhz: float,
    latency: NDArray[np.float64],
    upper: NDArray[np.float64],
    power: NDArray[np.float64],
    inside: NDArray[np.bool_],
) -> dict[str, Any]:
    """The document of `evaluate`, from predictions made already.

    Args:
        frame: N rows to judge.
        maximum_clock_mhz: Clock that ratios refer to.
        latency: (N,) seconds.
        upper: (N,) seconds.
        power: (N,) watts.
        inside: (N,) whether the load lies in the range seen in training.
    """
    numbers, names = bands(frame, maximum_clock_mhz)

    def of(rows: NDArray[np.bool_]) -> dict[str, Any]:
        return figures(
            frame.seconds[rows], latency[rows], upper[rows], frame.watts[rows], power[rows]
        )

    whole = of(np.ones(len(frame.seconds), dtype=bool))
    document = {name: whole.pop(name) for name in HEADLINE}
    document["breakdown"] = {
        kind: {
            name: of(found)
            for index, name in enumerate(names[kind])
            if (found := numbers[kind] == index).any()
        }
        for kind in numbers
    }
    document["details"] = {**whole, "inside_envelope_ratio": float(np.mean(inside))}
    return document


def bands(
    frame: TrainingFrame, maximum_clock_mhz: float
) -> tuple[dict[str, NDArray[np.intp]], dict[str, Sequence[str]]]:
    """Which band each row is in, and the bands' names, by kind of band."""
    ratios = frame.clocks_mhz / maximum_clock_mhz
    edges = (0.0, *CLOCK_BAND_EDGES)
    numbers = {
        "phase": (frame.shapes[:, 1] > 0).astype(np.intp),
        "clock_band": np.searchsorted(CLOCK_BAND_EDGES, ratios, side="right"),
        "batch_band": np.searchsorted(BATCH_BAND_EDGES, frame.shapes[:, 3], side="right"),
    }
    names: dict[str, Sequence[str]] = {
        "phase": ("decode", "prefill"),
        "clock_band": tuple(f"{low:g} and more of maximum" for low in edges),
        "batch_band": _BATCH_BANDS,
    }
    return numbers, names


def figures(
    seconds: NDArray[np.float64],
    latency: NDArray[np.float64],
    upper: NDArray[np.float64],
    watts: NDArray[np.float64],
    power: NDArray[np.float64],
) -> dict[str, Any]:
    """Accuracy over some rows; null where there is nothing to compare with.

    Args:
        seconds: (N,) measured durations.
        latency: (N,) predicted ones.
        upper: (N,) their bounds.
        watts: (N,) measured power, NaN where unknown.
        power: (N,) predicted power.
    """
    known = np.isfinite(watts)
    errors = latency / seconds - 1.0
    with_power = known.any()
    power_errors = power[known] / watts[known] - 1.0
    return {
        "latency_mape_ratio": float(np.mean(np.abs(errors))),
        "power_mape_ratio": float(np.mean(np.abs(power_errors))) if with_power else None,
        "latency_r2_ratio": _r2(seconds, latency),
        "coverage_ratio": float(np.mean(seconds <= upper)),
        "rows_count": len(seconds),
        "latency_mae_seconds": float(np.mean(np.abs(latency - seconds))),
        "latency_p95_error_ratio": float(np.quantile(np.abs(errors), 0.95)),
        "latency_bias_ratio": float(np.mean(errors)),
        "throughput_r2_ratio": _r2(1.0 / seconds, 1.0 / latency),
        "bound_width_ratio": float(np.mean(upper / latency - 1.0)),
        "power_mae_watts": float(np.mean(np.abs(power[known] - watts[known])))
        if with_power
        else None,
        "power_p95_error_ratio": float(np.quantile(np.abs(power_errors), 0.95))
        if with_power
        else None,
        "power_r2_ratio": _r2(watts[known], power[known]) if with_power else None,
        "power_rows_count": int(np.count_nonzero(known)),
    }


def _r2(measured: NDArray[np.float64], predicted: NDArray[np.float64]) -> float | None:
    """Share of the variance that is explained; None without any."""
    spread = float(np.sum((measured - measured.mean()) ** 2))
    if spread <= 0.0:
        return None
    return 1.0 - float(np.sum((measured - predicted) ** 2)) / spread
