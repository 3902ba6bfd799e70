from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from throttle.errors import InvalidInputError
from throttle.simulation import equations
from throttle.simulation.calibration import gpu_parameters
from throttle.simulation.operator_tables import (
    KINDS,
    OperatorTable,
    Row,
    Surface,
    along_axis,
    axis_factors,
    balanced_load,
    grid_features,
    krige,
    load_table,
    moe_features,
    read_table,
    surface,
)
from throttle.simulation.operators import IterationWork
from throttle.simulation.plant import plant_for

#: Measured H200 kernels in ms, evenly dealt tokens (NVIDIA aiconfigurator): format, hidden, width,
#: experts, per token, expert ranks, time at 128, 512 and 2048 tokens.
MEASURED = [
    ("bf16", 4096, 14336, 8, 2, 1, (0.691, 0.818, 2.43)),
    ("bf16", 2048, 768, 128, 8, 1, (0.306, 0.344, 0.497)),
    ("fp8_block", 4096, 1536, 128, 8, 1, (0.714, 0.792, 1.49)),
    ("fp8_block", 4096, 1536, 128, 8, 8, (0.140, 0.194, 0.428)),
    ("fp8_block", 7168, 2048, 256, 8, 1, (3.071, 3.256, 4.05)),
    ("fp8_block", 7168, 2048, 256, 8, 8, (0.434, 0.509, 0.831)),
]


@pytest.mark.parametrize("measured", MEASURED)
def test_measured_moe_shapes_return_the_measured_time(measured):
    dtype, hidden, width, experts, k, ranks, times = measured
    gpu = gpu_parameters("h200-sxm")
    shape, tokens = (hidden, width, experts, k, ranks), np.array([128.0, 512.0, 2048.0])
    active, pairs = balanced_load(shape, tokens)
    peak = gpu.compute.bf16_flops_per_second * (1 if dtype == "bf16" else 2.001)
    bandwidth = gpu.memory.bandwidth_bytes_per_second
    wide = 2.0 if dtype == "bf16" else 1.0
    parts = equations.moe(
        gpu.moe[dtype], float(hidden), float(width), wide, tokens, active, pairs, peak, bandwidth
    )
    factors = axis_factors("h200-sxm", "moe", (dtype,), shape, tokens)
    full_clock = parts.seconds(np.ones(3), np.ones(3), np.ones(3)) * factors * 1e3
    # Heavy kernels ran below the maximum clock under the power cap; none beats its full-clock time.
    assert full_clock[0] == pytest.approx(times[0], rel=0.03)
    assert (full_clock < 1.02 * np.array(times)).all()
    assert (full_clock > 0.70 * np.array(times)).all()


def test_tables_survive_writing_and_reading(tmp_path):
    kind = KINDS["gemm"]
    rows = [
        Row(("bf16",), (1024.0, 2048.0), np.array([1.0, 4.0, 16.0]), np.array([0.1, -0.2, 0.0])),
        Row(("fp8",), (512.0, 2048.0), np.array([4.0, 64.0]), np.array([0.011, 1.5])),
    ]
    path = tmp_path / "gemm.csv"
    OperatorTable(kind, rows).write(path)
    table = read_table(path, kind)
    for row in rows:
        found = table.row(row.formats, row.shape)
        assert found is not None
        assert found.axis.tolist() == row.axis.tolist()
        assert found.values.tolist() == pytest.approx(row.values.tolist())
    assert table.row(("bf16",), (1.0, 2.0)) is None
    path.write_text("other,header\n")
    with pytest.raises(InvalidInputError, match="weight_dtype"):
        read_table(path, kind)


def test_corrections_are_interpolated_near_known_shapes_and_fade_far_from_them():
    kind = KINDS["gemm"]
    known = np.concatenate([grid_features((n, 2048), np.array([1.0, 8.0])) for n in (1024, 4096)])
    values = np.array([0.2, 0.2, 0.4, 0.4])
    between = krige(known, values, grid_features((2048, 2048), np.array([4.0])), kind)
    far = krige(known, values, grid_features((2.0**40, 2048), np.array([4.0])), kind)
    assert 0.15 < between[0] < 0.4
    assert abs(far[0]) < 1e-3


@given(st.floats(-3, 20), st.floats(-3, 20))
def test_surfaces_stay_within_their_corners(first, second):
    corrections = np.array([[0.0, 0.1, 0.2], [0.3, -0.4, 0.5]])
    factor = Surface(corrections).at(first, second)
    assert np.exp(-0.4) - 1e-12 <= factor <= np.exp(0.5) + 1e-12


def test_surfaces_return_the_measured_points():
    table = load_table("h200-sxm", "decode")
    row = table.row(("bf16",), (32, 4, 128, 16))
    found = surface("h200-sxm", "decode", ("bf16",), (32.0, 4.0, 128.0), 12, 18)
    for context, value in zip(row.axis, row.values, strict=True):
        assert found.at(4.0, np.log2(context)) == pytest.approx(np.exp(value))


def test_unmeasured_head_counts_are_interpolated():
    found = surface("h200-sxm", "decode", ("bf16",), (48.0, 4.0, 128.0), 12, 18)
    lower = surface("h200-sxm", "decode", ("bf16",), (32.0, 4.0, 128.0), 12, 18)
    upper = surface("h200-sxm", "decode", ("bf16",), (64.0, 4.0, 128.0), 12, 18)
    points = [(b, c) for b in range(0, 8, 2) for c in range(6, 13, 2)]
    for point in points:
        near = sorted((lower.at(*point), upper.at(*point)))
        assert 0.8 * near[0] < found.at(*point) < 1.25 * near[1]


def test_gpus_without_tables_use_the_equations_alone():
    assert load_table("b200", "moe") is None
    points = np.array([1.0, 100.0])
    assert axis_factors("b200", "moe", ("bf16",), (1, 1, 1, 1, 1), points).tolist() == [1.0, 1.0]


def test_rows_are_read_between_their_points_and_held_beyond_them():
    row = Row((), (1.0,), np.array([4.0, 16.0]), np.array([0.0, 1.0]))
    assert along_axis(row, np.array([1.0, 4.0, 8.0, 16.0, 99.0])).tolist() == [0, 0, 0.5, 1, 1]


def test_moe_features_have_one_column_per_length():
    tokens = np.array([1.0, 64.0])
    features = moe_features((2048, 768, 128, 8, 1), tokens, tokens, tokens)
    assert features.shape == (2, len(KINDS["moe"].lengths))


def test_a_demand_grows_linearly_beyond_the_token_limit():
    plant = plant_for("h200-sxm", "llama-3.1-8b", overrides={"engine.batched_tokens_limit": 1024})
    wide = plant_for("h200-sxm", "llama-3.1-8b", overrides={"engine.batched_tokens_limit": 4096})
    work = IterationWork(((4096, 0),))
    costs = [p.iteration(work, 1200).latency_seconds for p in (plant, wide)]
    assert costs[0] == pytest.approx(costs[1], rel=0.15)


@settings(max_examples=6, deadline=None)
@given(batch=st.integers(8, 512), ranks=st.sampled_from([1, 2, 4, 8]))
def test_splitting_a_layer_over_more_gpus_never_costs_memory(batch, ranks):
    whole = plant_for("h200-sxm", "qwen3-235b-a22b", "fp8_block", "", 8, 8)
    split = plant_for("h200-sxm", "qwen3-235b-a22b", "fp8_block", "", ranks, 8)
    assert split._operators.weight_bytes >= whole._operators.weight_bytes
    work = IterationWork((), batch, batch * 700)
    assert split._operators.demand(work).traffic_bytes > 0
