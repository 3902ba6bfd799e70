"""`throttle demo`: a real daemon and trace, a simulated GPU; at maximum clock and throttled."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from throttle import __version__
from throttle.actuation.simulated import SimulatedGpuFile
from throttle.commands.playing import Play, gpu_entries, wait_until_reachable
from throttle.control.state import Mode, Slos
from throttle.errors import ThrottleError
from throttle.simulation.experiment import on_common_horizon
from throttle.simulation.plant import Plant
from throttle.simulation.report import write_report
from throttle.simulation.workload import OpenLoop, load_trace

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from throttle.commands.playing import Answers
    from throttle.simulation.engine import SimulatedEngine
    from throttle.simulation.experiment import RunResult
    from throttle.simulation.gpu import SimulatedGpu
    from throttle.simulation.workload import Trace

#: The chat profile: limits of an interactive assistant.
CHAT_SLOS = Slos(ttft_seconds=1.0, tpot_seconds=0.05)
_START_TIMEOUT_SECONDS = 60.0
_STOP_TIMEOUT_SECONDS = 10.0
#: The run at default clocks is played in shadow mode: the daemon decides and touches nothing.
_RUNS = (("max", "GPU-simulated-0", Mode.SHADOW), ("throttle", "GPU-simulated-1", Mode.ACT))


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "demo",
        help="play a real trace on a simulated GPU, at maximum clock and throttled",
        description="Start a daemon, play a request trace on a simulated engine through the "
        "client stub twice, at maximum clock and under control, and compare. All figures are "
        "simulated.",
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results")
    parser.add_argument("--trace", default="azure2023_conv_10min", help="shipped trace or CSV file")
    parser.add_argument("--plant", default="h200-qwen3-30b-a3b", help="shipped plant or TOML file")
    parser.add_argument("--bundles", type=Path, default=Path("models"), help="folder of bundles")
    parser.add_argument("--minutes", type=float, default=10.0, help="part of the trace to play")
    parser.add_argument("--seed", type=int, default=1, help="seed of chip, noise and switch delays")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 0 when both runs are done."""
    plant = Plant.load(arguments.plant)
    seconds = arguments.minutes * 60.0
    trace = load_trace(arguments.trace).window(0.0, seconds)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, RunResult] = {}
    answers: dict[str, Answers] = {}
    with tempfile.TemporaryDirectory(prefix="throttle-demo-") as folder:
        path = Path(folder) / "gpus"
        uuids = [uuid for _, uuid, _ in _RUNS]
        with (
            SimulatedGpuFile.create(path, gpu_entries(plant, uuids)) as file,
            _daemon(Path(folder), path, arguments.bundles, out / "daemon.log") as target,
        ):
            for name, uuid, mode in _RUNS:
                play = Play(plant, uuid, arguments.seed, name, mode, CHAT_SLOS, seconds)
                with _Progress(name, trace) as progress:
                    source = OpenLoop(trace.requests)
                    results[name], answers[name] = play.run(file, target, source, progress.show)
    results = on_common_horizon(results)
    summary = _summary(results, answers, trace, plant)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_report(
        out / "report.html",
        results,
        title=f"{plant.architecture.name} on one simulated {plant.parameters.gpu.name}",
        subtitle=f"The first {arguments.minutes:g} minutes of {trace.name}, served at maximum "
        "clock and under control of a daemon over gRPC.",
        ttft_seconds=CHAT_SLOS.ttft_seconds or 0.0,
        tpot_seconds=CHAT_SLOS.tpot_seconds or 0.0,
        slack_seconds={name: each.slack_seconds for name, each in answers.items()},
        notes=[
            (
                "The shipped trace is part of the Azure LLM inference dataset 2023 (CC-BY 4.0, "
                "github.com/Azure/AzurePublicDataset)."
            ),
            "Decisions are timed inside the daemon, back to back; the player awaits each answer.",
        ],
        more_figures={
            name: _quantiles("decision", each.decision_seconds) for name, each in answers.items()
        },
    )
    _print_table(summary)
    print(f"\n{out / 'report.html'}  {out / 'summary.json'}")
    return 0


@contextlib.contextmanager
def _daemon(folder: Path, gpus: Path, bundles: Path, log: Path) -> Iterator[str]:
    """A daemon of its own process on a Unix socket, ended by SIGTERM."""
    target = f"unix://{folder / 'throttle.sock'}"
    command = [sys.executable, "-m", "throttle.cli", "serve"]
    command += ["--socket", str(folder / "throttle.sock"), "--backend", "simulated"]
    command += ["--simulated-gpus", str(gpus), "--bundles", str(bundles)]
    # simulated time runs faster: answers wait for the GPU, and changes are paced by simulated time
    command += ["--actuation-answer-wait-seconds", "30"]
    command += ["--actuation-lowering-interval-seconds", "0"]
    command += ["--actuation-raises-per-second", "1000000"]
    command += ["--log-format", "json"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)  # noqa: S603 - ours
        try:
            running = lambda: process.poll() is None  # noqa: E731 - said once
            wait_until_reachable(target, _START_TIMEOUT_SECONDS, running)
            yield target
        finally:
            process.terminate()
            code = process.wait(_STOP_TIMEOUT_SECONDS)
        if code != 0:
            raise ThrottleError(f"the daemon ended with {code}; see {log}")


class _Progress:
    """How far a run is: a live line on a terminal, a line a minute elsewhere."""

    def __init__(self, name: str, trace: Trace) -> None:
        from rich.console import Console  # noqa: PLC0415 - only a terminal needs it
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

        self._name = name
        self._end_seconds = trace.duration_seconds
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=self._end_seconds, state="starting")
        self._next_line_seconds = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, now_seconds: float, gpu: SimulatedGpu, engine: SimulatedEngine) -> None:
        """Show the state at a simulated time."""
        state = (
            f"{now_seconds:5.0f} s of {self._end_seconds:.0f}  {gpu.clock_mhz:4d} MHz  "
            f"{engine.running_count:3d} running  {engine.waiting_count:3d} waiting  "
            f"{gpu.energy_joules / 1e3:7.1f} kJ"
        )
        self._bar.update(self._task, completed=now_seconds, state=state)
        if not self._console.is_terminal and now_seconds >= self._next_line_seconds:
            self._next_line_seconds = now_seconds + 60.0
            print(f"{self._name:>8}  {state}  (simulated)", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class _Row:
    key: str
    label: str
    unit: str
    scale: float = 1.0
    digits: int = 1


_ROWS = (
    _Row("energy_joules", "energy", "kJ", 1e-3),
    _Row("energy_per_output_token_joules", "energy per output token", "J", 1.0, 3),
    _Row("attainment_ratio", "SLO attainment", "%", 100.0, 2),
    _Row("ttft_p99_seconds", "TTFT p99", "ms", 1e3, 0),
    _Row("tpot_p99_seconds", "TPOT p99", "ms", 1e3),
    _Row("requests_count", "requests", "", 1.0, 0),
    _Row("output_tokens_count", "output tokens", "", 1.0, 0),
    _Row("clock_changes_count", "clock changes", "", 1.0, 0),
    _Row("decision_p50_seconds", "decision p50", "ms", 1e3, 2),
    _Row("decision_p99_seconds", "decision p99", "ms", 1e3, 2),
)


def _summary(
    results: dict[str, RunResult], answers: dict[str, Answers], trace: Trace, plant: Plant
) -> dict[str, object]:
    summary: dict[str, object] = {
        "simulated": True,
        "version": __version__,
        "plant": plant.parameters.name,
        "trace": trace.name,
        "ttft_limit_seconds": CHAT_SLOS.ttft_seconds,
        "tpot_limit_seconds": CHAT_SLOS.tpot_seconds,
    }
    for name, result in results.items():
        noted = answers[name]
        summary[name] = {
            **result.summary(CHAT_SLOS.ttft_seconds or 0.0, CHAT_SLOS.tpot_seconds or 0.0),
            **_quantiles("decision", noted.decision_seconds),
            **_quantiles("round_trip", noted.round_trip_seconds),
            "decisions_count": len(noted.decision_seconds),
            "reasons_count": noted.reasons_count,
        }
    throttled, fastest = results["throttle"], results["max"]
    summary["energy_ratio"] = throttled.energy_joules / fastest.energy_joules
    return summary


def _quantiles(name: str, seconds: list[float]) -> dict[str, float]:
    median, tail = np.quantile(seconds, [0.5, 0.99])
    return {f"{name}_p50_seconds": float(median), f"{name}_p99_seconds": float(tail)}


def _print_table(summary: dict[str, object]) -> None:
    from rich.console import Console  # noqa: PLC0415 - as above
    from rich.table import Table  # noqa: PLC0415

    fastest, throttled = summary["max"], summary["throttle"]
    assert isinstance(fastest, dict)  # noqa: S101 - built above
    assert isinstance(throttled, dict)  # noqa: S101
    table = Table(title="simulated: maximum clock against throttle", title_justify="left")
    table.add_column("")
    for heading in ("max", "throttle", "ratio"):
        table.add_column(heading, justify="right")
    for row in _ROWS:
        left, right = fastest[row.key] * row.scale, throttled[row.key] * row.scale
        ratio = f"{right / left:.3f}" if left else ""
        unit = f" {row.unit}" if row.unit else ""
        table.add_row(
            row.label, f"{left:,.{row.digits}f}{unit}", f"{right:,.{row.digits}f}{unit}", ratio
        )
    Console().print(table)
