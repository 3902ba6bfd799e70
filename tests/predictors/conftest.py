"""An invented engine on an invented GPU: smooth formulas that no code of ours knows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from predictors.dataset import RECORD_COLUMNS, RecordsMetadata, arrow_schema, read_records
from predictors.prediction import estimated_attention_pairs
from predictors.training import train
from predictors.training_settings import TrainingSettings

CLOCKS_MHZ = tuple(range(345, 1981, 15))
MAXIMUM_CLOCK_MHZ = CLOCKS_MHZ[-1]
POWER_LIMIT_WATTS = 700.0
QUICK = TrainingSettings(latency_trees_count=60, power_trees_count=40, threads_count=1)


def truth(shapes, clocks_mhz):
    """Seconds and watts of (N, 7) shapes at (N,) clocks, with a power limit."""
    limited = np.asarray(clocks_mhz, dtype=float)
    for _ in range(12):  # the limit lowers the clock until the power fits
        seconds, watts = _unlimited(shapes, limited / MAXIMUM_CLOCK_MHZ)
        limited = np.where(watts > POWER_LIMIT_WATTS, limited * 0.98, limited)
    return seconds, np.minimum(watts, POWER_LIMIT_WATTS), limited


def _unlimited(shapes, x):
    prefill, prefill_kv, decode_kv, decode = shapes[:, 1], shapes[:, 2], shapes[:, 4], shapes[:, 5]
    tokens = prefill + decode
    reading = 0.013 * (1.0 - np.exp(-tokens / 20.0)) + 0.002 + decode_kv * 2.6e-8
    reading *= (1.0 + (0.5 / x) ** 6) ** (1.0 / 6.0)
    computing = tokens * 1.1e-5 + prefill * (prefill_kv + 0.5 * prefill) * 2.5e-10
    fixed = 0.0035 * (0.5 + 0.5 / x) + 2.5e-5 * shapes[:, 3]
    seconds = fixed + (reading**2 + (computing / x) ** 2) ** 0.5
    voltage = np.maximum(0.75, 0.75 + 0.25 * (x - 0.6) / 0.4)
    busy = (computing / x) / seconds
    watts = 115.0 + 150.0 * reading / seconds + x * voltage**2 * (230.0 + 420.0 * busy)
    return seconds, watts


def metadata(**registration):
    registered = {
        "engine_id": "engine-0",
        "engine_name": "invented",
        "engine_version": "1.0",
        "model_name": "Qwen/Qwen3-30B-A3B",
        "model_config_json": "",
        "weight_dtype": "bf16",
        "kv_dtype": "auto",
        "tensor_parallel_count": 1,
        "pipeline_parallel_count": 1,
        "data_parallel_count": 1,
        "expert_parallel_count": 1,
        "gpu_uuids": ["GPU-0"],
        "role": "mixed",
        "running_requests_limit": 256,
        "batched_tokens_limit": 2048,
        "kv_blocks_count": 60000,
        "kv_block_tokens": 16,
    }
    return RecordsMetadata(
        registered | registration, "NVIDIA H200", CLOCKS_MHZ, "simulated", "0.0.0"
    )


def random_shapes(rng, count):
    decoding = np.floor(np.exp(rng.uniform(0.0, np.log(256.0), count)))
    has_prefill = rng.random(count) < 0.35
    requests = np.where(has_prefill, rng.integers(1, 4, count), 0)
    prefill = np.where(has_prefill, requests * rng.integers(16, 600, count), 0)
    old = np.where(rng.random(count) < 0.3, prefill * 2, 0)
    return np.column_stack(
        [
            requests,
            prefill,
            old,
            decoding,
            decoding * rng.integers(100, 4000, count),
            decoding,
            estimated_attention_pairs(requests, prefill, old),
        ]
    ).astype(float)


def records_frame(rows_count, seed=0, run="run-0", noise=0.01, hold=20):
    """A run that holds each clock for some iterations, with heartbeats at clock changes."""
    rng = np.random.default_rng(seed)
    shapes = random_shapes(rng, rows_count)
    targets = rng.choice(CLOCKS_MHZ, rows_count // hold + 1).repeat(hold)[:rows_count]
    seconds, watts, clocks = truth(shapes, targets)
    clocks = np.round(clocks)
    seconds *= np.exp(rng.normal(0.0, noise, rows_count))
    watts = np.minimum(watts * np.exp(rng.normal(0.0, noise, rows_count)), POWER_LIMIT_WATTS)
    frame = pd.DataFrame(
        {name: pd.Series([None] * rows_count, dtype=object) for name in RECORD_COLUMNS}
    )
    frame["registration_id"] = run
    frame["phase"] = "completed"
    frame["clock_target_mhz"] = targets
    frame["clock_observed_mhz"] = clocks.astype(int)
    # inside a hold the clock only moves when the limit moves it, which a real reading smooths
    previous = np.where(np.arange(rows_count) % hold == 0, np.roll(clocks, 1), clocks)
    frame["clock_previous_mhz"] = previous.astype(int)
    frame["iteration_duration_seconds"] = seconds
    frame["timing_source"] = "host_interval"
    frame["power_watts"] = watts
    frame["energy_joules"] = watts * seconds
    frame["energy_window_seconds"] = seconds
    for index, name in enumerate(
        (
            "num_prefill_requests",
            "sum_prefill_tokens",
            "sum_prefill_kv_tokens",
            "num_decode_requests",
            "sum_decode_kv_tokens",
        )
    ):
        frame[name] = shapes[:, index].astype(int)
    for name in ("var_prefill_length", "var_decode_kv_tokens"):
        frame[name] = 0.0
    frame["kv_usage_ratio"] = rng.random(rows_count)
    idle = frame.iloc[:: hold * 5].copy()
    idle["phase"] = "heartbeat"
    idle["iteration_duration_seconds"] = None
    idle["power_watts"] = 80.0 + 50.0 * (idle["clock_target_mhz"] / MAXIMUM_CLOCK_MHZ) ** 2
    idle["energy_window_seconds"] = 0.1
    idle["energy_joules"] = idle["power_watts"] * 0.1
    idle["clock_observed_mhz"] = idle["clock_previous_mhz"] = idle["clock_target_mhz"]
    for name in RECORD_COLUMNS:
        if name.startswith(("num_", "sum_")) and name != "num_decode_tokens":
            idle[name] = 0
    frame = pd.concat([idle, frame]).sort_index(kind="stable").reset_index(drop=True)
    frame["sequence_number"] = np.arange(len(frame))
    spent = frame["iteration_duration_seconds"].astype(float).fillna(0.1)
    frame["engine_time_seconds"] = np.cumsum(spent)
    return frame


def write_parquet(frame, path, described=None):
    schema = arrow_schema(described or metadata())
    columns = {}
    for field in schema:
        values = frame[field.name]
        if field.type == pa.int64():
            values = values.astype("Int64")
        elif field.type == pa.float64():
            values = values.astype("float64")
        columns[field.name] = pa.array(values, type=field.type, from_pandas=True)
    pq.write_table(pa.table(columns, schema=schema), path)
    return path


def write_csv(frame, path, described=None):
    frame.drop(columns="state_message").to_csv(path, index=False)
    Path(f"{path}.json").write_text((described or metadata()).to_json(), "utf-8")
    return path


@pytest.fixture(scope="session")
def invented():
    """The functions above, for tests that make their own records."""
    return SimpleNamespace(**{k: v for k, v in globals().items() if not k.startswith("__")})


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """A directory of ten runs."""
    directory = tmp_path_factory.mktemp("recordings")
    for run in range(10):
        frame = records_frame(1500, seed=run, run=f"run-{run}")
        write_parquet(frame, directory / f"run-{run}.parquet")
    return directory


@pytest.fixture(scope="session")
def bundle(recordings):
    """A small bundle trained on them."""
    return train(read_records([recordings]), QUICK)
