"""Tables of another tool: measured points of a GPU and a model that nobody described.

What a table does not say (model, GPU figures, parallelism) is left out of the features, not
guessed. A base of plain counts, each with its own dependence on the clock, carries the prediction;
a few hundred rows are too few for trees to do so.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.analytic import LatencyBase, checked_coefficients, fit_nonnegative
from predictors.errors import RecordsError
from predictors.features import checked_columns
from predictors.prediction import estimated_attention_pairs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

#: Columns of a simple table: name -> meaning.
TABLE_COLUMNS: dict[str, str] = {
    "gpu": "name of the GPU, any text",
    "phase": "decode or prefill",
    "clock_mhz": "SM clock",
    "batch": "requests in the iteration",
    "context_tokens": "decode: tokens in KV per request; prefill: prompt tokens per request",
    "latency_seconds": "duration of the iteration",
    "power_watts": "power of one GPU; may be empty",
}

#: Feature name -> unit. The first is the clock, as in `predictors.features.FEATURES`.
TABLE_FEATURES: dict[str, str] = {
    "clock_ratio": "clock / highest clock of the table",
    "prefill_requests_count": "requests",
    "prefill_tokens": "tokens",
    "decode_requests_count": "requests",
    "decode_kv_tokens": "tokens",
    "mean_decode_kv_tokens": "tokens / request",
    "prefill_attention_pairs": "query-key pairs",
}

#: Tokens at which a saturating term has reached 63 %: reading weights grows with tokens until all
#: experts are active (a dense model reads all at once, which is the fixed term).
_SATURATION_TOKENS = (4, 16, 64, 256)

#: Rows of the terms, in units that make their coefficients seconds.
TABLE_TERMS: tuple[str, ...] = (
    "decode",
    *(f"decode_saturation_{tokens}" for tokens in _SATURATION_TOKENS),
    "decode_tokens",
    "decode_kv_tokens",
    "decode_context",
    "prefill",
    "prefill_tokens",
    "prefill_attention_pairs",
)

#: How a term may follow the clock x: not at all, as 1 / x, or not until x falls below a knee.
_KNEES = (0.5, 0.7)
_FORMS = ("flat", "slope", *(f"knee_{knee:g}" for knee in _KNEES))
TABLE_COEFFICIENTS: tuple[str, ...] = tuple(
    f"{form}_{term}" for form, term in itertools.product(_FORMS, TABLE_TERMS)
)

#: Work that draws power while it is done, for `PowerBase`.
TABLE_WORK: dict[str, tuple[str, ...]] = {
    "decode_tokens": ("decode_tokens",),
    "decode_weights": ("decode_saturation_16",),
    "decode_kv": ("decode_kv_tokens",),
    "decode_busy": ("decode",),
    "prefill_tokens": ("prefill_tokens",),
    "prefill_attention": ("prefill_attention_pairs",),
}


@dataclass(frozen=True, slots=True)
class Table:
    """Checked rows of one GPU.

    Attributes:
        gpu: Its name as the table has it.
        shapes: (N, 7), columns as in `SHAPE_COLUMNS`.
        clocks_mhz: (N,).
        seconds: (N,).
        watts: (N,), NaN where empty.
    """

    gpu: str
    shapes: NDArray[np.float64]
    clocks_mhz: NDArray[np.float64]
    seconds: NDArray[np.float64]
    watts: NDArray[np.float64]

    @property
    def slug(self) -> str:
        """The GPU's name as part of a directory's."""
        return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-") or "gpu"


class TableSpace:
    """Turns shapes into `TABLE_FEATURES`."""

    @property
    def features(self) -> Mapping[str, str]:
        """Feature name -> unit, in order."""
        return TABLE_FEATURES

    def build(self, shapes: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Features (F, K) with the clock left at one, and terms (T, K), of (K, 7) shapes.

        Raises:
            PredictorsError: If a row has no work, or the matrix has another width.
        """
        columns = checked_columns(shapes)
        requests, prefill, _, decoding, decode_kv, decode, pairs = columns
        context = decode_kv / np.maximum(decoding, 1.0)
        decodes = (decode > 0.0).astype(np.float64)
        saturations = [
            decodes - np.exp(-decode / tokens) * decodes for tokens in _SATURATION_TOKENS
        ]
        terms = np.stack(
            [
                decodes,
                *saturations,
                decode,
                decode_kv,
                context,
                (prefill > 0.0).astype(np.float64),
                prefill,
                pairs,
            ]
        )
        features = np.empty((len(TABLE_FEATURES), len(shapes)), dtype=np.float32)
        features[0] = 1.0
        for row, values in enumerate((requests, prefill, decoding, decode_kv, context, pairs), 1):
            features[row] = values
        return features, terms


class TableBase(LatencyBase):
    """Latency as a sum of counts, each with a clock dependence of its own.

    t(x) = sum_i r_i (flat_i + slope_i / x + sum_k knee_ki max(1, k / x)), k = 0.5 and 0.7

    Args:
        coefficients: Name (of `TABLE_COEFFICIENTS`) -> value, none negative.

    Raises:
        PredictorsError: If a coefficient is missing or negative.
    """

    def __init__(self, coefficients: Mapping[str, float]) -> None:
        self.coefficients = checked_coefficients(coefficients, TABLE_COEFFICIENTS)
        form = {
            name: np.array([self.coefficients[f"{name}_{term}"] for term in TABLE_TERMS])
            for name in _FORMS
        }
        rows = [form["flat"], form["slope"]]
        for knee in _KNEES:
            rows += [form[f"knee_{knee:g}"], knee * form[f"knee_{knee:g}"]]
        self._weights = np.stack(rows)

    @classmethod
    def fit(
        cls,
        terms: NDArray[np.float64],
        clock_ratios: NDArray[np.float64],
        seconds: NDArray[np.float64],
        weights: NDArray[np.float64],
    ) -> TableBase:
        """Fit by non-negative least squares of the relative error; arguments as `FittedBase`."""
        forms = (
            np.ones_like(clock_ratios),
            1.0 / clock_ratios,
            *(np.maximum(1.0, knee / clock_ratios) for knee in _KNEES),
        )
        columns = np.concatenate([terms * form for form in forms])
        found = fit_nonnegative(columns, seconds, weights)
        coefficients = dict(zip(TABLE_COEFFICIENTS, map(float, found), strict=True))
        # a phase that the table lacks, or that starts at nothing, still takes some time
        for phase in ("decode", "prefill"):
            if not any(coefficients[f"{form}_{phase}"] for form in _FORMS):
                coefficients[f"flat_{phase}"] = 0.01 * float(seconds.min())
        return cls(coefficients)


def read_tables(paths: Iterable[Path]) -> list[Table]:
    """Read simple tables (CSV or Parquet) and check them.

    Args:
        paths: Files; rows of one GPU are put together.

    Returns:
        One table for each GPU, by name.

    Raises:
        RecordsError: If columns are missing or values not allowed; every bad column is named.
    """
    import pandas as pd  # noqa: PLC0415 (0.8 s and 40 MB, which the daemon does without)

    frames = []
    for path in paths:
        try:
            frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        except (OSError, ValueError) as error:
            raise RecordsError(f"{path} cannot be read as a table: {error}") from None
        frames.append(_checked(frame, str(path)))
    if not frames:
        raise RecordsError("no paths were given; name tables as .csv or .parquet files")
    whole = pd.concat(frames, ignore_index=True)
    return [_table(str(gpu), rows) for gpu, rows in whole.groupby("gpu", sort=True)]


def _checked(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    import pandas as pd  # noqa: PLC0415 (0.8 s and 40 MB, which the daemon does without)

    missing = [name for name in TABLE_COLUMNS if name not in frame.columns]
    if missing == ["power_watts"]:
        frame = frame.assign(power_watts=np.nan)
    elif missing:
        raise RecordsError(
            f"{source} lacks columns: {', '.join(missing)}; allowed: {', '.join(TABLE_COLUMNS)}"
        )
    if not len(frame):
        raise RecordsError(f"{source} holds no rows")
    checked = pd.DataFrame(index=frame.index)
    checked["gpu"] = frame["gpu"].astype(str).str.strip()
    checked["phase"] = frame["phase"].astype(str).str.strip().str.lower()
    rules = {
        "gpu": ((frame["gpu"].isna() | (checked["gpu"] == "")).to_numpy(), "a name in every row"),
        "phase": (~checked["phase"].isin(["decode", "prefill"]).to_numpy(), "decode, prefill"),
    }
    for name in ("clock_mhz", "batch", "context_tokens", "latency_seconds", "power_watts"):
        values = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64)
        checked[name] = values
        empty = frame[name].isna().to_numpy()
        if name == "context_tokens":
            rules[name] = (~(values >= 0.0) | np.isinf(values), "numbers from 0")
        elif name == "power_watts":
            rules[name] = (~empty & ~((values > 0.0) & np.isfinite(values)), "above 0, or empty")
        else:
            rules[name] = (~((values > 0.0) & np.isfinite(values)), "numbers above 0")
    prompts = (checked["phase"] == "prefill").to_numpy() & ~(checked["context_tokens"] > 0)
    if prompts.any() and not rules["context_tokens"][0].any():
        rules["context_tokens"] = (prompts, "above 0 in prefill rows")
    faults = [
        f"{name}: {int(np.count_nonzero(wrong))} of {len(frame)} rows are bad, allowed: {allowed}"
        for name, (wrong, allowed) in rules.items()
        if np.any(wrong)
    ]
    if faults:
        raise RecordsError(f"{source}: " + "; ".join(faults))
    return checked


def _table(gpu: str, rows: pd.DataFrame) -> Table:
    batch = rows["batch"].to_numpy()
    tokens = batch * rows["context_tokens"].to_numpy()
    prompt = (rows["phase"] == "prefill").to_numpy()
    none = np.zeros(len(rows))
    shapes = np.column_stack(
        [
            np.where(prompt, batch, none),
            np.where(prompt, tokens, none),
            none,
            np.where(prompt, none, batch),
            np.where(prompt, none, tokens),
            np.where(prompt, none, batch),
            np.where(prompt, estimated_attention_pairs(batch, tokens, none), none),
        ]
    )
    return Table(
        gpu,
        shapes,
        rows["clock_mhz"].to_numpy(),
        rows["latency_seconds"].to_numpy(),
        rows["power_watts"].to_numpy(),
    )
