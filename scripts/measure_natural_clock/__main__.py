"""Time MoE kernels at the clocks that an NVIDIA GPU takes by itself. Nothing is set on the GPU.

Use: python -m scripts.measure_natural_clock --out FILE.parquet [--minutes 9] [--gpu 0]
docs/measuring.md says what it does and does not touch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .card import Card, GpuAbsentError
from .records import merge_parts, sources_hash, write_part

#: Boost of each pass and its share of the time. The first one's process alone is told not to boost.
_PASSES = (("disabled", 0.65), ("default", 0.35))


def main(given: list[str] | None = None) -> int:
    """Measure; 0 when the file is written, 1 when there is nothing to measure on."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.measure_natural_clock",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (9)")
    parser.add_argument("--gpu", type=int, default=0, help="number of the GPU (0)")
    parser.add_argument(
        "--only-pass", choices=[name for name, _ in _PASSES], help=argparse.SUPPRESS
    )
    arguments = parser.parse_args(given)
    try:
        card = Card(arguments.gpu)
        if arguments.only_pass:
            _run_pass(card, arguments)
        else:
            _run_all(card, arguments)
    except GpuAbsentError as error:
        print(f"nothing measured: {error}", file=sys.stderr)
        return 1
    return 0


def _run_all(card: Card, arguments: argparse.Namespace) -> None:
    """Each pass in a process of its own, since the driver reads the environment once."""
    described = card.describe()
    print(f"{described['gpu_name']}, driver {described['driver_version']}", flush=True)
    with tempfile.TemporaryDirectory(prefix="natural-clock-") as folder:
        parts = []
        for boost, share in _PASSES:
            part = Path(folder) / f"{boost}.parquet"
            command = [sys.executable, "-m", "scripts.measure_natural_clock"]
            command += ["--out", str(part), "--gpu", str(arguments.gpu), "--only-pass", boost]
            command += ["--minutes", str(arguments.minutes * share)]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": card.uuid}
            environment.pop("CUDA_DISABLE_PERF_BOOST", None)
            if boost == "disabled":
                environment["CUDA_DISABLE_PERF_BOOST"] = "1"
            done = subprocess.run(command, env=environment, check=False)  # noqa: S603 - ourselves
            if done.returncode:
                print(f"the pass with {boost} boost failed", file=sys.stderr)
            if part.is_file():
                parts.append(part)
        if not parts:
            raise GpuAbsentError("no pass came to its end")
        merge_parts(arguments.out, parts, {**described, "sources_sha256": sources_hash()})
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes", flush=True)


def _run_pass(card: Card, arguments: argparse.Namespace) -> None:
    from .passes import Pass, import_torch  # noqa: PLC0415 - needs Triton

    import_torch()
    result = Pass(card, arguments.only_pass, arguments.minutes * 60.0).run()
    write_part(arguments.out, result.rows, result.provenance)


if __name__ == "__main__":
    sys.exit(main())
