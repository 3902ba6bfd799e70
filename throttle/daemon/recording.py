"""Iteration records: what training, replay and bug reports read, written as a stream runs.

The schema is `predictors.dataset.RECORD_COLUMNS`. Rows are gathered on the control thread and
written by a thread of their own, so that no decision waits for a disk.
"""

from __future__ import annotations

import dataclasses
import importlib
import queue
import re
import threading
from typing import TYPE_CHECKING, Any, Final

from predictors.dataset import RecordsMetadata, arrow_schema
from throttle import __version__
from throttle.control.state import Phase
from throttle.errors import InvalidInputError, NotFoundError, ThrottleError
from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from throttle.control.state import EngineProfile, IterationState
    from throttle.daemon.telemetry import GpuWindow

#: Rows of one row group. A group is what a crash can lose.
ROWS_PER_GROUP: Final = 1024

#: Row groups that may wait for the disk before rows are dropped and counted.
_WAITING_GROUPS = 16

_RECORDED_PHASES = {Phase.COMPLETED: "completed", Phase.HEARTBEAT: "heartbeat"}


@dataclasses.dataclass(frozen=True, slots=True)
class RecordedState:
    """One row, as a replay wants it.

    Attributes:
        message: What the engine sent.
        clock_target_mhz: What its GPUs had been told; 0 for default clocks.
        clock_observed_mhz: What they ran at.
    """

    message: engine_pb2.IterationState
    clock_target_mhz: int
    clock_observed_mhz: int


class Recording:
    """One registration's file; written under a draft name and renamed when it is closed."""

    def __init__(
        self,
        path: Path,
        metadata: RecordsMetadata,
        registration_id: str,
        rows_per_group: int = ROWS_PER_GROUP,
    ) -> None:
        """Open the file.

        Raises:
            ThrottleError: pyarrow is not installed, or the file cannot be made.
        """
        self._arrow, parquet = _arrow_modules()
        self._path = path
        self._draft = path.with_name(path.name + ".part")
        self._schema = arrow_schema(metadata)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = parquet.ParquetWriter(self._draft, self._schema, compression="zstd")
        except OSError as error:
            raise ThrottleError(f"recording {str(path)!r} cannot be written: {error}") from None
        self._registration_id = registration_id
        self._rows_per_group = rows_per_group
        self._lock = threading.Lock()  # guards the rows: a stream may end on another thread
        self._rows: list[tuple[object, ...]] = []
        self._planned_events: list[tuple[float, engine_pb2.RequestEvent]] = []
        self._closed = False
        self._rows_count = 0
        self._dropped_rows_count = 0
        self._failure = ""
        self._groups: queue.Queue[list[tuple[object, ...]] | None] = queue.Queue(_WAITING_GROUPS)
        self._thread = threading.Thread(target=self._write, name="recording", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path:
        """Where the file will be."""
        return self._path

    @property
    def rows_count(self) -> int:
        """Rows taken in so far."""
        return self._rows_count

    @property
    def dropped_rows_count(self) -> int:
        """Rows lost because the disk was too slow or failed."""
        return self._dropped_rows_count

    @property
    def failure(self) -> str:
        """Why writing failed; empty while it works."""
        return self._failure

    def append(
        self,
        state: IterationState,
        message: engine_pb2.IterationState,
        window: GpuWindow,
        clock_target_mhz: int,
    ) -> None:
        """Take in one state; a planned one is no record, and the next record tells its events.

        Args:
            state: The state.
            message: The same as it came, kept for replay.
            window: What the GPUs did since the record before.
            clock_target_mhz: What they had been told; 0 for default clocks.
        """
        now = state.engine_time_seconds
        if state.phase not in _RECORDED_PHASES:
            self._planned_events += [
                (now - event.age_seconds, event) for event in message.request_events
            ]
            return
        if self._planned_events:
            message = _with_earlier_events(message, self._planned_events)
            self._planned_events = []
        row = _row(self._registration_id, state, message, window, clock_target_mhz)
        with self._lock:
            if self._closed:
                return
            self._rows.append(row)
            self._rows_count += 1
            if len(self._rows) >= self._rows_per_group:
                self._flush()

    def close(self) -> None:
        """Write what is left and give the file its name; an empty recording leaves no file."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._flush()
        self._groups.put(None)
        self._thread.join()

    def _flush(self) -> None:
        """Hand the rows over; called with the lock held."""
        if not self._rows:
            return
        try:
            self._groups.put_nowait(self._rows)
        except queue.Full:
            self._dropped_rows_count += len(self._rows)
        self._rows = []

    def _write(self) -> None:
        while (rows := self._groups.get()) is not None:
            if self._failure:
                self._dropped_rows_count += len(rows)
                continue
            try:
                self._writer.write_batch(self._batch(rows))
            except (OSError, self._arrow.ArrowException) as error:
                self._failure = str(error)
                self._dropped_rows_count += len(rows)
        try:
            self._writer.close()
            if self._rows_count > self._dropped_rows_count:
                self._draft.replace(self._path)
            else:
                self._draft.unlink(missing_ok=True)
        except (OSError, self._arrow.ArrowException) as error:
            self._failure = str(error)

    def _batch(self, rows: list[tuple[object, ...]]) -> Any:  # noqa: ANN401 - pyarrow is untyped
        columns = zip(*rows, strict=True)
        arrays = [
            self._arrow.array(column, type=field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        return self._arrow.record_batch(arrays, schema=self._schema)


def _with_earlier_events(
    message: engine_pb2.IterationState, earlier: list[tuple[float, engine_pb2.RequestEvent]]
) -> engine_pb2.IterationState:
    composed = engine_pb2.IterationState()
    composed.CopyFrom(message)
    del composed.request_events[:]
    for event_seconds, event in earlier:
        copy = composed.request_events.add()
        copy.CopyFrom(event)
        copy.age_seconds = max(0.0, message.engine_time_seconds - event_seconds)
    composed.request_events.extend(message.request_events)
    return composed


def recording_path(directory: Path, engine_id: str, registration_id: str) -> Path:
    """Where a registration is recorded; an engine id cannot lead out of the directory."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", engine_id)
    return directory / f"{registration_id}-{safe}.parquet"


def records_metadata(
    profile: EngineProfile, gpu_name: str, gpu_clocks_mhz: tuple[int, ...], *, simulated: bool
) -> RecordsMetadata:
    """What a file says about its run."""
    registration = dataclasses.asdict(profile)
    registration["gpu_uuids"] = list(profile.gpu_uuids)
    registration["role"] = profile.role.name.lower()
    registration["mode"] = profile.mode.name.lower()
    return RecordsMetadata(
        registration=registration,
        gpu_name=gpu_name,
        gpu_clocks_mhz=gpu_clocks_mhz,
        provenance="simulated" if simulated else "measured",
        throttle_version=__version__,
    )


def read_states(path: Path) -> Iterator[RecordedState]:
    """The recorded states in order, for replay.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: It holds no states.
        ThrottleError: pyarrow is not installed.
    """
    arrow, parquet = _arrow_modules()
    columns = ["state_message", "clock_target_mhz", "clock_observed_mhz"]
    try:
        file = parquet.ParquetFile(path)
    except FileNotFoundError:
        raise NotFoundError(f"recording {str(path)!r} does not exist") from None
    except (OSError, arrow.ArrowException) as error:
        raise InvalidInputError(str(path), str(error), "a Parquet file of records") from None
    if missing := [name for name in columns if name not in file.schema_arrow.names]:
        raise InvalidInputError(
            str(path), f"without {', '.join(missing)}", "a file that `throttle serve` recorded"
        )
    for batch in file.iter_batches(columns=columns):
        for content, target, observed in zip(
            *(batch.column(name).to_pylist() for name in columns), strict=True
        ):
            yield RecordedState(engine_pb2.IterationState.FromString(content), target, observed)


def require_pyarrow() -> None:
    """Fail now rather than at the first registration.

    Raises:
        ThrottleError: pyarrow is not installed.
    """
    _arrow_modules()


def _arrow_modules() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ThrottleError(
            "recording needs pyarrow, which is not installed; "
            "install moe-throttle[train] or leave `recordings` empty"
        ) from None


def _row(
    registration_id: str,
    state: IterationState,
    message: engine_pb2.IterationState,
    window: GpuWindow,
    clock_target_mhz: int,
) -> tuple[object, ...]:
    """Values in the order of `predictors.dataset.RECORD_COLUMNS`."""
    scheduled, queued, kv_cache = state.scheduled, state.queued, state.kv_cache
    speculation, work, experts = state.speculative_decoding, state.work_counters, state.expert_load
    completed = state.phase is Phase.COMPLETED
    return (
        registration_id,
        state.sequence_number,
        state.engine_time_seconds,
        _RECORDED_PHASES[state.phase],
        clock_target_mhz,
        window.clock_mhz,
        window.previous_clock_mhz,
        state.iteration_duration_seconds if completed else None,
        state.timing_source.name.lower() if completed else None,
        window.power_watts,
        window.energy_joules,
        window.seconds,
        scheduled.num_prefill_requests,
        scheduled.sum_prefill_tokens,
        scheduled.var_prefill_length,
        scheduled.sum_prefill_kv_tokens,
        scheduled.num_decode_requests,
        scheduled.sum_decode_kv_tokens,
        scheduled.var_decode_kv_tokens,
        scheduled.num_decode_tokens,
        scheduled.prefill_attention_pairs,
        queued.num_prefill_requests,
        queued.sum_prefill_tokens,
        queued.var_prefill_length,
        queued.num_decode_requests,
        queued.sum_decode_kv_tokens,
        queued.var_decode_kv_tokens,
        kv_cache.used_blocks_count,
        kv_cache.total_blocks_count,
        kv_cache.usage_ratio,
        speculation.draft_tokens_count if speculation else None,
        speculation.accepted_tokens_count if speculation else None,
        work.flops_count if work else None,
        work.read_bytes if work else None,
        work.write_bytes if work else None,
        experts.balancedness_ratio if experts else None,
        experts.mean_active_experts_count if experts else None,
        message.SerializeToString(),
    )
