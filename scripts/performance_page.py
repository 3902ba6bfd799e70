"""Measures what a decision costs on this machine and writes docs/performance.md.

python scripts/performance_page.py             everything, some minutes, on a quiet machine
python scripts/performance_page.py --quick     few samples: to try it
python scripts/performance_page.py --page      only the page, from what was measured last
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from throttle.bench.reference import REFERENCE_CASE

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "performance"
PAGE = ROOT / "docs" / "performance.md"
SUBJECTS = ("decision", "transport", "daemon")
SEGMENTS = (8, 16, 24, 32, 64)
_CLIENT_ALONE = "import throttle.client, beyond grpc itself"
#: Played to time `throttle compare`: trace, seconds of it, how many times faster than recorded.
_COMPARED = ("azure2023_conv_10min", 300.0, 2.0)


def measure(samples_count: int, states_count: int) -> None:
    """Time everything and keep the figures in `OUT`."""
    OUT.mkdir(parents=True, exist_ok=True)
    for subject in SUBJECTS:
        command = [sys.executable, "-m", "throttle.cli", "bench", subject]
        command += ["--samples", str(samples_count), "--json", str(OUT / f"{subject}.json")]
        subprocess.run(command, check=True, cwd=ROOT)  # noqa: S603 - our own
    (OUT / "played.json").write_text(json.dumps(_played(states_count), indent=1) + "\n", "utf-8")


def _played(states_count: int) -> dict[str, Any]:
    """The segment table and how fast `compare` plays; simulated."""
    from throttle.bench.segments import judge_segment_counts  # noqa: PLC0415 - slow to import
    from throttle.bench.states import PLANT, shipped_predictor  # noqa: PLC0415 - likewise
    from throttle.simulation.comparison.runs import RunSpec, Scene, play_run  # noqa: PLC0415

    trace, seconds, compression = _COMPARED
    scene = Scene(PLANT, trace, duration_seconds=seconds, bundle=str(ROOT / "models"))
    speeds = []
    for _ in range(3):
        started = time.process_time()
        record = play_run(RunSpec(scene, "throttle", 0.0, compression, 1))
        speeds.append(record.horizon_seconds / (time.process_time() - started))
    judged = judge_segment_counts(shipped_predictor(ROOT / "models"), SEGMENTS, states_count)
    return {
        "times_real_time": sorted(speeds),
        "iterations_per_second": record.iterations_count / record.horizon_seconds,
        "attainment_ratio": record.attainment_ratio,
        "segments": [asdict(each) for each in judged],
    }


def write_page() -> None:
    """Write the page from `OUT`."""
    measured = {
        subject: json.loads((OUT / f"{subject}.json").read_text("utf-8")) for subject in SUBJECTS
    }
    played = json.loads((OUT / "played.json").read_text("utf-8"))
    PAGE.write_text(page(measured, played), "utf-8")


def page(measured: dict[str, dict[str, Any]], played: dict[str, Any]) -> str:
    """The page's text."""
    decision = measured["decision"]["results"]
    daemon = measured["daemon"]["results"]
    machine = measured["decision"]["machine"]
    loads = ", ".join(
        f"{each['machine']['load_average']:.1f} ({name})" for name, each in measured.items()
    )
    return f"""# Performance

Written by `make performance` from `throttle bench decision | transport | daemon`; times in microseconds unless said otherwise.

{machine["processor"]}, {machine["cores_count"]} cores, Python {machine["python"]}, NumPy {machine["numpy"]}; one core a decision. Load
average at the end of each part: {loads}. A figure above the number of cores means that others computed at the same time: medians then say
more than tails. Nothing here needs a GPU; the engines are simulated, and no two of their states are alike.

## What was wanted

{_table(("", "at most", "measured", "kept"), _goals(decision, daemon, played))}

What was tried is in [decision 12](decisions/0012-a-decision-is-one-call.md). In fixed computations (below), which tell how fast the machine was at the time, a decision of 64 requests takes {_in_fixed(decision, paced=False)} back to back and
{_in_fixed(decision, paced=True)} paced.

## One decision, in process

State in, decision out: the shipped bundle of Qwen3-30B-A3B on one H200, latency and power at every clock, limits that bind. Paced means that
a decision comes each {1e3 * _pace(decision):g} ms, when caches have gone cold.

{_table(("case", "requests", "clocks", "pace", "p50", "p99", "p99.9", "processor p50", "processor p99", "samples"), map(_row, decision))}

*Processor* is the time of the thread on its processor, without the turns that others took in between.

The fixed computation (`throttle/bench/reference.py`) never changes and decides nothing: what it takes on another day or another machine says
how these figures would read there. Paced, it takes {_slowdown(decision, REFERENCE_CASE)} times as long as back to back, at the median: what the
machine itself adds to a call that follows a sleep. A decision of 64 requests takes {_slowdown(decision, "decision")} times as long.

Median of each step, back to back, with a stopwatch around it (which adds a little). A decision is one compiled call, whose arguments are
gathered first: *decide* holds both, *observe* holds the scoreboard. Inside that call nothing can be timed, so projection to lateness are
timed where each is called by itself, in *decide, step by step*, which decides the same:

{_steps(decision)}

Beside throttLL'eM (Kakolyris et al., HPCA 2025), which reports for one decision on its CPU:

| | throttLL'eM, reported | here, median |
|---|---|---|
| performance model | about 3 ms an inference | {_step(decision, "prediction")} us for all segments at all clocks, latency and power |
| projection | below 2 ms | {_step(decision, "projection")} us |
| whole decision under heavy load | about 35 ms, scheduler and model | {_p50(decision, 64)} us at 64 requests, {_p50(decision, 512)} us at 512 |

## Transport

An echo of the same messages over a Unix socket, nothing decided. The daemon uses the threaded server: it is as fast at one to eight engines,
and a decision needs a thread anyway. The asyncio server carries tens of engines on one thread.

{_table(("server", "engines", "pace", "p50", "p99", "p99.9", "samples"), map(_engines_row, measured["transport"]["results"]))}

## The daemon

Round trips over a Unix socket to `throttle serve` with its privileged process beside it, decisions applied to simulated GPUs.

{_table(("case", "engines", "pace", "p50", "p99", "p99.9", "samples", "overtaken", "unanswered"), map(_daemon_row, _round_trips(daemon)))}

*Overtaken* states were answered together with a newer one of their engine, as they should be when there is no time for each; *unanswered*
engines never had an answer to their newest state.

| start | seconds, median |
|---|---|
{_starts(daemon)}

## Playing

`throttle compare` plays the whole policy at {played["times_real_time"][1]:.0f} times real time on one core (median of three, by processor time:
{_COMPARED[0]}, {_COMPARED[2]:g} times as fast as recorded, {played["iterations_per_second"]:.0f} iterations a second).

## How many segments

The horizon's decode part is cut into segments that grow with distance. Judged on states of a simulated engine that serves the Azure
conversation trace at three times its pace under a mean gap of 22 ms, taken where a limit binds, against one segment for every iteration
(simulated). A clock counts as breaking a limit if the exact projection sees any slack below zero or more late answers than the budget of
0.03 %; the chosen clocks then lie a few steps of 15 MHz too low.

{_table(("decode segments", "states", "same clock", "mean distance, MHz", "breaks a limit"), map(_segment_row, played["segments"]))}
"""


#: Case, requests, paced, quantile, microseconds at most.
_DECISION_GOALS = (
    (64, False, "p50", 90.0),
    (64, False, "p99", 160.0),
    (64, True, "p50", 160.0),
    (64, True, "p99", 260.0),
    (512, True, "p99", 400.0),
)
_ROUND_TRIP_GOALS = ((1, "p50", 700.0), (1, "p99", 1100.0), (64, "p99", 8000.0))


def _goals(
    decision: list[dict[str, Any]], daemon: list[dict[str, Any]], played: dict[str, Any]
) -> list[str]:
    """Rows of wanted and measured; only those whose case was measured."""
    rows = []
    for requests, paced, name, most in _DECISION_GOALS:
        for case in _cases(decision, "decision", paced=paced):
            if case["requests_count"] == requests:
                words = f"decision, {requests} requests, {_paced(case)}, {name}"
                rows.append(_goal(words, most, 1e6 * case[f"{name}_seconds"], "us"))
    for engines, name, most in _ROUND_TRIP_GOALS:
        for case in _cases(daemon, "round trip", paced=True):
            if case["engines_count"] == engines:
                words = f"round trip to the daemon, engines: {engines}, {_paced(case)}, {name}"
                rows.append(_goal(words, most, 1e6 * case[f"{name}_seconds"], "us"))
    medians = _start_medians(daemon)
    rows.append(_goal("start until SERVING", 2.0, medians["serve until SERVING"], "s"))
    rows.append(_goal("importing the client, beyond grpc", 0.15, medians[_CLIENT_ALONE], "s"))
    speed = played["times_real_time"][1]
    rows.append(
        f"| playing, times real time | 60 at least | {speed:.0f} | {'yes' if speed >= 60.0 else '**no**'} |"
    )
    return rows


def _goal(what: str, most: float, measured: float, unit: str) -> str:
    figures = f"{most:.0f} {unit} | {measured:.0f} {unit}"
    if most < 10.0:
        figures = f"{most:g} {unit} | {measured:.2f} {unit}"
    return f"| {what} | {figures} | {'yes' if measured <= most else '**no**'} |"


def _cases(results: list[dict[str, Any]], case: str, *, paced: bool) -> list[dict[str, Any]]:
    return [
        each for each in results if each["case"] == case and bool(each["pacing_seconds"]) == paced
    ]


def _in_fixed(results: list[dict[str, Any]], *, paced: bool) -> str:
    fixed = _cases(results, REFERENCE_CASE, paced=paced)
    decisions = [
        each for each in _cases(results, "decision", paced=paced) if each["requests_count"] == 64
    ]
    if not fixed or not decisions:
        return "an unmeasured number"
    return f"{decisions[0]['p50_seconds'] / fixed[0]['p50_seconds']:.1f}"


def _table(head: tuple[str, ...], rows: Any) -> str:  # noqa: ANN401 - an iterable of strings
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows])


def _pace(results: list[dict[str, Any]]) -> float:
    return max(float(each["pacing_seconds"]) for each in results)


def _paced(result: dict[str, Any]) -> str:
    pace = result["pacing_seconds"]
    return f"{1e3 * pace:g} ms" if pace else "back to back"


def _quantiles(result: dict[str, Any]) -> str:
    names = ("p50_seconds", "p99_seconds", "p999_seconds")
    return " | ".join(f"{1e6 * result[name]:.0f}" for name in names)


def _row(result: dict[str, Any]) -> str:
    return (
        f"| {result['case']} | {result['requests_count']} | {result['clocks_count']} "
        f"| {_paced(result)} | {_quantiles(result)} | {1e6 * result['processor_p50_seconds']:.0f} "
        f"| {1e6 * result['processor_p99_seconds']:.0f} | {result['samples_count']} |"
    )


def _engines_row(result: dict[str, Any]) -> str:
    return (
        f"| {result['case']} | {result['engines_count']} | {_paced(result)} "
        f"| {_quantiles(result)} | {result['samples_count']} |"
    )


def _daemon_row(result: dict[str, Any]) -> str:
    row = _engines_row(result)
    return f"{row} {result['overtaken_count']} | {result['unanswered_count']} |"


def _round_trips(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in results if each["case"] == "round trip"]


def _start_medians(results: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each start that was timed."""
    medians: dict[str, float] = {}
    for each in results:
        if each["case"] != "round trip":
            medians.setdefault(each["case"], each["p50_seconds"])
    beyond = medians["import throttle.client"] - medians["import grpc"]
    medians[_CLIENT_ALONE] = beyond
    return medians


def _starts(results: list[dict[str, Any]]) -> str:
    medians = _start_medians(results)
    return "\n".join(f"| {name} | {seconds:.2f} |" for name, seconds in medians.items())


def _instrumented(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in results if "step_p50_seconds" in each and each["case"] == "decision"]


def _steps(results: list[dict[str, Any]]) -> str:
    cases = _instrumented(results)
    names = list(cases[0]["step_p50_seconds"])
    head = ("step", *(f"{each['requests_count']} requests" for each in cases))
    rows = [
        f"| {name} | "
        + " | ".join(f"{1e6 * each['step_p50_seconds'][name]:.1f}" for each in cases)
        + " |"
        for name in names
    ]
    kilobytes = " | ".join(f"{each['allocated_bytes'] / 1e3:.0f} kB" for each in cases)
    return _table(head, [*rows, f"| memory held at once | {kilobytes} |"])


def _step(results: list[dict[str, Any]], name: str) -> str:
    cases = {each["requests_count"]: each for each in _instrumented(results)}
    case = cases.get(64) or next(iter(cases.values()))
    return f"{1e6 * case['step_p50_seconds'][name]:.0f}"


def _p50(results: list[dict[str, Any]], requests_count: int) -> str:
    found = [
        each["p50_seconds"]
        for each in results
        if each["case"] == "decision"
        and each["requests_count"] == requests_count
        and each["pacing_seconds"]
    ]
    return f"{1e6 * found[0]:.0f} (paced)" if found else "not measured"


def _slowdown(results: list[dict[str, Any]], case: str) -> str:
    """Paced over back to back, by medians; of 64 requests, where a case has several."""
    seconds = {
        bool(each["pacing_seconds"]): each["p50_seconds"]
        for each in results
        if each["case"] == case and each["requests_count"] in {0, 64}
    }
    return (
        f"{seconds[True] / seconds[False]:.1f}" if len(seconds) == 2 else "an unmeasured number of"
    )


def _segment_row(judged: dict[str, Any]) -> str:
    return (
        f"| {judged['segments_count']} | {judged['states_count']} "
        f"| {100 * judged['same_clock_ratio']:.0f} % | {judged['mean_gap_mhz']:.0f} "
        f"| {100 * judged['violation_ratio']:.0f} % |"
    )


def main() -> None:
    """Measure and write."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--quick", action="store_true", help="few samples")
    arguments = parser.parse_args()
    if not arguments.page:
        measure(*((200, 20) if arguments.quick else (3000, 200)))
    write_page()
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
