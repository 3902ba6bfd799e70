"""Dumps of SGLang's expert-distribution recorder.

`--expert-distribution-recorder-mode` says what they hold; the files do not name it, but their keys
tell it apart. As of SGLang 0.5.23 (`sglang/srt/eplb/expert_distribution.py`):

- `stat`, `stat_approx`: `logical_count` (passes, layers, logical experts), one entry of a ring
  buffer for each forward pass, summed over all ranks; unused entries are zeros.
- `per_pass`: `records`, one for each pass and rank, with `global_physical_count` (layers, physical
  experts); `last_physical_to_logical_map` (layers, physical experts) says what they are copies of.
- `per_token`: the same with `topk_ids_of_layer` (layers, tokens, 8), physical experts, -1 where a
  layer has no router or a model takes fewer than eight.

Ranks may have counted the same tokens (tensor parallelism) or each its own (all-to-all). Both are
told apart here by the figures themselves, since no file says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from predictors.errors import PredictorsError
from predictors.sglang_pickle import load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

#: Counts rounded up to blocks of so many are DeepEP's, under `stat_approx`.
_BLOCK: Final = 128

#: Ranks that counted the same tokens differ by no more than this share: a tie of two experts may
#: be broken otherwise. Ranks with tokens of their own differ by far more.
_SAME_TOKENS_RATIO: Final = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class PassCounts:
    """How many tokens took each expert, by forward pass (`stat`, `stat_approx`, `per_pass`).

    Attributes:
        counts: (passes, layers, experts), logical experts, each token counted once; passes in which
            nothing was routed are left out.
        repeats_count: Ranks that had counted the same tokens, of a sum that was divided by them.
    """

    counts: NDArray[np.int64]
    repeats_count: int = 1

    @property
    def experts_count(self) -> int:
        """Logical experts of a layer."""
        return int(self.counts.shape[2])


@dataclass(frozen=True, slots=True, eq=False)
class TokenRoutings:
    """Which experts each token took (`per_token`).

    Attributes:
        routings: (tokens, layers, experts per token), logical experts; only layers that have a
            router and tokens that were routed in each of them.
        experts_count: Logical experts of a layer.
    """

    routings: NDArray[np.int64]
    experts_count: int


@dataclass(frozen=True, slots=True, eq=False)
class _Record:
    """One pass as one rank saw it; `figures` are counts (layers, E) or ids (layers, tokens, 8)."""

    pass_key: tuple[str, int]
    rank: int
    figures: NDArray[np.int64]


def read_dumps(paths: list[Path]) -> PassCounts | TokenRoutings:
    """All dumps of one recording (`per_pass`, `per_token`: every rank's), or several (`stat`).

    Args:
        paths: Files that `/dump_expert_distribution_record` left, all of one mode.

    Raises:
        PredictorsError: A file is no such dump, two do not fit together, or nothing was recorded.
        OSError: A file cannot be read.
    """
    modes: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in paths:
        document = load(path)
        if not isinstance(document, dict):
            raise PredictorsError(f"{path} holds no dict; {_allowed()}")
        mode = _mode(path, document)
        if mode:
            modes.setdefault(mode, []).append((path, document))
    if not modes:
        raise PredictorsError(
            f"{paths[0]} holds no pass; send requests between /start_expert_distribution_record "
            "and /dump_expert_distribution_record"
        )
    if len(modes) > 1:
        raise PredictorsError(
            f"the files hold {' and '.join(sorted(modes))}; allowed: dumps of one mode"
        )
    (mode, dumps), *_ = modes.items()
    if mode == "per_token":
        return _routed(dumps)
    return _summed(dumps) if mode == "stat" else _counted(dumps)


def _allowed() -> str:
    return (
        "allowed: a dump of SGLang's expert-distribution recorder, with logical_count or with "
        "records and last_physical_to_logical_map"
    )


def _mode(path: Path, document: dict[str, Any]) -> str:
    """By the keys; empty for a rank that recorded no pass."""
    if "logical_count" in document:
        return "stat"
    records = document.get("records")
    if not isinstance(records, list) or "last_physical_to_logical_map" not in document:
        raise PredictorsError(f"{path} has keys {sorted(map(str, document))}; {_allowed()}")
    if not records:
        return ""
    first = records[0] if isinstance(records[0], dict) else {}
    return "per_token" if "topk_ids_of_layer" in first else "per_pass"


def _array(path: Path, holder: dict[str, Any], key: str, dimensions: int) -> NDArray[np.int64]:
    value = holder.get(key)
    if not isinstance(value, np.ndarray):
        raise PredictorsError(f"{path} has no tensor {key}; {_allowed()}")
    least = -1 if key == "topk_ids_of_layer" else 0
    if value.ndim != dimensions or (value.size and value.min() < least):
        raise PredictorsError(
            f"{key} of {path} has shape {value.shape} and a least value of "
            f"{value.min() if value.size else None}; allowed: {dimensions} dimensions, from {least}"
        )
    return value.astype(np.int64)


def _summed(dumps: list[tuple[Path, dict[str, Any]]]) -> PassCounts:
    """`stat`: each file holds all ranks' passes. With tensor parallelism alone, all write it."""
    kept: list[NDArray[np.int64]] = []
    repeats: set[int] = set()
    for path, document in dumps:
        counts = _array(path, document, "logical_count", 3)
        counts = counts[counts.any(axis=(1, 2))]
        if not len(counts) or any(np.array_equal(counts, other) for other in kept):
            continue
        if kept and counts.shape[1:] != kept[0].shape[1:]:
            raise PredictorsError(
                f"{path} has layers and experts {counts.shape[1:]}; allowed: those of the first "
                f"file, {kept[0].shape[1:]}"
            )
        kept.append(counts)
        repeats.add(_repeats(path, counts))
    if len(repeats) > 1:
        raise PredictorsError(
            f"counts of the files are multiples of {sorted(repeats)}; allowed: dumps of one "
            "server, whose ranks all count alike. Give them one by one"
        )
    if not kept:
        raise PredictorsError(
            f"logical_count of {dumps[0][0]} is zero throughout; send requests between "
            "/start_expert_distribution_record and /dump_expert_distribution_record"
        )
    (divisor,) = repeats
    return PassCounts(np.concatenate(kept) // divisor, divisor)


def _repeats(path: Path, counts: NDArray[np.int64]) -> int:
    """Ranks that counted the same tokens: their sum holds multiples only."""
    divisor = int(np.gcd.reduce(counts, axis=None))
    if divisor % _BLOCK == 0:
        raise PredictorsError(
            f"every count of {path} is a multiple of {divisor}; allowed: counts of tokens. "
            "stat_approx counts blocks where the all-to-all pads to them; record with "
            "--expert-distribution-recorder-mode stat"
        )
    return divisor


def _counted(dumps: list[tuple[Path, dict[str, Any]]]) -> PassCounts:
    """`per_pass`: physical counts become logical ones, then those of a pass's ranks one."""
    ranks = _ranks(list(_records(dumps, "global_physical_count", 2)))
    shared = sorted(set.intersection(*(set(rank) for rank in ranks)))
    if not shared:
        raise PredictorsError(
            f"{dumps[0][0]} and the other files share no pass; allowed: the files of all ranks of "
            "one recording"
        )
    counts = np.stack([np.sum([rank[key] for rank in ranks], axis=0) for key in shared])
    counts = counts[counts.any(axis=(1, 2))]
    if not len(counts):
        raise PredictorsError(
            f"global_physical_count of {dumps[0][0]} is zero in every pass; send requests while "
            "recording"
        )
    return PassCounts(counts)


def _routed(dumps: list[tuple[Path, dict[str, Any]]]) -> TokenRoutings:
    """`per_token`: all tokens of all ranks, without what fills up the tensors."""
    records = list(_records(dumps, "topk_ids_of_layer", 3))
    widths = {record.figures.shape[2] for record in records}
    if len(widths) > 1:
        raise PredictorsError(
            f"topk_ids_of_layer of {dumps[0][0]} and others are {sorted(widths)} wide; allowed: "
            "equally wide ones"
        )
    ranks = _ranks(records)
    ids = np.concatenate([ids for rank in ranks for ids in rank.values()], axis=1)
    ids = np.sort(ids.transpose(1, 0, 2), axis=2)  # -1 comes first
    taken = (ids >= 0).sum(axis=2)
    layers = taken.any(axis=0)
    per_token = int(taken.max(initial=0))
    tokens = (taken[:, layers] == per_token).all(axis=1)
    if not per_token or not tokens.any():
        raise PredictorsError(
            f"no token of {dumps[0][0]} was routed in each of the {layers.sum()} layers that have "
            "a router; allowed: one or more"
        )
    if (taken[taken > 0] != per_token).any():
        raise PredictorsError(
            f"tokens of {dumps[0][0]} took {sorted(set(taken[taken > 0].tolist()))} experts; "
            "allowed: equally many each"
        )
    routings = ids[tokens][:, layers, ids.shape[2] - per_token :]
    if (np.diff(routings, axis=2) == 0).any():
        raise PredictorsError(
            f"a token of {dumps[0][0]} took one expert twice; allowed: different ones. Experts "
            "were placed anew while recording: record without --enable-eplb"
        )
    return TokenRoutings(routings, int(dumps[0][1]["last_physical_to_logical_map"].max()) + 1)


def _records(
    dumps: list[tuple[Path, dict[str, Any]]], key: str, dimensions: int
) -> Iterator[_Record]:
    first: tuple[int, ...] = ()
    for path, document in dumps:
        placed = _array(path, document, "last_physical_to_logical_map", 2)
        sizes = (*placed.shape, int(placed.max(initial=-1)) + 1)
        first = first or sizes
        if sizes != first or not placed.size or sizes[2] > sizes[1]:
            raise PredictorsError(
                f"last_physical_to_logical_map of {path} has layers, physical and logical experts "
                f"{sizes}; allowed: {first}, as in the first file, some of each, and no more "
                "logical than physical ones"
            )
        for record in document["records"]:
            if not isinstance(record, dict):
                raise PredictorsError(f"a record of {path} is no dict; {_allowed()}")
            number, rank = record.get("forward_pass_id"), record.get("rank")
            if not isinstance(number, int) or not isinstance(rank, int):
                raise PredictorsError(
                    f"a record of {path} has forward_pass_id {number!r} and rank {rank!r}; "
                    "allowed: whole numbers"
                )
            figures = _logical(path, _array(path, record, key, dimensions), placed)
            yield _Record((str(record.get("gatherer_key")), number), rank, figures)


def _logical(
    path: Path, figures: NDArray[np.int64], placed: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Copies of an expert count as the expert itself."""
    layers, physical = placed.shape
    if figures.ndim == placed.ndim:
        if figures.shape != placed.shape:
            raise PredictorsError(
                f"a record of {path} has layers and experts {figures.shape}; allowed: "
                f"{placed.shape}, as last_physical_to_logical_map has"
            )
        counts = np.zeros((layers, int(placed.max()) + 1), dtype=np.int64)
        np.add.at(counts, (np.arange(layers)[:, np.newaxis], placed), figures)
        return counts
    if figures.shape[0] != layers or figures.max(initial=-1) >= physical:
        raise PredictorsError(
            f"a record of {path} has {figures.shape[0]} layers and expert "
            f"{figures.max(initial=-1)}; allowed: {layers} layers, experts below {physical}. "
            "Shared experts do not count: record with --disable-shared-experts-fusion"
        )
    ids = np.take_along_axis(placed, np.maximum(figures, 0).reshape(layers, -1), axis=1)
    return np.where(figures < 0, -1, ids.reshape(figures.shape))


def _ranks(records: list[_Record]) -> list[dict[tuple[str, int], NDArray[np.int64]]]:
    """Figures by rank and pass; one rank only where all saw the same tokens."""
    ranks: dict[int, dict[tuple[str, int], NDArray[np.int64]]] = {}
    for record in records:
        rank = ranks.setdefault(record.rank, {})
        # of tensor parallelism alone each process calls itself rank 0
        if not _alike(rank.setdefault(record.pass_key, record.figures), record.figures):
            raise PredictorsError(
                f"two files of rank {record.rank} disagree about pass {record.pass_key[1]}; "
                "allowed: the files of one recording. With data-parallel attention that gathers "
                "tokens, give one file only"
            )
    first, *others = ranks.values()
    for other in others:
        if other.keys() != first.keys() or not all(_alike(first[key], other[key]) for key in first):
            return list(ranks.values())
    return [first]


def _alike(one: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
    """Whether two ranks' figures are of the same tokens."""
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    if one.ndim == 2:  # counts
        apart = int(np.abs(one - other).sum())
        return apart <= _SAME_TOKENS_RATIO * int(one.sum())
    differ = np.sort(one, axis=2) != np.sort(other, axis=2)
    return int(differ.sum()) <= _SAME_TOKENS_RATIO * max(int((one >= 0).sum()), 1)
