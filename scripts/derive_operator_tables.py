"""Turns measured operator tables into the plant's constants and corrections.

    python scripts/derive_operator_tables.py FOLDER

FOLDER holds extracts of NVIDIA aiconfigurator's tables (Apache-2.0, commit 095f58a): moe_kernels,
gemm, gen_attention, ctx_attention, mla_gen_module, mla_ctx_module and custom_allreduce. For each
GPU it writes `throttle/simulation/tables/GPU/equations.toml` and one CSV per operator. Run it again
after changing a GPU's clocks, peaks, L2 or power: the fits depend on the clock that the power cap
left each kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

from throttle.simulation.benchmark import GPUS
from throttle.simulation.calibration import derive
from throttle.simulation.operator_tables import TABLES

_HEADER = """\
# Constants of the operators' equations on {gpu}: fitted to the operator tables of NVIDIA
# aiconfigurator (Apache-2.0, commit 095f58a) by scripts/derive_operator_tables.py. All measured.
"""


def equations_toml(gpu: str, constants: dict[str, dict[str, Any]]) -> str:
    """The fitted constants as TOML."""
    lines = [_HEADER.format(gpu=gpu)]
    for section, by_key in constants.items():
        for key, values in by_key.items():
            lines.append(f"[{section}.{key}]")
            lines += [
                f"{field.name} = {float(f'{getattr(values, field.name):.4g}')!r}"
                for field in dataclasses.fields(values)
            ]
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Derive and write everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with the measured tables")
    folder = parser.parse_args().folder
    for gpu in GPUS:
        constants, tables = derive(folder, gpu)
        place = TABLES / gpu
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        (place / "equations.toml").write_text(equations_toml(gpu, constants), encoding="utf-8")
        for name, table in tables.items():
            table.write(place / f"{name}.csv")
        size = sum(path.stat().st_size for path in place.iterdir())
        print(f"{gpu}: {len(tables)} tables, {size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
