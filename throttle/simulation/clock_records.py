"""Reads what `scripts/measure_natural_clock` wrote, ready to be fitted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from throttle.errors import InvalidInputError, NotFoundError
from throttle.simulation.natural_clock import KernelSamples

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

_METADATA_KEY = b"natural_clock"
_FORMAT_VERSION = 1
_GAP = "gap"
_GAP_BIN_MHZ = 15.0


@dataclass(frozen=True, slots=True)
class SteadyPower:
    """Power of steady work; measured.

    Attributes:
        workload: What ran.
        boost: Whether the driver's boost was "disabled" or "default".
        clock_mhz: Mean SM clock.
        power_watts: Energy counter over time.
        seconds: Length of the window.
    """

    workload: str
    boost: str
    clock_mhz: float
    power_watts: float
    seconds: float


@dataclass(frozen=True, slots=True)
class ClockRecords:
    """One measurement.

    Attributes:
        kernels: Samples of each kernel, launch gaps taken off.
        steady: Power of steady work.
        maximum_clock_mhz: Highest clock of the GPU.
        provenance: GPU, driver, versions, temperatures and hashes, as written.
    """

    kernels: tuple[KernelSamples, ...]
    steady: tuple[SteadyPower, ...]
    maximum_clock_mhz: float
    provenance: dict[str, Any]


def read_clock_records(path: Path) -> ClockRecords:
    """Read a measurement.

    The time between two probes with nothing in between is one launch gap, which depends on the
    clock too; it is taken off every kernel, so that each keeps one gap, as in a chain of kernels.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: It is not a measurement, or of another format version.
    """
    if not path.is_file():
        raise NotFoundError(f"no measurement {path}")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InvalidInputError("measurement", str(path), "a Parquet file") from error
    text = (table.schema.metadata or {}).get(_METADATA_KEY)
    if text is None:
        raise InvalidInputError("measurement", str(path), "a file of measure_natural_clock")
    provenance: dict[str, Any] = json.loads(text)
    if provenance.get("format_version") != _FORMAT_VERSION:
        raise InvalidInputError(
            "format_version", provenance.get("format_version"), str(_FORMAT_VERSION)
        )
    frame = table.to_pandas()
    maximum = provenance.get("maximum_clock_mhz") or float(frame["clock_mhz"].max())
    timed = frame[frame["record"] == "kernel"]
    gaps = timed[timed["kind"] == _GAP]
    kernels = tuple(
        _samples(str(name), group, gaps)
        for name, group in timed[timed["kind"] != _GAP].groupby("workload", sort=True)
    )
    return ClockRecords(kernels, _steady(frame), float(maximum), provenance)


def _samples(name: str, group: pd.DataFrame, gaps: pd.DataFrame) -> KernelSamples:
    clocks = group["clock_mhz"].to_numpy(dtype=np.float64)
    seconds = group["seconds"].to_numpy(dtype=np.float64) - _gap_seconds(clocks, gaps)
    kept = seconds > 0
    return KernelSamples(name, str(group["kind"].iloc[0]), clocks[kept], seconds[kept])


def _gap_seconds(clocks_mhz: NDArray[np.float64], gaps: pd.DataFrame) -> NDArray[np.float64]:
    """Launch gap at each clock, by interpolation between medians; 0 where none was timed."""
    if gaps.empty:
        return np.zeros_like(clocks_mhz)
    bins = (gaps["clock_mhz"] / _GAP_BIN_MHZ).round() * _GAP_BIN_MHZ
    medians = gaps.groupby(bins)["seconds"].median()
    known = medians.index.to_numpy(dtype=np.float64)
    return np.asarray(np.interp(clocks_mhz, known, medians.to_numpy()), dtype=np.float64)


def _steady(frame: pd.DataFrame) -> tuple[SteadyPower, ...]:
    windows = frame[(frame["record"] == "power") & (frame["seconds"] > 0)]
    return tuple(
        SteadyPower(
            str(row["workload"]),
            str(row["boost"]),
            float(row["clock_mhz"]),
            float(row["energy_joules"]) / float(row["seconds"]),
            float(row["seconds"]),
        )
        for row in windows.to_dict("records")
    )
