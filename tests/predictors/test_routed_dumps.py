"""Dumps of SGLang's expert-distribution recorder.

The samples are real files of torch.save in the recorder's schema (tests/data/README.md). What
they lack is written here in the same format, without torch.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from predictors.active_experts import selection_probabilities
from predictors.cli import main
from predictors.errors import PredictorsError
from predictors.sglang_dumps import PassCounts, TokenRoutings, read_dumps
from predictors.sglang_pickle import load

SAMPLES = Path(__file__).parent.parent / "data" / "written" / "sglang_experts"


def samples(mode):
    return sorted((SAMPLES / mode).glob("*.pt"))


def named(name, module):
    return type(name, (), {"__module__": module})


STORAGES = {"int32": named("IntStorage", "torch"), "int64": named("LongStorage", "torch")}
FLOATS = named("FloatStorage", "torch")
REBUILD = named("_rebuild_tensor_v2", "torch._utils")


class Saver(pickle.Pickler):
    """Pickles arrays as torch pickles tensors."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages = []

    def persistent_id(self, value):
        if not isinstance(value, memoryview):
            return None
        self.storages.append(value)
        kind = STORAGES.get(np.asarray(value).dtype.name, FLOATS)
        return ("storage", kind, str(len(self.storages) - 1), "cuda:0", len(value))

    def reducer_override(self, value):
        if not isinstance(value, np.ndarray):
            return NotImplemented
        strides = tuple(step // value.itemsize for step in value.strides)
        return REBUILD, (memoryview(value.ravel("K")), 0, value.shape, strides, False, {})


def save(path, document, compression=zipfile.ZIP_STORED):
    """What torch.save(document, path) writes, for arrays instead of tensors."""
    torch = types.ModuleType("torch")
    utils = types.ModuleType("torch._utils")
    for name in (*STORAGES.values(), FLOATS):
        setattr(torch, name.__name__, name)
    utils._rebuild_tensor_v2 = REBUILD
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}),
        zipfile.ZipFile(path, "w", compression) as archive,
    ):
        with archive.open("archive/data.pkl", "w") as file:
            saver = Saver(file)
            saver.dump(document)
        archive.writestr("archive/byteorder", "little")
        for index, storage in enumerate(saver.storages):
            archive.writestr(f"archive/data/{index}", bytes(storage))
    return path


def stat(counts):
    return {"rank": 0, "logical_count": np.array(counts, dtype=np.int32)}


def records(key, figures, *, rank=0, experts=4):
    """One record for each pass; each expert has one slot."""
    return {
        "records": [
            {
                "forward_pass_id": index,
                "rank": rank,
                "gatherer_key": "primary",
                key: np.array(figure, dtype=np.int32),
            }
            for index, figure in enumerate(figures)
        ],
        "last_physical_to_logical_map": np.arange(experts).reshape(1, experts),
    }


def counts(*figures, **keywords):
    return records("global_physical_count", [[figure] for figure in figures], **keywords)


def ids(*figures, **keywords):
    return records("topk_ids_of_layer", [[figure] for figure in figures], **keywords)


def run(tmp_path, files, *options):
    out = tmp_path / "table.json"
    status = main(["experts", *map(str, files), *options, "--json", str(out)])
    return status, json.loads(out.read_text()) if out.exists() else None


# samples written by torch


def test_each_mode_tells_the_experts_of_the_same_passes():
    of_stat, of_passes = read_dumps(samples("stat")), read_dumps(samples("per_pass"))
    of_tokens = read_dumps(samples("per_token"))
    assert isinstance(of_tokens, TokenRoutings)
    assert of_stat.counts.tolist() == of_passes.counts.tolist()
    assert of_tokens.routings.shape == (30, 3, 2)
    taken = [np.bincount(of_tokens.routings[:, layer].ravel(), minlength=16) for layer in range(3)]
    assert np.array(taken).tolist() == of_passes.counts[:5].sum(axis=0)[1:].tolist()


def test_copies_of_an_expert_count_as_that_expert():
    assert read_dumps(samples("per_pass")).experts_count == 16
    recorded = read_dumps(samples("per_token"))
    assert recorded.experts_count == 16
    assert recorded.routings.max() == 15


def test_unused_entries_of_the_buffer_and_layers_without_a_router_are_left_out(tmp_path):
    assert len(load(samples("stat")[0])["logical_count"]) == 12
    status, table = run(tmp_path, samples("stat"), "--experts-per-token", "2")
    assert status == 0
    assert table["layers_count"] == 3
    assert table["sampled_tokens_count"] == 13 + 1 + 4 + 4 + 8 + 16 + 16 + 16 + 2 + 5


def test_passes_stand_by_size_beside_the_uniform_router(tmp_path, capsys):
    _, table = run(tmp_path, samples("per_pass"), "--experts-per-token", "2")
    assert table["tokens_count"] == [1, 2, 4, 10, 16]  # 4, 4, 5 in one row; 8 and 13 in one
    assert table["mean_active_experts_count"][0] == 2.0
    assert (
        np.array(table["mean_active_experts_count"][2:]) < table["uniform_active_experts_count"][2:]
    ).all()
    assert 0.4 <= table["skew_exponent"] <= 1.2
    assert "active" in capsys.readouterr().out


def test_tokens_make_the_table_that_arrays_of_vllm_make(tmp_path):
    _, table = run(tmp_path, samples("per_token"))
    np.save(tmp_path / "same.npy", read_dumps(samples("per_token")).routings)
    assert run(tmp_path, [tmp_path / "same.npy"], "--experts", "16")[1] == table


def test_ranks_that_counted_the_same_tokens_count_once(tmp_path, capsys):
    run(tmp_path, samples("stat"), "--experts-per-token", "2")
    assert "2 counted the same tokens" in capsys.readouterr().out
    one, both = read_dumps(samples("per_token")[:1]), read_dumps(samples("per_token"))
    assert one.routings.tolist() == both.routings.tolist()


# further dumps


def test_a_skew_is_found_again_from_passes(tmp_path):
    draw = np.random.default_rng(3)
    chosen = selection_probabilities(32, 4, 0.8)
    passes = []
    for tokens in np.tile([1, 2, 3, 5, 8, 16, 24, 32], 20):
        keys = np.log(draw.random((tokens, 32))) / chosen
        taken = np.argsort(-keys, axis=1)[:, :4]
        passes.append([np.bincount(taken.ravel(), minlength=32)])
    path = save(tmp_path / "stat.pt", stat(passes))
    _, table = run(tmp_path, [path], "--experts-per-token", "4")
    assert 0.4 <= table["skew_exponent"] <= 1.2


def test_ranks_with_tokens_of_their_own_add_up(tmp_path):
    first = save(tmp_path / "0.pt", counts([1, 1, 0, 0], [2, 1, 1, 0]))
    second = save(tmp_path / "1.pt", counts([0, 1, 1, 0], [0, 0, 1, 1], rank=1))
    recorded = read_dumps([first, second])
    assert recorded.counts.tolist() == [[[1, 2, 1, 0]], [[2, 1, 2, 1]]]


def test_passes_that_only_some_ranks_told_are_left_out(tmp_path):
    first = save(tmp_path / "0.pt", counts([1, 1, 0, 0], [2, 2, 0, 0]))
    second = save(tmp_path / "1.pt", counts([0, 1, 1, 0], rank=1))
    assert read_dumps([first, second]).counts.tolist() == [[[1, 2, 1, 0]]]


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_of_tensor_parallelism_count_once_whatever_rank_they_write(tmp_path, rank):
    first = save(tmp_path / "0.pt", counts([1, 1, 0, 0], [2, 2, 0, 0]))
    second = save(tmp_path / "1.pt", counts([1, 1, 0, 0], [2, 2, 0, 0], rank=rank))
    assert read_dumps([first, second]).counts.tolist() == [[[1, 1, 0, 0]], [[2, 2, 0, 0]]]


def test_a_tie_that_one_rank_breaks_otherwise_makes_no_second_set_of_tokens(tmp_path):
    first = save(tmp_path / "0.pt", counts([200, 200, 100, 100]))
    second = save(tmp_path / "1.pt", counts([200, 200, 101, 99], rank=1))
    assert read_dumps([first, second]).counts.tolist() == [[[200, 200, 100, 100]]]


def test_one_summed_dump_that_two_processes_wrote_counts_once(tmp_path):
    paths = [save(tmp_path / f"{index}.pt", stat([[[1, 1, 0, 2]]])) for index in (0, 1)]
    other = save(tmp_path / "2.pt", stat([[[0, 1, 1, 0]]]))
    assert read_dumps([*paths, other]).counts.tolist() == [[[1, 1, 0, 2]], [[0, 1, 1, 0]]]


def test_tokens_that_fill_up_a_batch_are_left_out(tmp_path):
    path = save(tmp_path / "0.pt", ids([[3, 1, -1], [-1, -1, -1]], [[0, 2, -1]]))
    recorded = read_dumps([path])
    assert recorded.routings.tolist() == [[[1, 3]], [[0, 2]]]
    assert recorded.experts_count == 4


def test_a_rank_without_passes_is_left_out(tmp_path):
    idle = save(tmp_path / "1.pt", counts(rank=1))
    path = save(tmp_path / "0.pt", counts([1, 1, 0, 0]))
    assert read_dumps([idle, path]).counts.tolist() == [[[1, 1, 0, 0]]]


@pytest.mark.parametrize(
    ("documents", "what"),
    [
        ([[]], "holds no dict"),
        ([{"layers": 3}], "has keys ['layers']"),
        ([{"records": []}], "has keys ['records']"),
        ([counts()], "holds no pass"),
        ([{"logical_count": [1]}], "no tensor logical_count"),
        ([stat([[1, 2]])], "shape (1, 2)"),
        ([stat([[[1, -1]]])], "least value of -1"),
        ([stat([[[0, 0]]])], "zero throughout"),
        ([stat([[[128, 256]]])], "multiple of 128"),
        ([stat([[[1, 2]]]), stat([[[1, 2, 3]]])], "(1, 3)"),
        ([stat([[[1, 2]]]), stat([[[2, 2]]])], "multiples of [1, 2]"),
        ([stat([[[1, 1]]]), counts([1, 1, 0, 0])], "per_pass and stat"),
        ([counts([0, 0, 0, 0])], "zero in every pass"),
        ([counts([1, 1, 0])], "(1, 3)"),
        ([counts([1, 1, 0, 0]), counts([2, 1, 1, 0])], "disagree about pass 0"),
        ([counts([1, 1, 0, 0]), counts([1, 0, 0], experts=3)], "(1, 3, 3)"),
        ([counts([1]) | {"last_physical_to_logical_map": np.array([[1 << 60]])}], "1, 1, 1152"),
        ([ids([[0, 1], [2, -1]])], "took [1, 2] experts"),
        ([ids([[-1, -1]])], "no token"),
        ([ids([[0, 1]]), ids([[0, 1, 2]], rank=1)], "[2, 3] wide"),
        ([ids([[0, 4]])], "--disable-shared-experts-fusion"),
        ([ids([[2, 2]])], "one expert twice"),
        ([{"records": [3], "last_physical_to_logical_map": 1}], "last_physical_to_logical_map"),
        ([counts([1, 1, 0, 0]) | {"records": [3]}], "is no dict"),
        ([counts([1, 1, 0, 0]) | {"records": [{"rank": "0"}]}], "rank '0'"),
    ],
)
def test_what_is_no_dump_of_one_recording_is_refused_by_name(tmp_path, documents, what):
    paths = [save(tmp_path / f"{index}.pt", each) for index, each in enumerate(documents)]
    with pytest.raises(PredictorsError) as error:
        read_dumps(paths)
    assert what in str(error.value)
    assert any(word in str(error.value) for word in ("allowed", "send requests"))


@pytest.mark.parametrize(
    ("mode", "options", "what"),
    [
        ("stat", (), "--experts-per-token is missing"),
        ("per_pass", ("--experts-per-token", "0"), "allowed: 1 to 16"),
        ("per_pass", ("--experts-per-token", "17"), "allowed: 1 to 16"),
        ("per_pass", ("--experts-per-token", "4"), "--experts-per-token is 4"),
        ("per_pass", ("--experts-per-token", "2", "--experts", "18"), "allow only 16"),
        ("per_token", ("--experts", "8"), "allow only 16"),
        ("per_token", ("--experts-per-token", "8"), "allow only 2"),
    ],
)
def test_options_that_the_files_contradict_are_refused(tmp_path, mode, options, what, capsys):
    assert run(tmp_path, samples(mode), *options) == (1, None)
    assert what in capsys.readouterr().err


def test_an_expert_counted_more_often_than_there_are_tokens_is_refused(tmp_path, capsys):
    path = save(tmp_path / "stat.pt", stat([[[3, 1, 0, 0]]]))
    assert run(tmp_path, [path], "--experts-per-token", "2") == (1, None)
    assert "allowed" in capsys.readouterr().err


def test_dumps_and_numpy_files_are_not_mixed(tmp_path, capsys):
    np.save(tmp_path / "routed.npy", np.zeros((3, 2, 2), dtype=int))
    files = [tmp_path / "routed.npy", *samples("per_token")]
    assert run(tmp_path, files, "--experts", "16") == (1, None)
    assert "2 of 3 files are .pt" in capsys.readouterr().err


# the file format


def test_tensors_keep_shape_strides_and_values(tmp_path):
    array = np.arange(24, dtype=np.int32).reshape(4, 6).T
    back = load(save(tmp_path / "a.pt", {"array": array}))["array"]
    assert back.tolist() == array.tolist()
    assert not back.flags.writeable


class Runs:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_a_pickle_that_runs_a_command_is_refused_before_it_does(tmp_path, capsys):
    mark = tmp_path / "ran"
    document = stat([[[1, 1]]]) | {"rank": Runs(os.system, f"touch {mark}")}
    path = save(tmp_path / "hostile.pt", document)
    assert run(tmp_path, [path], "--experts-per-token", "2") == (1, None)
    assert "system" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        Runs(eval, "1"),
        Runs(getattr, 1, "real"),
        np.dtype("i4"),
        Path("x"),
        np.array([0.5], dtype=np.float32),
        REBUILD,
    ],
    ids=["eval", "getattr", "dtype", "path", "floats", "name"],
)
def test_anything_but_integers_text_and_containers_is_refused(tmp_path, value):
    path = save(tmp_path / "hostile.pt", {"logical_count": value})
    with pytest.raises(PredictorsError):
        read_dumps([path])


@pytest.mark.parametrize(
    "view",
    [
        (0, (4,), (2,)),
        (3, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (1 << 40,), (0,)),
        (0, (2, 2), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, view):
    storage = memoryview(np.arange(4))
    path = save(tmp_path / "hostile.pt", {"logical_count": Runs(REBUILD, storage, *view)})
    with pytest.raises(PredictorsError, match=r"has offset|does not fit|zip\(\)"):
        load(path)


def test_a_tensor_of_a_tensor_is_refused(tmp_path):
    inner = Runs(REBUILD, memoryview(np.arange(4)), 3, (4,), (0,))
    path = save(tmp_path / "hostile.pt", {"logical_count": Runs(REBUILD, inner, 0, (4,), (1,))})
    with pytest.raises(PredictorsError, match="tensor of a tensor"):
        load(path)


def test_what_was_written_before_torch_used_zip_files_is_refused(tmp_path):
    path = tmp_path / "old.pt"
    path.write_bytes(pickle.dumps(stat([[[1, 1]]])))
    with pytest.raises(PredictorsError, match="zip"):
        load(path)


def test_compressed_entries_are_refused(tmp_path):
    with pytest.raises(PredictorsError, match="compressed"):
        load(save(tmp_path / "bomb.pt", stat([[[1, 1]]]), zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, share):
    whole = samples("per_pass")[0].read_bytes()
    path = tmp_path / "short.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(PredictorsError, match="complete"):
        load(path)


def test_flipped_bytes_are_refused_or_change_figures_only(tmp_path):
    whole = samples("stat")[0].read_bytes()
    draw = np.random.default_rng(1)
    path = tmp_path / "flipped.pt"
    for place in draw.choice(len(whole), 200, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 0x41
        path.write_bytes(damaged)
        try:
            recorded = read_dumps([path])
        except PredictorsError:
            continue
        assert isinstance(recorded, PassCounts)


def test_a_missing_file_is_reported_in_one_line(tmp_path, capsys):
    assert run(tmp_path, [tmp_path / "none.pt"], "--experts-per-token", "2") == (1, None)
    assert "No such file" in capsys.readouterr().err
