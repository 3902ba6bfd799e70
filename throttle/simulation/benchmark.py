"""Measured kernels of one operator, and how its equation reads them."""

from __future__ import annotations

from collections.abc import Callable  # noqa: TC003 - of a dataclass field
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from throttle.errors import InvalidInputError, NotFoundError
from throttle.simulation.operators import BF16_COMPUTED

if TYPE_CHECKING:
    from pathlib import Path

    from throttle.simulation.equations import Mask, Numbers, Parts
    from throttle.simulation.operator_tables import Kind
    from throttle.simulation.parameters import GpuParameters

#: GPU names here and in the files.
GPUS = {"a100-sxm": "a100_sxm", "h100-sxm": "h100_sxm", "h200-sxm": "h200_sxm"}
#: Number formats here, by their names in the files.
DTYPES = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "w4a16_mxfp4": "mxfp4"}


@dataclass(frozen=True, slots=True)
class Fit:
    """What is fitted of an equation.

    Attributes:
        parameters: The dataclass of its constants.
        units: For each constant: its unit, start, lowest and highest value in that unit.
    """

    parameters: type[Any]
    units: dict[str, tuple[float, float, float, float]]

    def build(self, values: Numbers) -> Any:  # noqa: ANN401 - of the type `parameters`
        """The constants from their values in units."""
        named = zip(self.units.items(), values.tolist(), strict=True)
        return self.parameters(**{name: value * unit[0] for (name, unit), value in named})


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Measured rows of one operator in one format on one GPU.

    Attributes:
        gpu: GPU name.
        key: Under which its constants stand in the GPU's table, such as `bf16`.
        section: Table of the GPU's file that holds them.
        kind: Layout of its corrections.
        formats: Number formats.
        shapes: Shape of each row, shape (N, S).
        axis: Position along the axis, shape (N,).
        groups: What is held out together, shape (N,).
        seconds: Measured time, shape (N,).
        judged: Rows that count towards the reported error.
        fit: What is fitted.
        work: The numbers that the equation takes, by name.
        equation: Parts from constants, work and GPU.
    """

    gpu: str
    key: str
    section: str
    kind: Kind
    formats: tuple[str, ...]
    shapes: Numbers
    axis: Numbers
    groups: Any
    seconds: Numbers
    judged: Mask
    fit: Fit
    work: dict[str, Any]
    equation: Callable[[Any, dict[str, Any], GpuParameters], Parts]

    @property
    def name(self) -> str:
        """Operator and formats."""
        return f"{self.kind.name} {self.key}".strip()

    def take(self, mask: Mask) -> Benchmark:
        """Some of the rows."""
        size = len(self.seconds)
        work = {
            name: value[mask] if isinstance(value, np.ndarray) and len(value) == size else value
            for name, value in self.work.items()
        }
        return replace(
            self,
            shapes=self.shapes[mask],
            axis=self.axis[mask],
            groups=self.groups[mask],
            seconds=self.seconds[mask],
            judged=self.judged[mask],
            work=work,
        )

    def parts(self, constants: Any, gpu: GpuParameters) -> Parts:  # noqa: ANN401 - by operator
        """The equation of these rows, with what the benchmark finds in L2."""
        return self.equation(constants, self.work, gpu)


def read_table(folder: Path, name: str, gpu: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """The rows of one GPU in one file.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: It lacks a column.
    """
    path = folder / name
    if not path.is_file():
        raise NotFoundError(f"no file {name} in {folder}; see docs/plant.md for its source")
    table = pd.read_csv(path)
    if missing := [column for column in (*columns, "gpu") if column not in table]:
        raise InvalidInputError(name, ", ".join(missing), "a file that has these columns")
    return table[table.gpu == GPUS[gpu]]


def peak(gpu: GpuParameters, dtype: str) -> float:
    """FLOP/s at the maximum clock for weights of this format."""
    compute = gpu.compute
    wide = dtype in BF16_COMPUTED
    return compute.bf16_flops_per_second if wide else compute.fp8_flops_per_second
