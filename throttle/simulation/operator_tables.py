"""Measured corrections to the operators' equations: compact tables, and what lies between them.

A table holds, for each measured shape, the logarithm of measured over computed time at default
clocks. Where it holds a plant's shape, the corrected equation returns the measured time; for other
shapes the logarithms of the nearest ones are interpolated (kriging with an exponential kernel), and
far from all of them the correction fades to none.

The tables are derived from those of NVIDIA aiconfigurator (Apache-2.0, commit 095f58a) by
`scripts/derive_operator_tables.py`; see `tables/NOTICE.md`.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from throttle.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from throttle.simulation.equations import Numbers

TABLES = Path(__file__).parent / "tables"
#: Corrections are kept in thousandths.
SCALE = 1000.0
_MOST_NEIGHBORS = 500  # rows that one interpolation may use: its cost is cubic


@dataclass(frozen=True, slots=True)
class Kind:
    """How one operator's table is laid out and interpolated.

    Attributes:
        name: File name without suffix.
        formats: Columns that must match exactly, such as number formats.
        shape: Columns of numbers that describe a shape.
        axis: What varies along a row.
        lengths: Distance, in factors of two, over which corrections of neighbors agree: one for
            each column of `features`.
        noise: Variance of a correction that its neighbors do not share, over that they do.
    """

    name: str
    formats: tuple[str, ...]
    shape: tuple[str, ...]
    axis: str
    lengths: tuple[float, ...]
    noise: float


_ATTENTION = ("heads_count", "kv_heads_count", "head_dimension", "requests_count")
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        # features: H, I, experts of the rank, k, n, T / A, A
        Kind(
            "moe",
            ("weight_dtype",),
            ("hidden", "width", "experts_count", "experts_per_token", "ranks_count"),
            "tokens",
            (8.0, 4.0, 8.0, 8.0, 4.0, 4.0, 4.0),
            0.3,
        ),
        # features: columns, inner, rows
        Kind("gemm", ("weight_dtype",), ("columns", "inner"), "rows", (2.0, 2.0, 1.5), 0.1),
        # features: the shape (head dimension held apart by a short length), then the axis
        Kind("decode", ("kv_dtype",), _ATTENTION, "context", (4.0, 4.0, 0.5, 2.0, 2.0), 0.05),
        Kind("prefill", ("kv_dtype",), _ATTENTION, "tokens", (4.0, 4.0, 0.5, 2.0, 2.0), 0.05),
        Kind(
            "mla_decode",
            ("weight_dtype", "kv_dtype"),
            ("heads_count", "requests_count"),
            "context",
            (2.0, 2.0, 2.0),
            0.05,
        ),
        Kind(
            "mla_prefill",
            ("weight_dtype", "kv_dtype"),
            ("heads_count", "requests_count"),
            "tokens",
            (2.0, 2.0, 2.0),
            0.05,
        ),
        Kind("all_reduce", (), ("gpus_count",), "bytes", (1.0, 1.0), 0.05),
    )
}


def moe_features(
    shape: Sequence[float], tokens: Numbers, active: Numbers, pairs: Numbers
) -> Numbers:
    """What a MoE layer's correction is interpolated over; shape (len(tokens), 7)."""
    hidden, width, experts, per_token, ranks = shape
    ones = np.ones(len(tokens))
    pairs, active = np.maximum(pairs, 1.0), np.maximum(active, 0.5)
    columns = (
        hidden * ones,
        width * ones,
        experts / ranks * ones,
        per_token * ones,
        tokens,
        pairs / np.maximum(active, 1.0),
        active,
    )
    result: Numbers = np.log2(np.stack(columns, axis=1))
    return result


def grid_features(shape: Sequence[float], axis: Numbers) -> Numbers:
    """The shape's numbers and the axis, in factors of two; shape (len(axis), len(shape) + 1)."""
    columns = [np.full(len(axis), float(value)) for value in shape]
    result: Numbers = np.log2(np.stack([*columns, axis], axis=1))
    return result


def krige(known: Numbers, values: Numbers, wanted: Numbers, kind: Kind) -> Numbers:
    """Values at wanted points from known ones: simple kriging about zero.

    Args:
        known: Features of the known points, shape (K, F).
        values: Their values, shape (K,).
        wanted: Features of the wanted points, shape (W, F).
        kind: Lengths and noise.

    Returns:
        Values, shape (W,).
    """
    lengths = np.array(kind.lengths)
    nearest = _nearest(known, wanted, lengths)
    known, values = known[nearest] / lengths, values[nearest]
    covariance = np.exp(-_distances(known, known)) + kind.noise * np.eye(len(known))
    weights = np.linalg.solve(covariance, values)
    result: Numbers = np.exp(-_distances(wanted / lengths, known)) @ weights
    return result


def _nearest(known: Numbers, wanted: Numbers, lengths: Numbers) -> NDArray[np.intp]:
    """Indices of the known points that lie nearest to the wanted ones' middle."""
    middle = (wanted.min(axis=0) + wanted.max(axis=0)) / 2.0
    half = (wanted.max(axis=0) - wanted.min(axis=0)) / 2.0
    outside = np.maximum(np.abs(known - middle) - half, 0.0) / lengths
    return np.argsort((outside**2).sum(axis=1), kind="stable")[:_MOST_NEIGHBORS]


def _distances(left: Numbers, right: Numbers) -> Numbers:
    squared = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None] - 2.0 * left @ right.T
    result: Numbers = np.sqrt(np.maximum(squared, 0.0))
    return result


@dataclass(frozen=True, slots=True)
class Row:
    """One measured shape: its corrections along the axis, as natural logarithms."""

    formats: tuple[str, ...]
    shape: tuple[float, ...]
    axis: Numbers
    values: Numbers


class OperatorTable:
    """Corrections of one operator on one GPU.

    Args:
        kind: Its layout.
        rows: Measured shapes.
    """

    def __init__(self, kind: Kind, rows: Sequence[Row]) -> None:
        self.kind = kind
        self.rows = tuple(rows)
        self._by_shape = {(row.formats, row.shape): row for row in rows}

    def row(self, formats: tuple[str, ...], shape: Sequence[float]) -> Row | None:
        """The measured shape, if the table holds it."""
        return self._by_shape.get((formats, tuple(float(value) for value in shape)))

    def of_formats(self, formats: tuple[str, ...]) -> tuple[Row, ...]:
        """All shapes in these formats."""
        return tuple(row for row in self.rows if row.formats == formats)

    def write(self, path: Path) -> None:
        """Write the table as CSV, one shape per line, corrections in thousandths."""
        axis = sorted({float(value) for row in self.rows for value in row.axis})
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*self.kind.formats, *self.kind.shape, *(f"{v:g}" for v in axis)])
            for row in sorted(self.rows, key=lambda row: (row.formats, row.shape)):
                held = dict(zip(row.axis.tolist(), row.values.tolist(), strict=True))
                cells = [str(round(held[v] * SCALE)) if v in held else "" for v in axis]
                writer.writerow([*row.formats, *(f"{v:g}" for v in row.shape), *cells])


@functools.lru_cache(maxsize=64)
def load_table(gpu: str, name: str) -> OperatorTable | None:
    """The shipped table of one operator on one GPU; None where nothing was measured.

    Raises:
        InvalidInputError: The file does not hold a table of this kind.
    """
    path = TABLES / gpu / f"{name}.csv"
    return read_table(path, KINDS[name]) if path.is_file() else None


def read_table(path: Path, kind: Kind) -> OperatorTable:
    """Read what `OperatorTable.write` wrote.

    Raises:
        InvalidInputError: The file does not hold a table of this kind.
    """
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    labels = len(kind.formats)
    start = labels + len(kind.shape)
    if header[:start] != [*kind.formats, *kind.shape]:
        raise InvalidInputError(
            path.name, header[:start], f"columns {', '.join((*kind.formats, *kind.shape))}"
        )
    axis = np.array([float(value) for value in header[start:]])
    rows = []
    for line in lines:
        cells = line[start:]
        held = np.array([bool(cell) for cell in cells])
        values = np.array([float(cell) for cell in cells if cell]) / SCALE
        shape = tuple(float(value) for value in line[labels:start])
        rows.append(Row(tuple(line[:labels]), shape, axis[held], values))
    return OperatorTable(kind, rows)


def along_axis(row: Row, points: Numbers) -> Numbers:
    """A row's corrections at any points of its axis, linear in the logarithm, constant beyond."""
    result: Numbers = np.interp(np.log2(points), np.log2(row.axis), row.values)
    return result


class Surface:
    """Factors over two counts, bilinear in their logarithms, constant beyond the measured ones.

    Args:
        corrections: By first count, then second count, each a power of two: the corrections'
            logarithms, shape (R, C).
    """

    __slots__ = ("_factors", "_last_column", "_last_row")

    def __init__(self, corrections: Numbers) -> None:
        self._factors = np.exp(corrections).tolist()
        self._last_row = corrections.shape[0] - 1
        self._last_column = corrections.shape[1] - 1

    def at(self, first_log2: float, second_log2: float) -> float:
        """The factor; the counts' logarithms to base 2 may lie anywhere."""
        row = min(max(first_log2, 0.0), self._last_row)
        column = min(max(second_log2, 0.0), self._last_column)
        i, j = int(row), int(column)
        near = self._factors[i]
        far = self._factors[i + 1] if i < self._last_row else near
        u, v = row - i, column - j
        k = j + 1 if j < self._last_column else j
        left = near[j] + (near[k] - near[j]) * v
        right = far[j] + (far[k] - far[j]) * v
        factor: float = left + (right - left) * u
        return factor


def surface(  # noqa: PLR0917 - a table, and where in it
    gpu: str,
    name: str,
    formats: tuple[str, ...],
    shape: Sequence[float],
    rows_count: int,
    columns_count: int,
) -> Surface:
    """The corrections of one shape over requests (rows) and the table's axis (columns).

    The last column of `kind.shape` is the number of requests, which `shape` leaves out. Both run
    over powers of two from 1.
    """
    return _surface(gpu, name, formats, tuple(shape), rows_count, columns_count)


@functools.lru_cache(maxsize=128)
def _surface(  # noqa: PLR0917 - as surface
    gpu: str,
    name: str,
    formats: tuple[str, ...],
    shape: tuple[float, ...],
    rows_count: int,
    columns_count: int,
) -> Surface:
    axis: Numbers = 2.0 ** np.arange(float(columns_count))
    table = load_table(gpu, name)
    known = table.of_formats(formats) if table is not None else ()
    if table is None or not known:
        return Surface(np.zeros((rows_count, columns_count)))
    corrections: list[Numbers] = []
    unmeasured: list[int] = []
    for power in range(rows_count):
        row = table.row(formats, (*shape, 2.0**power))
        if row is None:
            unmeasured.append(power)
            corrections.append(np.zeros(columns_count))
        else:
            corrections.append(along_axis(row, axis))
    if len(unmeasured) == rows_count:
        wanted = np.concatenate(
            [grid_features((*shape, 2.0**power), axis) for power in range(rows_count)]
        )
        points = np.concatenate([grid_features(row.shape, row.axis) for row in known])
        values = np.concatenate([row.values for row in known])
        return Surface(krige(points, values, wanted, table.kind).reshape(rows_count, -1))
    measured = [power for power in range(rows_count) if power not in unmeasured]
    for power in unmeasured:  # more requests than were measured: as the most that were
        corrections[power] = corrections[min(measured, key=lambda m: abs(m - power))]
    return Surface(np.array(corrections))


def axis_factors(
    gpu: str, name: str, formats: tuple[str, ...], shape: Sequence[float], points: Numbers
) -> Numbers:
    """Factors of one shape along its table's axis.

    Args:
        gpu: GPU name.
        name: Operator.
        formats: Number formats.
        shape: The shape's numbers.
        points: Counts, rising, 1 or more.
    """
    numbers = tuple(float(value) for value in shape)
    return _axis_factors(gpu, name, formats, numbers, tuple(points.tolist()))


@functools.lru_cache(maxsize=256)
def _axis_factors(
    gpu: str,
    name: str,
    formats: tuple[str, ...],
    shape: tuple[float, ...],
    points: tuple[float, ...],
) -> Numbers:
    table = load_table(gpu, name)
    axis = np.array(points)
    if table is None or not (known := table.of_formats(formats)):
        return np.ones(len(axis))
    if (row := table.row(formats, shape)) is not None:
        return np.exp(along_axis(row, axis))
    wanted = row_features(Row(formats, shape, axis, axis), name)
    features = np.concatenate([row_features(row, name) for row in known])
    values = np.concatenate([row.values for row in known])
    return np.exp(krige(features, values, wanted, table.kind))


def row_features(row: Row, name: str) -> Numbers:
    """Features of a table's row at each point of its axis."""
    if name == "moe":
        active, pairs = balanced_load(row.shape, row.axis)
        return moe_features(row.shape, row.axis, active, pairs)
    return grid_features(row.shape, row.axis)


def balanced_load(shape: Sequence[float], tokens: Numbers) -> tuple[Numbers, Numbers]:
    """Active experts and pairs of rank 0 when a benchmark deals tokens evenly.

    As many distinct experts as token-expert pairs until all are active.
    """
    _, _, experts, per_token, ranks = shape
    local = experts / ranks
    pairs = np.maximum(tokens * per_token / ranks, 1.0)
    return np.minimum(pairs, local), pairs
