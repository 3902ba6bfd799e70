from __future__ import annotations

import json

import numpy as np
import pytest

from predictors.active_experts import expected_active_experts, selection_probabilities
from predictors.cli import main


def routings(tokens, layers, experts, per_token, *, skew=0.0, seed=1):
    """Each token takes `per_token` different experts of each layer, by popularity."""
    draw = np.random.default_rng(seed)
    chosen = selection_probabilities(experts, per_token, skew)
    # the popular ones of each layer are others
    keys = np.log(draw.random((tokens, layers, experts))) / chosen
    order = np.argsort(-keys, axis=2)[:, :, :per_token]
    shuffle = np.stack([draw.permutation(experts) for _ in range(layers)])
    return np.take_along_axis(np.broadcast_to(shuffle, (tokens, layers, experts)), order, axis=2)


def run(tmp_path, arrays, experts):
    files = []
    for index, array in enumerate(arrays):
        files.append(tmp_path / f"{index}.npy")
        np.save(files[-1], array)
    out = tmp_path / "table.json"
    status = main(["experts", *map(str, files), "--experts", str(experts), "--json", str(out)])
    return status, json.loads(out.read_text()) if out.exists() else None


def test_a_uniform_router_gives_the_formula(tmp_path, capsys):
    arrays = [routings(300, 4, 32, 4, seed=seed) for seed in (1, 2)]
    status, table = run(tmp_path, arrays, 32)
    assert status == 0
    assert table["sampled_tokens_count"] == 600
    tokens = np.array(table["tokens_count"], dtype=float)
    assert table["tokens_count"] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert table["mean_active_experts_count"] == pytest.approx(
        expected_active_experts(tokens, 32, 4), rel=0.02
    )
    assert table["skew_exponent"] <= 0.1
    assert "active" in capsys.readouterr().out


def test_a_skewed_router_reads_fewer_experts_and_its_skew_is_found(tmp_path):
    _, table = run(tmp_path, [routings(600, 4, 32, 4, skew=0.8)], 32)
    middle = table["tokens_count"].index(16)
    assert table["mean_active_experts_count"][middle] < (
        0.95 * table["uniform_active_experts_count"][middle]
    )
    assert 0.4 <= table["skew_exponent"] <= 1.2


def test_one_token_takes_its_own_experts_only(tmp_path):
    _, table = run(tmp_path, [routings(8, 2, 16, 3)], 16)
    assert table["mean_active_experts_count"][0] == 3.0


@pytest.mark.parametrize(
    ("arrays", "experts"),
    [
        ([np.zeros((3, 2))], 8),
        ([np.zeros((3, 2, 2))], 8),
        ([np.full((3, 2, 2), -1)], 8),
        ([np.full((3, 2, 2), 9)], 8),
        ([np.zeros((0, 2, 2), dtype=int)], 8),
        ([np.zeros((3, 2, 2), dtype=int), np.zeros((3, 4, 2), dtype=int)], 8),
    ],
)
def test_what_is_no_routing_is_refused_in_one_line(tmp_path, arrays, experts, capsys):
    assert run(tmp_path, arrays, experts) == (1, None)
    assert "allowed" in capsys.readouterr().err


def test_numpy_files_need_the_number_of_experts(tmp_path, capsys):
    np.save(tmp_path / "0.npy", np.zeros((3, 2, 2), dtype=int))
    assert main(["experts", str(tmp_path / "0.npy")]) == 1
    assert "--experts is missing" in capsys.readouterr().err


def test_experts_per_token_may_be_given_but_not_otherwise_than_recorded(tmp_path, capsys):
    np.save(tmp_path / "0.npy", routings(8, 2, 16, 3))
    files = ["experts", str(tmp_path / "0.npy"), "--experts", "16", "--experts-per-token"]
    assert main([*files, "3"]) == 0
    assert main([*files, "4"]) == 1
    assert "allow only 3" in capsys.readouterr().err
