"""Iteration records: what they hold, and how they are read and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.errors import RecordsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pandas as pd
    import pyarrow as pa

#: Version of the record format, in the file metadata under `METADATA_KEY`.
RECORD_FORMAT_VERSION = 1
METADATA_KEY = b"moe_throttle"

#: Columns of iteration records in order: name -> type (pandas and Arrow know these names). One row
#: per completed iteration or heartbeat.
RECORD_COLUMNS: dict[str, str] = {
    "registration_id": "string",
    "sequence_number": "int64",
    "engine_time_seconds": "float64",
    "phase": "string",  # completed | heartbeat
    "clock_target_mhz": "int64",  # 0: default clocks
    "clock_observed_mhz": "int64",  # read after the iteration
    "clock_previous_mhz": "int64",  # read at the record before
    "iteration_duration_seconds": "float64",  # null for a heartbeat
    "timing_source": "string",  # host_step | host_interval | gpu_event
    "power_watts": "float64",  # mean of one GPU over the energy window
    "energy_joules": "float64",  # over the window, summed over the engine's GPUs
    "energy_window_seconds": "float64",
    "num_prefill_requests": "int64",
    "sum_prefill_tokens": "int64",
    "var_prefill_length": "float64",
    "sum_prefill_kv_tokens": "int64",
    "num_decode_requests": "int64",
    "sum_decode_kv_tokens": "int64",
    "var_decode_kv_tokens": "float64",
    "num_decode_tokens": "int64",  # null: one for each decoding request
    "prefill_attention_pairs": "float64",  # null: estimated from the sums
    "queued_num_prefill_requests": "int64",
    "queued_sum_prefill_tokens": "int64",
    "queued_var_prefill_length": "float64",
    "queued_num_decode_requests": "int64",
    "queued_sum_decode_kv_tokens": "int64",
    "queued_var_decode_kv_tokens": "float64",
    "kv_used_blocks_count": "int64",
    "kv_total_blocks_count": "int64",
    "kv_usage_ratio": "float64",
    "draft_tokens_count": "int64",
    "accepted_tokens_count": "int64",
    "flops_count": "float64",
    "read_bytes": "float64",
    "write_bytes": "float64",
    "balancedness_ratio": "float64",
    "mean_active_experts_count": "float64",
    "state_message": "binary",  # the serialized state, for replay; absent in CSV
}

#: Columns that may hold nulls; a file may also leave them out.
NULLABLE_COLUMNS: frozenset[str] = frozenset(
    {
        "iteration_duration_seconds",
        "timing_source",
        "power_watts",
        "energy_joules",
        "energy_window_seconds",
        "var_prefill_length",
        "var_decode_kv_tokens",
        "num_decode_tokens",
        "prefill_attention_pairs",
        *(name for name in RECORD_COLUMNS if name.startswith("queued_")),
        "kv_used_blocks_count",
        "kv_total_blocks_count",
        "kv_usage_ratio",
        "draft_tokens_count",
        "accepted_tokens_count",
        "flops_count",
        "read_bytes",
        "write_bytes",
        "balancedness_ratio",
        "mean_active_experts_count",
        "state_message",
    }
)

#: Column that `read_records` adds: the file that a row came from.
SOURCE_COLUMN = "source"


@dataclass(frozen=True, slots=True)
class RecordsMetadata:
    """What a record file says about its run; see `RECORD_COLUMNS` for the rows.

    Attributes:
        registration: What the engine said when it registered.
        gpu_name: Name of the GPU.
        gpu_clocks_mhz: Clocks that it supports, rising.
        provenance: "measured" or "simulated".
        throttle_version: Version of the recording service.
    """

    registration: Mapping[str, Any]
    gpu_name: str
    gpu_clocks_mhz: tuple[int, ...]
    provenance: str
    throttle_version: str = ""

    @classmethod
    def from_json(cls, text: str, source: str) -> RecordsMetadata:
        """Read the JSON under `METADATA_KEY`, or beside a CSV file.

        Args:
            text: The JSON.
            source: File name for messages.

        Raises:
            RecordsError: If a key is missing, or a value is not allowed.
        """
        try:
            document = json.loads(text)
        except ValueError as error:
            raise RecordsError(f"{source}: metadata cannot be read as JSON: {error}") from None
        wanted = ("format_version", "registration", "gpu_name", "gpu_clocks_mhz", "provenance")
        if missing := [key for key in wanted if key not in document]:
            raise RecordsError(f"{source}: metadata lacks {', '.join(missing)}")
        if document["format_version"] != RECORD_FORMAT_VERSION:
            raise RecordsError(
                f"{source}: format_version is {document['format_version']!r}; "
                f"allowed: {RECORD_FORMAT_VERSION}"
            )
        if document["provenance"] not in {"measured", "simulated"}:
            raise RecordsError(
                f"{source}: provenance is {document['provenance']!r}; allowed: measured, simulated"
            )
        clocks = tuple(sorted({int(clock) for clock in document["gpu_clocks_mhz"]}))
        if not clocks or clocks[0] <= 0:
            raise RecordsError(
                f"{source}: gpu_clocks_mhz is {list(clocks)}; allowed: clocks in MHz"
            )
        return cls(
            document["registration"],
            str(document["gpu_name"]),
            clocks,
            document["provenance"],
            str(document.get("throttle_version", "")),
        )

    def to_json(self) -> str:
        """The JSON that `from_json` reads."""
        document = {
            "format_version": RECORD_FORMAT_VERSION,
            "registration": dict(self.registration),
            "gpu_name": self.gpu_name,
            "gpu_clocks_mhz": list(self.gpu_clocks_mhz),
            "provenance": self.provenance,
            "throttle_version": self.throttle_version,
        }
        return json.dumps(document, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Records:
    """Rows of one or more files, and what the files said about their runs.

    Attributes:
        frame: Columns of `RECORD_COLUMNS` and `SOURCE_COLUMN`.
        metadata: One for each source.
    """

    frame: pd.DataFrame
    metadata: Mapping[str, RecordsMetadata]


def arrow_schema(metadata: RecordsMetadata) -> pa.Schema:
    """The Arrow schema of a record file, with its metadata."""
    import pyarrow as pa  # noqa: PLC0415 (only writers and readers of Parquet need it)

    fields = [
        pa.field(name, pa.type_for_alias(kind), nullable=name in NULLABLE_COLUMNS)
        for name, kind in RECORD_COLUMNS.items()
    ]
    return pa.schema(fields, {METADATA_KEY: metadata.to_json().encode()})


def read_records(paths: Iterable[Path]) -> Records:
    """Read record files and check them.

    Args:
        paths: Parquet files, CSV files (each with `<file>.json` beside it that holds the metadata),
            and directories of such files.

    Raises:
        RecordsError: If a path holds no records, or a file is damaged.
    """
    import pandas as pd  # noqa: PLC0415 (0.8 s and 40 MB, which the daemon does without)

    frames, metadata = [], {}
    for path in _record_files(paths):
        frame, described = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
        frame = _typed(frame, str(path))
        validate_frame(frame, str(path))
        frame[SOURCE_COLUMN] = str(path)
        frames.append(frame)
        metadata[str(path)] = described
    return Records(pd.concat(frames, ignore_index=True), metadata)


def _record_files(paths: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix in {".parquet", ".csv"}]
            if not inside:
                raise RecordsError(f"{path} holds no .parquet or .csv file; record a run first")
            found += inside
        elif not path.exists():
            raise RecordsError(f"{path} does not exist; allowed: record files or directories")
        elif path.suffix not in {".parquet", ".csv"}:
            raise RecordsError(f"{path} ends with {path.suffix!r}; allowed: .parquet, .csv")
        else:
            found.append(path)
    if not found:
        raise RecordsError("no paths were given; name record files or directories")
    return list(dict.fromkeys(found))


def _read_parquet(path: Path) -> tuple[pd.DataFrame, RecordsMetadata]:
    import pyarrow as pa  # noqa: PLC0415 (CSV works without it)
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        file = pq.ParquetFile(path)
        metadata = (file.schema_arrow.metadata or {}).get(METADATA_KEY)
        wanted = [name for name in file.schema_arrow.names if name != "state_message"]
        frame = file.read(columns=wanted).to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise RecordsError(f"{path} cannot be read as Parquet: {error}") from None
    if metadata is None:
        raise RecordsError(f"{path} has no metadata {METADATA_KEY.decode()!r}: it holds no records")
    return frame, RecordsMetadata.from_json(metadata.decode(), str(path))


def _read_csv(path: Path) -> tuple[pd.DataFrame, RecordsMetadata]:
    import pandas as pd  # noqa: PLC0415 (0.8 s and 40 MB, which the daemon does without)

    beside = path.with_name(path.name + ".json")
    if not beside.exists():
        raise RecordsError(f"{beside} does not exist; a CSV file needs its metadata there")
    try:
        frame = pd.read_csv(path, dtype={"registration_id": str})
    except (ValueError, OSError) as error:
        raise RecordsError(f"{path} cannot be read as CSV: {error}") from None
    return frame, RecordsMetadata.from_json(beside.read_text("utf-8"), str(beside))


def _typed(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """The columns of `RECORD_COLUMNS`: numbers as float64 with NaN for null, texts as objects."""
    import pandas as pd  # noqa: PLC0415 (0.8 s and 40 MB, which the daemon does without)

    wanted = [name for name in RECORD_COLUMNS if name != "state_message"]
    needed = [name for name in wanted if name not in NULLABLE_COLUMNS]
    if missing := [name for name in needed if name not in frame.columns]:
        raise RecordsError(f"{source} lacks columns: {', '.join(missing)}")
    columns: dict[str, Any] = {}
    for name in wanted:
        if name not in frame.columns:
            columns[name] = np.full(len(frame), np.nan) if _is_number(name) else None
        elif _is_number(name):
            # a text in a number's column becomes infinite, which the validation reports
            number = (
                pd.to_numeric(frame[name], errors="coerce").astype("float64").to_numpy(copy=True)
            )
            number[np.isnan(number) & frame[name].notna().to_numpy()] = np.inf
            columns[name] = number
        else:
            columns[name] = frame[name].astype(object)
    return pd.DataFrame(columns, index=range(len(frame)))


def _is_number(name: str) -> bool:
    return RECORD_COLUMNS[name] in {"int64", "float64"}


def validate_frame(frame: pd.DataFrame, source: str = "records") -> None:
    """Check every value; one error names every bad column and how many rows are bad in it.

    Args:
        frame: As `read_records` builds it.
        source: File name for the message.

    Raises:
        RecordsError: If any value is not allowed, or there are no rows.
    """
    if not len(frame):
        raise RecordsError(f"{source} holds no rows; record a run first")
    columns = [name for name in frame.columns if name in RECORD_COLUMNS]
    faults = {name: found for name in columns if (found := _fault(frame, name))}
    if faults:
        raise RecordsError(f"{source}: " + "; ".join(f"{n}: {f}" for n, f in faults.items()))


def _fault(frame: pd.DataFrame, name: str) -> str:
    """What is wrong with one column, with the number of bad rows; empty if nothing."""
    column = frame[name]
    rules: list[tuple[Any, str]] = []
    if name not in NULLABLE_COLUMNS:
        rules.append((column.isna().to_numpy(), "a value in every row"))
    if _is_number(name):
        values = column.to_numpy()
        rules.append((np.isinf(values) | (values < 0), "finite numbers from 0"))
        if RECORD_COLUMNS[name] == "int64":
            rules.append(((values != np.floor(values)) & ~np.isnan(values), "whole numbers"))
    if name in {"clock_observed_mhz", "clock_previous_mhz"}:
        rules.append((values == 0, "a clock in MHz"))
    if name in {"kv_usage_ratio", "balancedness_ratio"}:
        rules.append((values > 1.0, "0 to 1, or null"))
    if name == "phase":
        rules.append((~column.isin(["completed", "heartbeat"]), "completed, heartbeat"))
    if name == "iteration_duration_seconds":
        completed = (frame["phase"] == "completed").to_numpy()
        rules.append((completed & ~(values > 0), "above 0 in completed iterations"))
    for wrong, allowed in rules:
        if count := int(np.count_nonzero(wrong)):
            return f"{count} of {len(frame)} rows are bad, allowed: {allowed}"
    return ""
