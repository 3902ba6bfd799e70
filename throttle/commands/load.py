"""`throttle load`: send a bounded load to an engine, and say how its answers fared."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from throttle.commands.loading import Endpoint, Limits, LoadGenerator, summary
from throttle.errors import InvalidInputError
from throttle.simulation.workload import Lengths, load_trace, poisson

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from throttle.simulation.requests import Request


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "load",
        help="send a bounded load to an engine that serves OpenAI completions",
        description="Send requests when they are due, from a trace or at random, time the answers "
        "and stop by itself. Prompts are lists of random token numbers.",
    )
    parser.add_argument("--url", required=True, help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="name that the server knows the model by")
    arrivals = parser.add_mutually_exclusive_group(required=True)
    arrivals.add_argument("--trace", help="shipped trace, or a .csv or .csv.gz file")
    arrivals.add_argument("--rate", type=float, help="requests per second, at random (Poisson)")
    parser.add_argument(
        "--compression", type=float, default=1.0, help="how many times faster a trace is played"
    )
    for what, low, high in (("prompt", 64, 2048), ("output", 16, 256)):
        parser.add_argument(
            f"--{what}-tokens",
            type=int,
            nargs=2,
            default=(low, high),
            metavar=("LOW", "HIGH"),
            help=f"with --rate: bounds, log-uniform between (default: {low} {high})",
        )
    parser.add_argument("--minutes", type=float, default=5.0, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=10_000, help="most; default: %(default)s")
    parser.add_argument(
        "--concurrency", type=int, default=64, help="most at once; default: %(default)s"
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="generate every planned token (vLLM, SGLang)"
    )
    parser.add_argument("--timeout-seconds", type=float, default=120.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals, lengths and prompts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Send the load; 0 when every request was answered."""
    endpoint = Endpoint(
        arguments.url,
        arguments.model,
        ignore_eos=arguments.ignore_eos,
        timeout_seconds=arguments.timeout_seconds,
    )
    limits = Limits(60.0 * arguments.minutes, arguments.requests, arguments.concurrency)
    generator = random.Random(arguments.seed)  # noqa: S311 - not a secret
    load = LoadGenerator(endpoint, limits, time.monotonic, generator)
    started = time.monotonic()
    answers = load.run(_requests(arguments, limits.duration_seconds))
    figures = summary(answers, time.monotonic() - started)
    text = json.dumps(figures, indent=1)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", "utf-8")
    print(text)
    if figures["late_count"]:
        print(
            f"{figures['late_count']} requests were sent more than 0.1 s late: raise --concurrency",
            file=sys.stderr,
        )
    return 1 if figures["failed_count"] else 0


def _requests(arguments: argparse.Namespace, duration_seconds: float) -> Iterable[Request]:
    if arguments.trace is not None:
        return load_trace(arguments.trace).compressed(arguments.compression).requests
    if not 0.0 < arguments.rate < float("inf"):
        raise InvalidInputError("--rate", arguments.rate, "finite, above 0")
    bounds = [tuple(arguments.prompt_tokens), tuple(arguments.output_tokens)]
    for name, (low, high) in zip(("prompt", "output"), bounds, strict=True):
        if not 0 < low <= high:
            raise InvalidInputError(f"--{name}-tokens", (low, high), "from 1, in order")
    generator = random.Random(f"{arguments.seed} arrivals")  # noqa: S311 - not a secret
    return poisson(arguments.rate, duration_seconds, Lengths(bounds[0], bounds[1]), generator)
