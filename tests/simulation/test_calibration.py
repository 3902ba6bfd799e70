from __future__ import annotations

import argparse
import json

import numpy as np
import pandas as pd
import pytest

from throttle.commands import plant_calibrate
from throttle.errors import InvalidInputError, NotFoundError
from throttle.simulation.calibration import (
    OperatorError,
    derive,
    gpu_parameters,
    operator_error,
    verdicts,
)
from throttle.simulation.fitting import clock_ratios, computed_seconds, fit_constants, least_squares
from throttle.simulation.measured import read_benchmarks
from throttle.simulation.measured_moe import moe_rows

GPU = "h200-sxm"
GPU_COLUMN = "h200_sxm"
MODELS = (
    ("a", 4096, 14336, 8, 2), ("b", 2048, 768, 128, 8), ("c", 4096, 1536, 128, 8),
    ("d", 5120, 8192, 16, 1),
)  # fmt: skip
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


def write(folder, name, rows):
    pd.DataFrame(rows).assign(gpu=GPU_COLUMN).to_csv(folder / name, index=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of kernels whose times follow the shipped equations at the clock that they had."""
    folder = tmp_path_factory.mktemp("measured")
    moe = [
        {
            "model": model, "moe_dtype": "bfloat16", "src": "vllm/0.22.0", "num_tokens": tokens,
            "hidden_size": hidden, "inter_size": width, "topk": k, "num_experts": experts,
            "moe_tp_size": 1, "moe_ep_size": ranks, "distribution": distribution, "latency_ms": 1.0,
        }
        for model, hidden, width, experts, k in MODELS
        for ranks in (1, 4)
        for tokens in TOKENS
        for distribution in ("balanced", "power_law_1.01", "power_law_1.2")
    ]  # fmt: skip
    gemm = [
        {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency_ms": 1.0}
        for m in TOKENS
        for n in (1024, 4096, 8192)
        for k in (2048, 8192)
    ]
    decode, prefill = (
        [
            {
                "batch_size": batch, "isl": 1 if name == "step" else along, "num_heads": heads,
                "num_key_value_heads": kv, "head_dim": 128, "kv_cache_dtype": "bfloat16",
                "step": along - 1 if name == "step" else 0, "latency_ms": 1.0,
            }
            for heads in (16, 32, 64)
            for kv in (4, 8)
            for batch in (1, 16, 64)
            for along in (16, 256, 4096)
        ]
        for name in ("step", "isl")
    )  # fmt: skip
    latent_decode, latent_prefill = (
        [
            {
                "num_heads": heads, "batch_size": batch, "gemm_type": "bfloat16",
                "kv_cache_dtype": "bfloat16", "isl": along, "step": along - 1, "latency_ms": 1.0,
            }
            for heads in (16, 128)
            for batch in (1, 16)
            for along in (16, 256, 4096)
        ]
        for _ in range(2)
    )  # fmt: skip
    reduce = [
        {"num_gpus": 2, "message_size": 2**p, "latency_ms": 1.0, "backend": "vllm_graph"}
        for p in range(10, 24)
    ]
    files = {
        "moe_kernels.csv.gz": moe, "gemm.csv": gemm, "gen_attention.csv.gz": decode,
        "ctx_attention.csv.gz": prefill, "mla_gen_module.csv": latent_decode,
        "mla_ctx_module.csv": latent_prefill, "custom_allreduce.csv": reduce,
    }  # fmt: skip
    for name, rows in files.items():
        write(folder, name, rows)
    _fill_times(folder, files)
    return folder


def _fill_times(folder, files):
    """Replace the placeholder times by those of the equations, benchmark by benchmark."""
    gpu = gpu_parameters(GPU)
    seconds = {}
    for benchmark in read_benchmarks(folder, GPU):
        constants = getattr(gpu, benchmark.section)[benchmark.key]
        ones = np.ones(len(benchmark.seconds))
        seconds[benchmark.section] = computed_seconds(benchmark, constants, gpu, ones)
    sections = ("gemm", "decode_attention", "prefill_attention")
    for name, section in zip(list(files)[1:4], sections, strict=True):
        write(folder, name, pd.DataFrame(files[name]).assign(latency_ms=seconds[section] * 1e3))
    moe = pd.DataFrame(files["moe_kernels.csv.gz"])
    even = moe.distribution == "balanced"
    moe.loc[even, "latency_ms"] = seconds["moe"] * 1e3
    moe.loc[~even, "latency_ms"] = np.repeat(seconds["moe"] * 1e3, 2)
    write(folder, "moe_kernels.csv.gz", moe)
    for name, section in (
        ("mla_gen_module.csv", "latent_decode"), ("mla_ctx_module.csv", "latent_prefill"),
        ("custom_allreduce.csv", "all_reduce"),
    ):  # fmt: skip
        write(folder, name, pd.DataFrame(files[name]).assign(latency_ms=seconds[section] * 1e3))


def benchmark_of(folder, section):
    return next(item for item in read_benchmarks(folder, GPU) if item.section == section)


@pytest.mark.parametrize("section", ["gemm", "decode_attention", "prefill_attention"])
def test_kernels_that_follow_the_equation_are_predicted_when_held_out(folder, section):
    error = operator_error(benchmark_of(folder, section), gpu_parameters(GPU))
    assert error.held_out_error < 0.12
    assert error.in_table_error < 0.001
    assert error.rows_count > 30


def test_whole_models_are_held_out_of_moe(folder):
    error = operator_error(benchmark_of(folder, "moe"), gpu_parameters(GPU))
    assert error.worst_group in {model[0] for model in MODELS}
    assert error.held_out_error < 0.15
    # Only 4 to 512 tokens count: of 8 shapes, the four token counts in that range.
    assert error.rows_count == 8 * 4


def test_fitting_light_kernels_recovers_their_times(folder):
    gpu = gpu_parameters(GPU)
    benchmark = benchmark_of(folder, "decode_attention")
    constants, _ = fit_constants(benchmark, gpu)
    ratios = clock_ratios(benchmark, constants, gpu)
    found = computed_seconds(benchmark, constants, gpu, ratios)
    assert found == pytest.approx(benchmark.seconds, rel=0.02)


def test_derived_tables_hold_every_shape(folder):
    constants, tables = derive(folder, GPU)
    assert set(constants) >= {"moe", "gemm", "decode_attention", "all_reduce", "latent_decode"}
    assert len(tables["moe"].rows) == 8
    assert len(tables["gemm"].rows) == 6
    assert len(tables["decode"].rows) == 18


def test_only_heavy_kernels_run_below_the_maximum_clock(folder):
    benchmark = benchmark_of(folder, "gemm")
    gpu = gpu_parameters(GPU)
    ratios = clock_ratios(benchmark, gpu.gemm["bf16"], gpu)
    assert (ratios[benchmark.axis == 1] == 1.0).all()
    heavy = (benchmark.axis == 4096) & (benchmark.shapes == [8192, 8192]).all(axis=1)
    assert (ratios[heavy] < 1.0).all()


def test_evenly_dealt_tokens_fill_all_experts(folder):
    rows = moe_rows(folder, GPU, "bf16")
    full = rows[(rows.num_tokens * rows.topk >= rows.num_experts) & (rows.moe_ep_size == 1)]
    assert (full.active == full.num_experts).all()
    assert (full.pairs == full.num_tokens * full.topk).all()
    skewed = moe_rows(folder, GPU, "bf16", "power_law_1.2")
    spread = (skewed.moe_ep_size == 4) & (skewed.num_tokens == 1024)
    mean = skewed.num_tokens * skewed.topk / skewed.moe_ep_size
    assert (skewed.pairs[spread] > mean[spread]).all()


def test_a_missing_file_and_a_missing_column_are_named(folder, tmp_path):
    with pytest.raises(NotFoundError, match=r"moe_kernels\.csv\.gz"):
        list(read_benchmarks(tmp_path, GPU))
    table = pd.read_csv(folder / "moe_kernels.csv.gz").drop(columns="latency_ms")
    table.to_csv(tmp_path / "moe_kernels.csv.gz", index=False)
    with pytest.raises(InvalidInputError, match="latency_ms"):
        list(read_benchmarks(tmp_path, GPU))


def test_least_squares_finds_a_minimum_and_keeps_its_bounds():
    x = np.linspace(0, 1, 30)
    target = 2.0 * np.exp(-1.5 * x)
    low, high = np.array([0.0, 0.0]), np.array([5.0, 5.0])
    start = np.array([1.0, 1.0])
    found = least_squares(lambda p: p[0] * np.exp(-p[1] * x) - target, start, low, high, 50)
    assert found == pytest.approx([2.0, 1.5], abs=1e-3)
    bounded = least_squares(
        lambda p: p[0] * np.exp(-p[1] * x) - target, start, low, np.array([1.5, 5.0]), 50
    )
    assert bounded[0] <= 1.5


def test_a_bar_that_is_missed_is_said_to_be():
    error = OperatorError("h200-sxm", "gemm bf16", 9, 0.07, 0.1, 0.05, 0.1, "x", 0.2, 0.0)
    assert [(item.name, item.is_kept) for item in verdicts([error])] == [
        ("gemm bf16, held out", False),
        ("worst in-table error", False),
    ]


def test_the_command_prints_every_table_and_writes_json(folder, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    plant_calibrate.add_parser(parser.add_subparsers())
    file, page = tmp_path / "errors.json", tmp_path / "page.md"
    page.write_text("before\n<!-- calibrate: start -->old<!-- calibrate: end -->\nafter\n")
    options = ["--gpu", GPU, "--json", str(file), "--markdown", str(page)]
    arguments = parser.parse_args(["calibrate", "--measured", str(folder), *options])
    assert arguments.run(arguments) in {0, 1}
    printed = capsys.readouterr().out
    for expected in ("held out", "RTX 5090", "median ms between tokens", "all-reduce x2"):
        assert expected in printed
    document = json.loads(file.read_text())
    assert {"bars", "operators", "skewed_moe", "iterations", "clocks"} <= set(document)
    assert document["iterations_mean_absolute_error"] < 0.10
    renewed = page.read_text()
    assert renewed.startswith("before\n")
    assert renewed.endswith("\nafter\n")
    assert "old" not in renewed.split("| bar |")[0]
    assert "| gemm bf16, held out | h200-sxm | 6.0 % |" in renewed


def test_a_page_without_marks_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(InvalidInputError, match="calibrate: start"):
        plant_calibrate._renew(page, "tables")
    assert page.read_text() == "no marks"
    plant_calibrate._renew(tmp_path / "new.md", "tables")
    assert "tables" in (tmp_path / "new.md").read_text()
