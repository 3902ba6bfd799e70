"""Plays simulated engines that connect, crash and return, and watches what the daemon keeps.

Fails when memory grows, a lease is lost, a clock stays locked, an engine does not come back, a
decision takes too long, or the daemon ends. A trial first tells what a state costs here: if the
machine does not carry the load that is asked for, the engines get fewer requests, and the table
says so. Use: soak.py [--minutes 30] [--engines 32] [--iterations-per-second 50] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from soak_report import Report

from throttle.actuation.simulated import SimulatedGpuFile
from throttle.commands.playing import gpu_entries, wait_until_reachable
from throttle.errors import ThrottleError
from throttle.simulation.plant import Plant

if TYPE_CHECKING:
    from collections.abc import Callable

PLANT = "h200-qwen3-30b-a3b"
#: Makes about 50 iterations a second of each engine: one request after the other.
REQUESTS_PER_SECOND = 1.0
#: Engines of one process: they crash together.
GROUP_COUNT = 4
#: Length of a trial and of what comes before it; trials, and how near the last must come.
TRIAL_SECONDS, WARMING_SECONDS = 20.0, 5.0
TRIALS_COUNT, TRIAL_TOLERANCE_RATIO = 6, 0.2
#: Growth is judged after this part of the time, or after five minutes if they come sooner.
SETTLING_RATIO = 0.3
SETTLING_SECONDS = 300.0
#: Memory at either end is the mean over this time, or a fifth of all: engines come and go.
MEAN_SECONDS = 60.0
#: A killed engine's GPUs must be at default clocks, and a returning one be registered, within it.
DEADLINE_SECONDS = 60.0
SAMPLE_SECONDS, POLL_SECONDS = 5.0, 0.2
#: As image and systemd unit set it: fewer heaps for threads that come and go.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "2"}
_SAMPLE = re.compile(r"^(\w+)(\{.*\})? (\S+)$", re.MULTILINE)
_BOUND = re.compile(r'le="([^"]+)"')


class Daemon:
    """The daemon under test."""

    def __init__(self, folder: Path, gpus: Path, bundles: Path, port: int) -> None:
        self.target = f"unix:{folder / 'throttle.sock'}"
        self._url = f"http://127.0.0.1:{port}/metrics"
        with (folder / "daemon.log").open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own command
                [
                    sys.executable, "-m", "throttle.cli", "serve", "--log-level", "warning",
                    "--socket", folder / "throttle.sock", "--simulated-gpus", gpus,
                    "--bundles", bundles, "--metrics-address", f"127.0.0.1:{port}",
                ],
                stdout=log, stderr=log, env={**ENVIRONMENT, **os.environ},
            )  # fmt: skip
        try:
            wait_until_reachable(self.target, 120.0, lambda: self.process.poll() is None)
        except ThrottleError:
            self.process.terminate()
            raise

    def metrics(self) -> dict[str, float]:
        """Every sample, summed over its labels, histogram buckets apart."""
        with urllib.request.urlopen(self._url, timeout=30) as answer:  # noqa: S310 - our own address
            text = answer.read().decode()
        found: dict[str, float] = {}
        for name, labels, value in _SAMPLE.findall(text):
            bound = _BOUND.search(labels)
            key = f"{name}:{bound[1]}" if bound else name
            found[key] = found.get(key, 0.0) + float(value)
        return found

    def processor_seconds(self) -> float:
        """Of the process and all below it."""
        return sum(map(_processor_seconds, _with_descendants(self.process.pid)))

    def memory_bytes(self) -> float:
        """What the process and all below it have allocated; libraries are left out.

        Pages of libraries are shared with engines that come and go, so their share moves.
        """
        return sum(map(_proportional_bytes, _with_descendants(self.process.pid)))


class Group:
    """Some engines in one process."""

    def __init__(
        self, first: int, count: int, gpus: Path, target: str, log: Path, *, rate: float
    ) -> None:
        self.uuids = [f"GPU-simulated-{number}" for number in range(first, first + count)]
        self._log = log
        self._command = [
            sys.executable, "-m", "throttle.cli", "simulate", "--gpus-file", str(gpus),
            "--target", target, "--plant", PLANT, "--engines", str(count),
            "--first-engine", str(first), "--requests-per-second",
        ]  # fmt: skip
        self.requests_per_second = rate
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Connect."""
        with self._log.open("ab") as log:
            command = [*self._command, str(self.requests_per_second)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603

    def end(self, number: signal.Signals) -> None:
        """Crash or leave."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None


def soak(arguments: argparse.Namespace, report: Report) -> None:
    """Play, crash and watch for the time given."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    gpus, names = out / "gpus", [f"GPU-simulated-{number}" for number in range(arguments.engines)]
    draw = random.Random(arguments.seed)  # noqa: S311 - a plan of crashes
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(
            SimulatedGpuFile.create(gpus, gpu_entries(Plant.load(PLANT), names))
        )
        daemon = Daemon(out, gpus, arguments.bundles, arguments.port)
        stack.callback(daemon.process.kill)
        groups = [
            Group(first, min(GROUP_COUNT, arguments.engines - first), gpus, daemon.target,
                  out / "engines.log", rate=arguments.requests_per_second)
            for first in range(0, arguments.engines, GROUP_COUNT)
        ]  # fmt: skip
        for group in groups:
            stack.callback(group.end, signal.SIGKILL)
        _try_out(report, daemon, groups)
        for group in groups:
            group.requests_per_second = report.requests_per_second
            group.start()
        if _wait(lambda: _engines(daemon) == arguments.engines) is None:
            report.problems.append("not all engines could connect")
        before = daemon.metrics()
        _play(arguments, report, daemon, groups, file, draw)
        _sum_up(report, before, daemon.metrics())
        for group in groups:
            group.end(signal.SIGTERM)
        if _wait(lambda: not any(file.read_lock_mhz(name) for name in names)) is None:
            report.locks_left_count += sum(bool(file.read_lock_mhz(name)) for name in names)
        daemon.process.terminate()
        if (status := daemon.process.wait(60)) != 0:
            report.problems.append(f"the daemon ended with {status}")
    report.judge()


def _try_out(report: Report, daemon: Daemon, groups: list[Group]) -> None:
    """Play one group alone: what does a state cost, and how many requests can all have then?

    Again with the requests found, as iterations are not in proportion to them: many are batched.
    """
    group = groups[0]
    for _ in range(TRIALS_COUNT):
        group.start()
        _wait(lambda: _engines(daemon) == len(group.uuids))
        time.sleep(WARMING_SECONDS)
        before = _spent(daemon, group)
        time.sleep(TRIAL_SECONDS)
        after = _spent(daemon, group)
        group.end(signal.SIGTERM)
        _wait(lambda: _engines(daemon) == 0)
        states, daemon_seconds, engine_seconds = (b - a for a, b in zip(before, after, strict=True))
        report.daemon_seconds_per_state = daemon_seconds / max(states, 1.0)
        report.engine_seconds_per_state = engine_seconds / max(states, 1.0)
        report.requests_per_second = group.requests_per_second
        made = states / TRIAL_SECONDS * report.engines_count / len(group.uuids)
        wanted = report.wanted_states_per_second * min(1.0, report.carried_ratio)
        if abs(made / wanted - 1.0) < TRIAL_TOLERANCE_RATIO:
            return
        group.requests_per_second *= min(max(wanted / max(made, 1.0), 0.2), 5.0)
    print(f"nearest to {wanted:.0f} states/s: {made:.0f}; idle engines tell ten times a second")


def _spent(daemon: Daemon, group: Group) -> tuple[float, float, float]:
    """States so far, and processor time of daemon and engines."""
    assert group.process is not None  # noqa: S101 - it has been started
    states = daemon.metrics()["throttle_iterations_received_total"]
    return states, daemon.processor_seconds(), _processor_seconds(group.process.pid)


def _play(  # noqa: PLR0917 - one scene, named here only
    arguments: argparse.Namespace,
    report: Report,
    daemon: Daemon,
    groups: list[Group],
    file: SimulatedGpuFile,
    draw: random.Random,
) -> None:
    started, length = time.monotonic(), arguments.minutes * 60.0
    report.settled_seconds = min(SETTLING_SECONDS, length * SETTLING_RATIO)
    memory: list[tuple[float, float]] = []
    loads: list[float] = []
    crash_seconds = 0.0
    while (now := time.monotonic() - started) < length:
        if daemon.process.poll() is not None:
            report.problems.append(f"the daemon ended with {daemon.process.returncode}")
            return
        memory.append((now, daemon.memory_bytes()))
        loads.append(os.getloadavg()[0])
        if now >= crash_seconds:
            _crash(draw.choice(groups), report, daemon, file, arguments.engines)
            crash_seconds = now + draw.uniform(0.5, 1.5) * arguments.crash_seconds
        print(f"{now:6.0f} s  {memory[-1][1] / 1e6:6.1f} MB  {report.crashes_count} crashes",
              flush=True)  # fmt: skip
        time.sleep(SAMPLE_SECONDS)
    report.seconds = time.monotonic() - started
    report.machine_load_mean = sum(loads) / len(loads)
    after = [each for seconds, each in memory if seconds >= report.settled_seconds]
    part = max(1, min(len(after) // 5, round(MEAN_SECONDS / SAMPLE_SECONDS)))
    report.memory_settled_bytes = sum(after[:part]) / part
    report.memory_end_bytes = sum(after[-part:]) / part


def _crash(
    group: Group, report: Report, daemon: Daemon, file: SimulatedGpuFile, engines_count: int
) -> None:
    """Kill a process of engines; their GPUs must be given back, and they must come back."""
    group.end(signal.SIGKILL)
    report.crashes_count += 1
    seconds = _wait(lambda: not any(file.read_lock_mhz(uuid) for uuid in group.uuids))
    if seconds is None:
        report.locks_left_count += sum(bool(file.read_lock_mhz(uuid)) for uuid in group.uuids)
    report.release_seconds_maximum = max(report.release_seconds_maximum, seconds or 0.0)
    if _wait(lambda: _engines(daemon) == engines_count - len(group.uuids)) is None:
        report.problems.append(f"crash {report.crashes_count}: dead engines are still served")
    group.start()
    seconds = _wait(lambda: _engines(daemon) == engines_count)
    if seconds is None:
        report.problems.append(
            f"crash {report.crashes_count}: {_engines(daemon):.0f} of {engines_count} engines came "
            "back"
        )
    report.return_seconds_maximum = max(report.return_seconds_maximum, seconds or 0.0)


def _sum_up(report: Report, before: dict[str, float], after: dict[str, float]) -> None:
    gained = {name: value - before.get(name, 0.0) for name, value in after.items()}
    received = gained["throttle_iterations_received_total"]
    report.states_per_second = received / report.seconds if report.seconds else 0.0
    report.overtaken_ratio = gained["throttle_iterations_dropped_total"] / max(received, 1.0)
    report.decision_p50_seconds = _quantile(gained, 0.5)
    report.decision_p99_seconds = _quantile(gained, 0.99)
    report.leases_lost_count = round(gained["throttle_leases_expired_total"])
    if gained["throttle_faults_total"]:
        report.problems.append(f"{gained['throttle_faults_total']:.0f} decisions failed")


def _quantile(metrics: dict[str, float], share: float) -> float:
    """Of a decision's duration, linear between the histogram's bounds, as Prometheus has it."""
    prefix = "throttle_decision_duration_seconds_bucket:"
    buckets = sorted(
        (float(name.removeprefix(prefix)), count)
        for name, count in metrics.items()
        if name.startswith(prefix)
    )
    wanted, low, below = share * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted and count > below:
            return low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return 0.0


def _engines(daemon: Daemon) -> float:
    return daemon.metrics()["throttle_engines_count"]


def _wait(condition: Callable[[], bool]) -> float | None:
    """Seconds until a condition holds; None when it does not in time."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > DEADLINE_SECONDS:
            return None
        time.sleep(POLL_SECONDS)
    return time.monotonic() - started


def _with_descendants(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # it has ended meanwhile
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _proportional_bytes(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0  # it has ended meanwhile
    line = next(line for line in text.splitlines() if line.startswith("Pss_Anon:"))
    return float(line.split()[1]) * 1024


def main() -> int:
    """Run; 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--engines", type=int, default=32)
    parser.add_argument(
        "--iterations-per-second", type=float, default=50.0, help="of each engine (%(default)s)"
    )
    parser.add_argument(
        "--requests-per-second",
        type=float,
        default=REQUESTS_PER_SECOND,
        help="of each engine in the trial; what follows is scaled to the iterations that are "
        "wanted, and to what the machine carries (%(default)s)",
    )
    parser.add_argument("--crash-seconds", type=float, default=20.0, help="mean time between them")
    parser.add_argument("--bundles", type=Path, default=Path("models"))
    parser.add_argument("--port", type=int, default=19470, help="for the daemon's metrics")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/soak"))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started must end, too
    report = Report(arguments.engines, arguments.engines * arguments.iterations_per_second)
    report.crashed_together_count = GROUP_COUNT
    soak(arguments, report)
    text = json.dumps(asdict(report), indent=2)
    (arguments.out / "report.json").write_text(text + "\n", "utf-8")
    (arguments.out / "report.md").write_text(report.table() + "\n", "utf-8")
    print(report.table())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
