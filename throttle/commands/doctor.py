"""`throttle doctor`: what stands between this machine and a daemon that sets clocks."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

from throttle import __version__
from throttle.actuation.examination import READINGS_COUNT, Finding, Severity, examine
from throttle.actuation.nvml import NvmlBackend
from throttle.actuation.surroundings import Surroundings

if TYPE_CHECKING:
    import argparse

_MARKS: Final = {
    Severity.GOOD: "ok",
    Severity.NOTE: "note",
    Severity.WARNING: "warning",
    Severity.BLOCKING: "BLOCKS",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "doctor",
        help="look at this machine's GPUs: what to fix before a daemon sets clocks",
        description="Look at driver, permissions, clocks and who else sets them, and say what to "
        "fix and how. Reads only: no clock is set. The exit status is 1 when something blocks.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--watch-seconds",
        type=float,
        default=1.0,
        help="how long clocks are watched; default: %(default)s",
    )
    parser.add_argument(
        "--timeout-seconds",
        type=float,
        default=30.0,
        help="longest wait for the driver beyond that; default: %(default)s",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Examine; 0 when nothing blocks."""
    findings = _examine_in_time(arguments.watch_seconds, arguments.timeout_seconds)
    blocking = any(finding.severity is Severity.BLOCKING for finding in findings)
    if arguments.json:
        print(_document(findings, blocking=blocking))
    else:
        _print(findings, blocking=blocking)
    return 1 if blocking else 0


def _examine_in_time(watch_seconds: float, timeout_seconds: float) -> list[Finding]:
    """Examine; a driver that does not answer is a finding too."""
    step_seconds = max(0.0, watch_seconds) / (READINGS_COUNT - 1)
    found: Future[list[Finding]] = Future()

    def fill() -> None:
        try:
            found.set_result(examine(Surroundings(), NvmlBackend, lambda: time.sleep(step_seconds)))
        except Exception as error:  # noqa: BLE001 - raised again where the result is taken
            found.set_exception(error)

    # not from a pool, which would wait for the call that hangs when the process ends
    threading.Thread(target=fill, name="examine", daemon=True).start()
    try:
        return found.result(max(0.0, watch_seconds) + timeout_seconds)
    except TimeoutError:
        return [
            Finding(
                Severity.BLOCKING,
                "driver",
                f"it has not answered for {timeout_seconds:g} s: a call hangs",
                "look for Xid errors in the kernel's log; GPU or machine may need a restart",
            )
        ]


def _document(findings: list[Finding], *, blocking: bool) -> str:
    return json.dumps(
        {
            "version": __version__,
            "blocking": blocking,
            "findings": [
                {
                    "severity": finding.severity.value,
                    "check": finding.check,
                    "gpu_uuid": finding.gpu_uuid,
                    "text": finding.text,
                    "remedy": finding.remedy,
                }
                for finding in findings
            ],
        },
        indent=2,
    )


def _print(findings: list[Finding], *, blocking: bool) -> None:
    shown = ""
    for finding in findings:
        if finding.gpu_uuid != shown:
            shown = finding.gpu_uuid
            print(f"\n{shown}")
        print(f"{_MARKS[finding.severity]:8}{finding.check}: {finding.text}")
        if finding.remedy:
            print(f"{'':8}-> {finding.remedy}")
    print("\nsomething blocks: no clock can be set here yet" if blocking else "\nnothing blocks")
