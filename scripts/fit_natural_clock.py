"""Fit fixed-cost sensitivity, memory knee and compute shares to a natural-clock measurement.

Use: python scripts/fit_natural_clock.py FILE.parquet [--roofline-exponent 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from throttle.errors import ThrottleError
from throttle.simulation.clock_records import ClockRecords, read_clock_records
from throttle.simulation.natural_clock import fit_natural_clocks

if TYPE_CHECKING:
    from throttle.simulation.natural_clock import Estimate, NaturalClockFit


def main() -> int:
    """Print the fit; 0 when there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="what measure_natural_clock wrote")
    parser.add_argument("--roofline-exponent", type=float, default=1.0, metavar="P")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    arguments = parser.parse_args()
    try:
        records = read_clock_records(arguments.file)
        fit = fit_natural_clocks(
            records.kernels,
            records.maximum_clock_mhz,
            roofline_exponent=arguments.roofline_exponent,
        )
    except ThrottleError as error:
        print(f"fit_natural_clock: {error}", file=sys.stderr)
        return 1
    if arguments.json is not None:
        report = {
            "fit": asdict(fit),
            "steady": [asdict(each) for each in records.steady],
            "provenance": records.provenance,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print(records, fit)
    return 0


def _print(records: ClockRecords, fit: NaturalClockFit) -> None:
    print(
        f"{records.provenance.get('gpu_name')}, measured, up to {records.maximum_clock_mhz:g} MHz"
    )
    print(f"fixed-cost sensitivity G: {_shown(fit.fixed_clock_sensitivity)}")
    print(f"memory knee rb:           {_shown(fit.memory_knee)}")
    print(f"{'kernel':<28} {'samples':>7} {'MHz':>11} {'us':>9}  fixed memory compute (range) rms")
    for each in fit.kernels:
        compute = each.compute_share
        print(
            f"{each.name:<28} {each.samples_count:>7} "
            f"{each.lowest_clock_mhz:>5.0f}-{each.highest_clock_mhz:<5.0f} "
            f"{each.seconds * 1e6:>9.1f}  {each.fixed_share:5.2f} {each.memory_share:6.2f} "
            f"{compute.value:7.2f} ({compute.lowest:.2f}-{compute.highest:.2f}) "
            f"{each.residual_ratio:.1%}{'' if compute.identified else '  not identified'}"
        )
    for steady in records.steady:
        print(
            f"{steady.workload:<28} {steady.boost} boost: {steady.clock_mhz:.0f} MHz, "
            f"{steady.power_watts:.0f} W over {steady.seconds:.1f} s"
        )


def _shown(estimate: Estimate) -> str:
    note = "" if estimate.identified else ", not identified by these clocks"
    return f"{estimate.value:.2f} ({estimate.lowest:.2f} to {estimate.highest:.2f}{note})"


if __name__ == "__main__":
    sys.exit(main())
