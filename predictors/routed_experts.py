"""A table of active experts from routings that an engine recorded.

vLLM's `--enable-return-routed-experts` gives, with each finished request, which experts each of its
tokens took: an array (tokens, layers, experts per token). Saved with numpy, such arrays tell how
many experts an iteration of n tokens reads, without an assumption about the router. Tokens of
different requests are drawn together, as a batch of decodes would hold them. SGLang's
expert-distribution recorder gives the same in its mode `per_token`; in the others it counts the
tokens of each expert pass by pass, and a pass is a batch as it really was (`sglang_dumps`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from predictors.active_experts import expected_active_experts, fit_reported_skew
from predictors.errors import PredictorsError
from predictors.sglang_dumps import PassCounts, read_dumps

if TYPE_CHECKING:
    import argparse

    from numpy.typing import NDArray

#: Batches drawn for each number of tokens.
_DRAWS: Final = 64

_DIMENSIONS: Final = 3


def read_routings(paths: list[Path]) -> NDArray[np.int64]:
    """All tokens of all files, (tokens, layers, experts per token).

    Raises:
        PredictorsError: A file is no such array, or two do not fit together.
    """
    arrays: list[NDArray[np.int64]] = []
    for path in paths:
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise PredictorsError(f"{path} is no numpy array: {error}") from None
        whole = np.issubdtype(array.dtype, np.integer) and array.ndim == _DIMENSIONS
        if not whole or 0 in array.shape or array.min() < 0:
            raise PredictorsError(
                f"{path} holds {array.dtype} of shape {array.shape}; allowed: expert indices from "
                "0, (tokens, layers, experts per token)"
            )
        if arrays and array.shape[1:] != arrays[0].shape[1:]:
            raise PredictorsError(
                f"{path} has layers and experts per token {array.shape[1:]}; allowed: those of the "
                f"first file, {arrays[0].shape[1:]}"
            )
        arrays.append(array.astype(np.int64))
    return np.concatenate(arrays)


def active_experts_table(
    routings: NDArray[np.int64], experts_count: int, draw: np.random.Generator
) -> dict[str, Any]:
    """Mean active experts of a layer for batches of 1, 2, 4, ... tokens.

    Args:
        routings: (tokens, layers, experts per token), indices below `experts_count`.
        experts_count: Experts of a layer.
        draw: Draws the batches.

    Returns:
        What `throttle-predictors experts --json` writes.

    Raises:
        PredictorsError: An index is not below `experts_count`.
    """
    if routings.max() >= experts_count:
        raise PredictorsError(
            f"a token took expert {routings.max()}; allowed: 0 to {experts_count - 1}; say how "
            "many experts a layer has with --experts"
        )
    total, layers, per_token = routings.shape
    sizes = [2**power for power in range(total.bit_length()) if 2**power <= total]
    active = []
    for size in sizes:
        taken = np.zeros((_DRAWS, layers, experts_count), dtype=bool)
        for index in range(_DRAWS):
            batch = routings[draw.choice(total, size, replace=False)]
            for layer in range(layers):
                taken[index, layer, batch[:, layer].ravel()] = True
        active.append(float(taken.sum(axis=2).mean()))
    tokens = np.array(sizes, dtype=np.float64)
    fitted = fit_reported_skew(tokens, np.array(active), experts_count, per_token)
    uniform = expected_active_experts(tokens, experts_count, per_token)
    return {
        "experts_count": experts_count,
        "experts_per_token": per_token,
        "layers_count": layers,
        "sampled_tokens_count": total,
        "tokens_count": sizes,
        "mean_active_experts_count": [round(value, 4) for value in active],
        "uniform_active_experts_count": [round(float(value), 4) for value in uniform],
        "skew_exponent": fitted.skew_exponent,
    }


def pass_counts_table(counts: NDArray[np.int64], experts_per_token: int) -> dict[str, Any]:
    """Mean active experts of a layer for passes of 1, of 2 and 3, of 4 to 7, ... tokens.

    A pass of a layer is one observation: its tokens are the sum of its counts over k, its active
    experts those with a count. A row's tokens are the mean of its passes, rounded; the uniform
    router beside it is the mean for just these passes. The skew is fitted to the mean of each
    number of tokens that occurs.

    Args:
        counts: (passes, layers, experts), tokens that took each expert; layers without a router
            are zero.
        experts_per_token: k.

    Returns:
        What `throttle-predictors experts --json` writes.

    Raises:
        PredictorsError: k does not explain the counts.
    """
    experts_count = counts.shape[2]
    if not 1 <= experts_per_token <= experts_count:
        raise PredictorsError(
            f"--experts-per-token is {experts_per_token}; allowed: 1 to {experts_count}"
        )
    sums = counts.sum(axis=2)
    routed = sums > 0
    tokens, rest = np.divmod(sums[routed], experts_per_token)
    if rest.any() or (counts.max(axis=2)[routed] > tokens).any():
        raise PredictorsError(
            f"--experts-per-token is {experts_per_token}, which the counts contradict; allowed: "
            "the k with which each pass and layer counts k experts for a token, and none of them "
            "more often than there are tokens. Are the files of all ranks given?"
        )
    active = (counts > 0).sum(axis=2)[routed].astype(np.float64)
    values, where = np.unique(tokens, return_inverse=True)
    values = values.astype(np.float64)
    means = np.bincount(where, active) / np.bincount(where)
    fitted = fit_reported_skew(values, means, experts_count, experts_per_token)
    uniform = expected_active_experts(values, experts_count, experts_per_token)[where]
    _, row = np.unique(np.frexp(tokens)[1], return_inverse=True)
    mean_tokens, mean_active, mean_uniform = (
        np.bincount(row, figures) / np.bincount(row) for figures in (tokens, active, uniform)
    )
    layers_count = int(routed.any(axis=0).sum())
    return {
        "experts_count": experts_count,
        "experts_per_token": experts_per_token,
        "layers_count": layers_count,
        "sampled_tokens_count": round(int(tokens.sum()) / layers_count),
        "tokens_count": [round(float(value)) for value in mean_tokens],
        "mean_active_experts_count": [round(float(value), 4) for value in mean_active],
        "uniform_active_experts_count": [round(float(value), 4) for value in mean_uniform],
        "skew_exponent": fitted.skew_exponent,
    }


def add_parser(commands: Any) -> None:  # noqa: ANN401 - argparse does not name this type
    """Describe `throttle-predictors experts`."""
    parser = commands.add_parser(
        "experts", help="a table of active experts from recorded routings (vLLM, SGLang)"
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="numpy arrays of vLLM's routed experts, or dumps (.pt) of SGLang's recorder",
    )
    parser.add_argument("--experts", type=int, help="experts of a layer; dumps tell it themselves")
    parser.add_argument(
        "--experts-per-token", type=int, help="needed for dumps that only count (all but per_token)"
    )
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here, too")
    parser.set_defaults(run=_run)


def _table(options: argparse.Namespace) -> dict[str, Any]:
    dumps = [path for path in options.files if path.suffix == ".pt"]
    draw = np.random.default_rng(options.seed)
    if not dumps:
        if options.experts is None:
            raise PredictorsError(
                "--experts is missing; numpy files do not tell it. Say how many experts a layer has"
            )
        routings = read_routings(options.files)
        _agree("--experts-per-token", options.experts_per_token, routings.shape[2])
        return active_experts_table(routings, options.experts, draw)
    if len(dumps) != len(options.files):
        raise PredictorsError(
            f"{len(dumps)} of {len(options.files)} files are .pt; allowed: all (SGLang) or none "
            "(numpy files of vLLM)"
        )
    recorded = read_dumps(dumps)
    _agree("--experts", options.experts, recorded.experts_count)
    if not isinstance(recorded, PassCounts):
        _agree("--experts-per-token", options.experts_per_token, recorded.routings.shape[2])
        return active_experts_table(recorded.routings, recorded.experts_count, draw)
    if options.experts_per_token is None:
        raise PredictorsError(
            "--experts-per-token is missing; dumps that count tokens do not tell it. Say how many "
            "experts a token takes"
        )
    if recorded.repeats_count > 1:
        print(f"ranks   {recorded.repeats_count} counted the same tokens")  # noqa: T201
    return pass_counts_table(recorded.counts, options.experts_per_token)


def _agree(option: str, given: int | None, recorded: int) -> None:
    if given not in {None, recorded}:
        raise PredictorsError(f"{option} is {given}; the files allow only {recorded}")


def _run(options: argparse.Namespace) -> None:
    table = _table(options)
    print("tokens  active  uniform")  # noqa: T201 - a command speaks by printing
    for row in zip(
        table["tokens_count"],
        table["mean_active_experts_count"],
        table["uniform_active_experts_count"],
        strict=True,
    ):
        print("{:6d}  {:6.1f}  {:7.1f}".format(*row))  # noqa: T201
    print(f"skew    {table['skew_exponent']}")  # noqa: T201
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n", "utf-8")
