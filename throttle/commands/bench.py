"""`throttle bench`: what a decision costs here, as figures for a machine to read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from throttle.errors import InvalidInputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from throttle.bench.timing import Result

#: Subject -> what is timed.
_SUBJECTS = {
    "decision": "state in, decision out, in process; with and without parsing the message",
    "transport": "a state's way to a server and an answer's way back, nothing decided",
    "daemon": "a daemon of its own over a Unix socket, with one engine and with many",
    "guard": "a decision against a fixed computation; fails above --limit-ratio",
}
#: Twice what was measured when it was set, 1.6; in NumPy alone it would be about 7.
_LIMIT_RATIO = 3.2


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "bench",
        help="time a decision, the transport and the daemon",
        description="Time what stands between an engine's state and its decision, back to back "
        "and paced, on states of a simulated engine that are never the same twice.",
    )
    parser.add_argument("subject", choices=_SUBJECTS, help="; ".join(map(": ".join, _items())))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument(
        "--requests",
        type=int,
        nargs="+",
        help="running at once; default: 8 64 512 for a decision, else 64",
    )
    parser.add_argument(
        "--engines", type=int, nargs="+", default=(1, 8, 64), help="at once; default: 1 8 64"
    )
    parser.add_argument("--samples", type=int, default=3000, help="of a case; default: %(default)s")
    parser.add_argument(
        "--pacing-seconds", type=float, default=0.01, help="of paced cases; default: %(default)s"
    )
    parser.add_argument(
        "--bundles", type=Path, default=Path("models"), help="directory; default: %(default)s"
    )
    parser.add_argument(
        "--limit-ratio",
        type=float,
        default=_LIMIT_RATIO,
        help="of the guard: most that a decision may take, in reference computations; "
        "default: %(default)s",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Time and print; 0 once it is done.

    Raises:
        InvalidInputError: A count or the pace cannot be used.
    """
    if not arguments.requests:
        arguments.requests = (8, 64, 512) if arguments.subject == "decision" else (64,)
    for name in ("requests", "engines"):
        if min(getattr(arguments, name)) < 1:
            raise InvalidInputError(f"--{name}", getattr(arguments, name), "1 or more")
    if arguments.samples < 10:
        raise InvalidInputError("--samples", arguments.samples, "10 or more")
    if not 0.0 < arguments.pacing_seconds < float("inf"):
        raise InvalidInputError("--pacing-seconds", arguments.pacing_seconds, "finite, above 0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as `throttle serve` does
    if arguments.subject == "guard":
        return _guard(arguments)
    results = []
    for result in _results(arguments):
        results.append(result)
        print(_line(result), flush=True)
    if arguments.json is not None:
        document = {
            "subject": arguments.subject,
            "machine": machine(),
            "results": [each.document() for each in results],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 0


def _guard(arguments: argparse.Namespace) -> int:
    """Compare; 1 where a decision takes too long."""
    from throttle.bench.guard import decision_ratio  # noqa: PLC0415 - after OMP_NUM_THREADS
    from throttle.bench.states import shipped_predictor  # noqa: PLC0415 - likewise

    ratio = decision_ratio(shipped_predictor(arguments.bundles), arguments.samples)
    print(f"a decision takes {ratio:.2f} reference computations; at most {arguments.limit_ratio:g}")
    return 0 if ratio <= arguments.limit_ratio else 1


def machine() -> dict[str, Any]:
    """The machine in words, and how busy it is."""
    import platform  # noqa: PLC0415 - only here

    import numpy as np  # noqa: PLC0415 - after OMP_NUM_THREADS is set

    return {
        "processor": _processor(),
        "cores_count": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_average": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def _items() -> list[tuple[str, str]]:
    return list(_SUBJECTS.items())


def _results(arguments: argparse.Namespace) -> Iterator[Result]:
    from throttle.bench.states import record, shipped_predictor  # noqa: PLC0415 - after the above

    predictor = shipped_predictor(arguments.bundles)
    if arguments.subject == "decision":
        from throttle.bench.decision import bench_decision  # noqa: PLC0415 - likewise
        from throttle.bench.reference import bench_reference  # noqa: PLC0415 - likewise

        yield from bench_reference(arguments.samples, arguments.pacing_seconds)
        for count in arguments.requests:
            yield from bench_decision(predictor, count, arguments.samples, arguments.pacing_seconds)
        return
    count = arguments.requests[0]
    recorded = record(count, arguments.samples, predictor)
    if arguments.subject == "transport":
        from throttle.bench.transport import bench_transport  # noqa: PLC0415 - needs grpc

        yield from bench_transport(recorded, count, arguments.engines, arguments.pacing_seconds)
    else:
        from throttle.bench.daemon import bench_daemon  # noqa: PLC0415 - needs grpc

        yield from bench_daemon(
            recorded, count, arguments.engines, arguments.pacing_seconds, arguments.bundles
        )


def _line(result: Result) -> str:
    paced = f"paced {result.pacing_seconds:g} s" if result.pacing_seconds else "back to back"
    figures = " ".join(
        f"{name} {seconds * 1e6:.0f}"
        for name, seconds in (
            ("p50", result.p50_seconds),
            ("p99", result.p99_seconds),
            ("p99.9", result.p999_seconds),
        )
    )
    engines = result.more.get("engines_count")
    at_once = f"{engines} engines, " if engines else ""
    requests = f"{result.requests_count} requests, " if result.requests_count else ""
    text = f"{result.case}, {at_once}{requests}{paced}: {figures} us"
    if "processor_p99_seconds" in result.more:
        processor = (1e6 * result.more[f"processor_{name}_seconds"] for name in ("p50", "p99"))
        text += "; of the processor p50 {:.0f} p99 {:.0f}".format(*processor)
    for step, seconds in result.more.get("step_p50_seconds", {}).items():
        text += f"\n    {step} {seconds * 1e6:.1f} us"
    return text
