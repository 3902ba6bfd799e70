"""What a measurement leaves: one Parquet file, a row per timed kernel or power window."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FORMAT_VERSION = 1
METADATA_KEY = b"natural_clock"
#: Two probes around a kernel that differ by more saw the clock change: the row is dropped.
PROBE_TOLERANCE_RATIO = 0.02


@dataclass(frozen=True, slots=True)
class Row:
    """One timed kernel, or one window of steady work whose energy was counted.

    Attributes:
        record: "kernel" or "power".
        workload: Name of the kernel.
        kind: "gap", "fixed", "memory", "attention", "gemm", "moe" or "chain".
        backend: What computed it.
        boost: "disabled" (CUDA_DISABLE_PERF_BOOST=1 in this process alone) or "default".
        mode: How the clock came about: "ramp", "duty", "steady" or "capped".
        idle_seconds: Pause before the replay.
        repeat: Number of the replay.
        position: Number of the kernel in its replay.
        clock_mhz: SM clock, mean of the two probes; over a window, mean over its kernels.
        seconds: Duration of the kernel, or of the window.
        kernels_count: Kernels in a window.
        energy_joules: Energy of a window, from NVML's counter.
        temperature_celsius: GPU temperature after it.
    """

    record: str
    workload: str
    kind: str
    backend: str
    boost: str
    mode: str
    idle_seconds: float
    repeat: int
    position: int
    clock_mhz: float
    seconds: float
    kernels_count: int | None = None
    energy_joules: float | None = None
    temperature_celsius: float | None = None


_SCHEMA = pa.schema(
    [
        ("record", pa.string()),
        ("workload", pa.string()),
        ("kind", pa.string()),
        ("backend", pa.string()),
        ("boost", pa.string()),
        ("mode", pa.string()),
        ("idle_seconds", pa.float32()),
        ("repeat", pa.int16()),
        ("position", pa.int16()),
        ("clock_mhz", pa.float32()),
        ("seconds", pa.float64()),
        ("kernels_count", pa.int32()),
        ("energy_joules", pa.float64()),
        ("temperature_celsius", pa.float32()),
    ]
)


def probe_clock_mhz(before_mhz: float, after_mhz: float) -> float | None:
    """The clock between two probes; None when it changed in between."""
    if abs(before_mhz - after_mhz) > PROBE_TOLERANCE_RATIO * max(before_mhz, after_mhz):
        return None
    return (before_mhz + after_mhz) / 2.0


def write_part(path: Path, rows: Iterable[Row], provenance: dict[str, Any]) -> None:
    """One pass's rows with what it knows of the machine."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA)
    _write(path, table, provenance)


def merge_parts(path: Path, parts: Sequence[Path], provenance: dict[str, Any]) -> None:
    """All passes as one file, with the passes' own provenance under "passes"."""
    tables = [pq.read_table(part) for part in parts]
    passes = [json.loads(table.schema.metadata[METADATA_KEY]) for table in tables]
    merged = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    _write(path, merged, {**provenance, "passes": passes})


def _write(path: Path, table: pa.Table, provenance: dict[str, Any]) -> None:
    described = {
        "format_version": FORMAT_VERSION,
        "provenance": "measured",
        **provenance,
        "rows_sha256": _rows_hash(table),
    }
    metadata = {METADATA_KEY: json.dumps(described, sort_keys=True).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


def _rows_hash(table: pa.Table) -> str:
    """Hash of the rows alone: the same whenever and wherever they are written."""
    text = json.dumps(table.to_pylist(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sources_hash() -> str:
    """Hash of this script's own sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
