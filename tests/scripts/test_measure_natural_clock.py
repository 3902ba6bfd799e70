"""The measuring script as far as it goes without a GPU, and what it must never do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from scripts.measure_natural_clock.records import (
    METADATA_KEY,
    Row,
    merge_parts,
    probe_clock_mhz,
    sources_hash,
    write_part,
)
from scripts.measure_natural_clock.routing import draw_choices, lay_out
from throttle.errors import InvalidInputError, NotFoundError
from throttle.simulation.clock_records import read_clock_records
from throttle.simulation.natural_clock import fit_natural_clocks

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = sorted((ROOT / "scripts" / "measure_natural_clock").glob("*.py"))
GAP_SECONDS = 1.5e-6


def kernel_row(workload, kind, clock, seconds, *, mode="ramp"):
    return Row(
        record="kernel",
        workload=workload,
        kind=kind,
        backend="triton-grouped",
        boost="disabled",
        mode=mode,
        idle_seconds=1.0,
        repeat=0,
        position=0,
        clock_mhz=clock,
        seconds=seconds,
    )


def measured_rows(seed):
    """What a GPU with G = 0.6 and no memory-bound kernels would leave."""
    generator = np.random.default_rng(seed)
    rows = []
    for clock in generator.uniform(345, 1980, 600):
        x, noise = clock / 1980, generator.lognormal(0, 0.02)
        rows += [
            kernel_row("gap", "gap", clock, GAP_SECONDS),
            kernel_row("small", "fixed", clock, GAP_SECONDS + 40e-6 * (0.4 + 0.6 / x) * noise),
            kernel_row("gemm", "gemm", clock, GAP_SECONDS + 900e-6 / x * noise),
        ]
    rows.append(
        Row(
            record="power",
            workload="gemm",
            kind="gemm",
            backend="cublas",
            boost="default",
            mode="steady",
            idle_seconds=0.0,
            repeat=0,
            position=0,
            clock_mhz=1650.0,
            seconds=2.0,
            kernels_count=2000,
            energy_joules=1380.0,
            temperature_celsius=55.0,
        )
    )
    return rows


@pytest.fixture
def measurement(tmp_path):
    parts = []
    for seed, boost in enumerate(("disabled", "default")):
        parts.append(tmp_path / f"{boost}.parquet")
        write_part(parts[-1], measured_rows(seed), {"boost": boost, "dropped_count": 3})
    path = tmp_path / "measurement.parquet"
    described = {"gpu_name": "NVIDIA H200", "driver_version": "1", "maximum_clock_mhz": 1980}
    merge_parts(path, parts, {**described, "sources_sha256": sources_hash()})
    return path


def test_both_passes_and_their_provenance_are_in_one_file(measurement):
    table = pq.read_table(measurement)
    described = json.loads(table.schema.metadata[METADATA_KEY])
    assert described["provenance"] == "measured"
    assert described["gpu_name"] == "NVIDIA H200"
    assert [each["boost"] for each in described["passes"]] == ["disabled", "default"]
    assert len(described["sources_sha256"]) == len(described["rows_sha256"]) == 64
    assert table.num_rows == 2 * (3 * 600 + 1)
    assert not {"date", "time", "uuid", "host"} & {name.lower() for name in described}


def test_the_hash_depends_on_the_rows_alone(tmp_path):
    rows = measured_rows(1)
    hashes = []
    for name, given in (("a", rows), ("b", rows), ("c", rows[:-1])):
        path = tmp_path / f"{name}.parquet"
        write_part(path, given, {"boost": name})
        described = json.loads(pq.read_table(path).schema.metadata[METADATA_KEY])
        hashes.append(described["rows_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_what_was_written_can_be_fitted(measurement):
    records = read_clock_records(measurement)
    fit = fit_natural_clocks(records.kernels, records.maximum_clock_mhz)
    by_name = {each.name: each for each in fit.kernels}
    assert by_name.keys() == {"small", "gemm"}
    assert fit.fixed_clock_sensitivity.value == pytest.approx(0.6, abs=0.03)
    assert by_name["gemm"].compute_share.value == pytest.approx(1.0, abs=0.05)
    assert by_name["small"].seconds == pytest.approx(40e-6, rel=0.02)  # the gap is taken off
    assert records.steady[0].power_watts == 690.0


def test_a_fit_can_be_printed_and_kept(measurement, tmp_path):
    kept = tmp_path / "fit.json"
    command = [
        sys.executable,
        "scripts/fit_natural_clock.py",
        str(measurement),
        "--json",
        str(kept),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "fixed-cost sensitivity G: 0.6" in done.stdout
    assert json.loads(kept.read_text())["fit"]["fixed_clock_sensitivity"]["identified"] is True


def test_other_files_are_refused_by_name(tmp_path):
    with pytest.raises(NotFoundError, match=r"nothing\.parquet"):
        read_clock_records(tmp_path / "nothing.parquet")
    text = tmp_path / "text.parquet"
    text.write_text("no")
    with pytest.raises(InvalidInputError, match="a Parquet file"):
        read_clock_records(text)


def test_a_clock_that_changed_between_its_probes_counts_for_nothing():
    assert probe_clock_mhz(1000.0, 1010.0) == 1005.0
    assert probe_clock_mhz(345.0, 1980.0) is None


@pytest.mark.parametrize(("tokens", "block"), [(1, 16), (37, 16), (300, 64)])
def test_blocks_hold_every_pair_once_and_one_expert_each(tokens, block):
    choices = draw_choices(tokens, 32, 4, seed=5)
    assert all(len(set(row)) == 4 for row in choices.tolist())
    layout = lay_out(choices, block)
    pairs = layout.pair_of_row[layout.pair_of_row < choices.size]
    assert sorted(pairs.tolist()) == list(range(choices.size))
    assert len(layout.pair_of_row) == block * len(layout.expert_of_block)
    flat = choices.reshape(-1)
    for index, expert in enumerate(layout.expert_of_block.tolist()):
        inside = layout.pair_of_row[index * block : (index + 1) * block]
        assert all(flat[pair] == expert for pair in inside[inside < choices.size])
    assert layout.active_experts_count == len(np.unique(flat))


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    out = tmp_path / "measurement.parquet"
    command = [sys.executable, "-m", "scripts.measure_natural_clock", "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    if done.returncode == 0:
        pytest.skip("there is a GPU here")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("nothing measured: ")
    assert not out.exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_it_calls_nothing_that_changes_a_gpu(path):
    words = {
        node.attr if isinstance(node, ast.Attribute) else str(node.value)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.Constant)
    }
    asked = {word for word in words if word.startswith("nvml")}
    for word in asked:
        assert word.startswith(("nvmlInit", "nvmlDeviceGet", "nvmlSystemGet")), word
    programs = ("nvidia-smi", "dcgmi", "nvidia-settings")
    for word in words - {ast.get_docstring(ast.parse(path.read_text()))}:
        if word.split(" ")[0] in programs:
            pytest.fail(f"{path.name} runs {word}")
