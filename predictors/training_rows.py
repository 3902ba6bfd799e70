"""Which recorded rows train which model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from predictors.dataset import SOURCE_COLUMN
from predictors.errors import RecordsError
from predictors.prediction import estimated_attention_pairs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from predictors.dataset import Records

#: A clock that moved by less than this share within the window counts as one clock: a GPU at its
#: power limit wanders by a step or two of 15 MHz, which is no switch.
CLOCK_TOLERANCE_RATIO = 0.02

#: A GPU that draws at least this share of its limit below the clock asked for is held by the limit.
POWER_CAP_RATIO = 0.97

#: Least share of a power window that iterations must fill for it to say what iterations draw, and
#: the largest share for it to say what an idle GPU draws.
BUSY_RATIO = 0.9
IDLE_RATIO = 0.02

#: A clock takes effect this long after it was asked for (switches: median 25 ms, p99 150 ms).
SETTLING_SECONDS = 0.25

#: Rows at or beyond a clock that make it one to learn from.
LEAST_CLOCK_ROWS_COUNT = 10

#: Rows of one block when there are too few runs to split by run.
BLOCK_ROWS_COUNT = 256


@dataclass(frozen=True, slots=True)
class TrainingFrame:
    """Rows that a model can learn from, as arrays of length N (idle ones of length M).

    Attributes:
        shapes: (N, 7), columns as in `SHAPE_COLUMNS`.
        clocks_mhz: Clock that the iteration ran at, or was asked to when the power limit held it.
        seconds: Duration of the iteration.
        watts: Power of one GPU; NaN where the row does not tell.
        groups: Number of the run (or block of one), for splits.
        active_experts: Active experts per layer as the engine reported; NaN where it did not.
        idle_clocks_mhz: Clock of idle rows.
        idle_watts: Their power.
        dropped: Reason -> number of rows left out.
        grouping: "runs" or "blocks".
    """

    shapes: NDArray[np.float64]
    clocks_mhz: NDArray[np.float64]
    seconds: NDArray[np.float64]
    watts: NDArray[np.float64]
    groups: NDArray[np.int64]
    active_experts: NDArray[np.float64]
    idle_clocks_mhz: NDArray[np.float64]
    idle_watts: NDArray[np.float64]
    dropped: Mapping[str, int] = field(default_factory=dict)
    grouping: str = "runs"

    def rows(self, chosen: NDArray[np.bool_]) -> TrainingFrame:
        """Only some of the iterations; idle rows stay."""
        return replace(
            self,
            shapes=self.shapes[chosen],
            clocks_mhz=self.clocks_mhz[chosen],
            seconds=self.seconds[chosen],
            watts=self.watts[chosen],
            groups=self.groups[chosen],
            active_experts=self.active_experts[chosen],
        )

    def data_hash(self) -> str:
        """Hash of every value that training sees, whatever kind of file it came from."""
        digest = hashlib.sha256()
        for array in (
            self.shapes,
            self.clocks_mhz,
            self.seconds,
            self.watts,
            self.groups,
            self.active_experts,
            self.idle_clocks_mhz,
            self.idle_watts,
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def training_frame(records: Records, power_limit_watts: float | None = None) -> TrainingFrame:
    """Choose the rows that say how long an iteration takes, and what it and an idle GPU draw.

    Left out, and counted: rows whose clock changed within the window (by more than
    `CLOCK_TOLERANCE_RATIO`), completed rows without work. Power is taken only from windows that
    iterations filled (`BUSY_RATIO`), idle power from heartbeats whose window held none.

    A GPU at its power limit runs below the clock asked for. There the row counts for the clock
    asked for, since that is what a controller can choose.

    Args:
        records: Checked records.
        power_limit_watts: Power limit of one GPU; None if not known.

    Raises:
        RecordsError: If no row is left.
    """
    frame = records.frame
    order = np.lexsort(
        (frame["sequence_number"], frame["registration_id"].astype(str), frame[SOURCE_COLUMN])
    )
    frame = frame.iloc[order]
    runs, _ = pd.factorize(frame[SOURCE_COLUMN] + "/" + frame["registration_id"].astype(str))
    observed = frame["clock_observed_mhz"].to_numpy()
    power = frame["power_watts"].to_numpy()
    maximum = max(described.gpu_clocks_mhz[-1] for described in records.metadata.values())
    asked = frame["clock_target_mhz"].to_numpy()
    asked = np.where(asked > 0, asked, maximum)
    limit = np.inf if power_limit_watts is None else power_limit_watts
    capped = (power >= POWER_CAP_RATIO * limit) & (observed < asked)
    moved = np.abs(frame["clock_previous_mhz"].to_numpy() - observed)
    # the limit moves the clock with each iteration's load, which is no switch
    at_rest = capped | (observed >= (1.0 - CLOCK_TOLERANCE_RATIO) * asked)
    steady = (moved <= CLOCK_TOLERANCE_RATIO * observed) | (_settled(frame, runs, asked) & at_rest)
    completed = (frame["phase"] == "completed").to_numpy()
    shapes = _shapes(frame)
    working = shapes[:, 1] + shapes[:, 5] > 0
    busy = _busy_ratios(frame, runs)
    idle = ~completed & steady & (busy <= IDLE_RATIO) & (power > 0)
    kept = completed & steady & working
    watts = np.where((busy >= BUSY_RATIO) & (power > 0), power, np.nan)
    dropped = {
        "clock changed within the window": int(np.count_nonzero(completed & ~steady)),
        "completed without work": int(np.count_nonzero(completed & steady & ~working)),
        "power unknown or window partly idle": int(np.count_nonzero(kept & np.isnan(watts))),
        "heartbeat not usable as idle": int(np.count_nonzero(~completed & ~idle)),
    }
    if not kept.any():
        raise RecordsError(
            f"none of {len(frame)} rows can be trained on ({dropped}); record completed iterations "
            "at steady clocks"
        )
    groups, grouping = _groups(runs[kept])
    whole = TrainingFrame(
        shapes[kept],
        np.where(capped, asked, observed)[kept],
        frame["iteration_duration_seconds"].to_numpy()[kept],
        watts[kept],
        groups,
        frame["mean_active_experts_count"].to_numpy()[kept],
        observed[idle],
        power[idle],
        dropped,
        grouping,
    )
    return _with_capped_clocks(whole, capped[kept], observed[kept])


def supported_clocks(frame: TrainingFrame) -> dict[str, tuple[float, float]]:
    """Phase -> lowest and highest clock with enough rows to learn from; phases without are absent.

    A recording that sets no clock holds few: those that the GPU took by itself.
    """
    has_prompts = frame.shapes[:, 1] > 0
    found = {}
    for phase, rows in (("decode", ~has_prompts), ("prefill", has_prompts)):
        clocks = np.sort(frame.clocks_mhz[rows])
        if len(clocks) >= LEAST_CLOCK_ROWS_COUNT:
            edge = LEAST_CLOCK_ROWS_COUNT - 1
            found[phase] = (float(clocks[edge]), float(clocks[-1 - edge]))
    return found


def _settled(
    frame: pd.DataFrame, runs: NDArray[np.int64], asked: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Whether the asked clock has, at the start of a row, stood long enough to take effect."""
    times = frame["engine_time_seconds"].to_numpy()
    began = times - np.nan_to_num(frame["iteration_duration_seconds"].to_numpy())
    new_run = np.concatenate([[True], runs[1:] != runs[:-1]])
    changed = new_run | np.concatenate([[True], asked[1:] != asked[:-1]])
    since = times[np.maximum.accumulate(np.where(changed, np.arange(len(times)), 0))]
    settled: NDArray[np.bool_] = began - since >= SETTLING_SECONDS
    return settled


def _with_capped_clocks(
    frame: TrainingFrame, capped: NDArray[np.bool_], observed_mhz: NDArray[np.float64]
) -> TrainingFrame:
    """Rows at the power limit count for the clock that ran, too: asked for it, the GPU runs it."""
    again = capped & (observed_mhz < (1.0 - CLOCK_TOLERANCE_RATIO) * frame.clocks_mhz)
    if not again.any():
        return frame
    # each beside the row that it repeats, so that rows stay in order of time
    order = np.sort(np.concatenate([np.arange(len(again)), np.flatnonzero(again)]))
    repeated = np.concatenate([[False], order[1:] == order[:-1]])
    clocks = np.where(repeated, observed_mhz[order], frame.clocks_mhz[order])
    return replace(
        frame,
        shapes=frame.shapes[order],
        clocks_mhz=clocks,
        seconds=frame.seconds[order],
        watts=frame.watts[order],
        groups=frame.groups[order],
        active_experts=frame.active_experts[order],
    )


def _shapes(frame: pd.DataFrame) -> NDArray[np.float64]:
    decoding = frame["num_decode_requests"].to_numpy()
    fed = frame["num_decode_tokens"].to_numpy()
    prompts = [
        frame[name].to_numpy()
        for name in ("num_prefill_requests", "sum_prefill_tokens", "sum_prefill_kv_tokens")
    ]
    pairs = frame["prefill_attention_pairs"].to_numpy()
    return np.column_stack(
        [
            *prompts,
            decoding,
            frame["sum_decode_kv_tokens"].to_numpy(),
            np.where(np.isnan(fed), decoding, fed),
            np.where(np.isnan(pairs), estimated_attention_pairs(*prompts), pairs),
        ]
    )


def _busy_ratios(frame: pd.DataFrame, runs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of each row's power window in which the engine computed; NaN without a window."""
    ratios = np.full(len(frame), np.nan)
    times = frame["engine_time_seconds"].to_numpy()
    windows = frame["energy_window_seconds"].to_numpy()
    durations = np.nan_to_num(frame["iteration_duration_seconds"].to_numpy())
    for run in np.unique(runs):
        rows = runs == run
        ends, spent = times[rows], durations[rows]
        starts = np.maximum(ends - spent, np.concatenate([[-np.inf], ends[:-1]]))
        done = np.cumsum(ends - starts)
        # work done by a moment: flat between iterations, rising within
        moments = np.column_stack([starts, ends]).ravel()
        work = np.column_stack([done - (ends - starts), done]).ravel()
        window = windows[rows]
        before = np.interp(ends - window, moments, work, left=0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios[rows] = np.where(window > 0, (done - before) / window, np.nan)
    return ratios


def _groups(runs: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    """Runs if there are enough to split; else contiguous blocks of rows within each run."""
    if len(np.unique(runs)) >= 8:
        return runs.astype(np.int64), "runs"
    blocks = np.zeros(len(runs), dtype=np.int64)
    first = 0
    for run in np.unique(runs):
        rows = np.flatnonzero(runs == run)
        # no fewer than ten blocks, so that a short recording can be split too
        size = max(1, min(BLOCK_ROWS_COUNT, len(rows) // 10))
        blocks[rows] = first + np.arange(len(rows)) // size
        first = int(blocks[rows[-1]]) + 1
    return blocks, "blocks"
