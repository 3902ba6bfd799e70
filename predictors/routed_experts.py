"""A table of active experts from routings that an engine recorded.

vLLM's `--enable-return-routed-experts` gives, with each finished request, which experts each of its
tokens took: an array (tokens, layers, experts per token). Saved with numpy, such arrays tell how
many experts an iteration of n tokens reads, without an assumption about the router. Tokens of
different requests are drawn together, as a batch of decodes would hold them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from predictors.active_experts import expected_active_experts, fit_reported_skew
from predictors.errors import PredictorsError

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


def add_parser(commands: Any) -> None:  # noqa: ANN401 - argparse does not name this type
    """Describe `throttle-predictors experts`."""
    parser = commands.add_parser(
        "experts", help="a table of active experts from recorded routings (numpy files)"
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="NPY")
    parser.add_argument("--experts", required=True, type=int, help="experts of a layer")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here, too")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    table = active_experts_table(
        read_routings(options.files), options.experts, np.random.default_rng(options.seed)
    )
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
