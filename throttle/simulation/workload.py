"""Requests to serve: recorded traces, open loops and closed loops."""

from __future__ import annotations

import csv
import gzip
import math
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from throttle.errors import InvalidInputError, NotFoundError
from throttle.simulation.requests import Request

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Sequence
    from typing import TextIO

    from throttle.simulation.outcomes import RequestOutcome

_TRACES = Path(__file__).parent / "traces"
_COLUMNS = ("arrival_seconds", "prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, and what was done to them.

    Attributes:
        name: File name.
        requests: The requests; arrivals count from the window's start.
        compression_ratio: How many times faster than recorded they arrive; 1 is as recorded.
    """

    name: str
    requests: tuple[Request, ...]
    compression_ratio: float = 1.0

    @property
    def duration_seconds(self) -> float:
        """Time of the last arrival."""
        return self.requests[-1].arrival_seconds if self.requests else 0.0

    def window(self, start_seconds: float, end_seconds: float) -> Trace:
        """The contiguous part with `start <= arrival < end`, numbered anew and counted from start.

        Raises:
            InvalidInputError: No request arrives in the window.
        """
        inside = [
            item for item in self.requests if start_seconds <= item.arrival_seconds < end_seconds
        ]
        if not inside:
            raise InvalidInputError(
                "window",
                f"{start_seconds:g}..{end_seconds:g} s",
                f"a window with arrivals inside 0..{self.duration_seconds:g} s of {self.name}",
            )
        moved = (
            replace(
                item, request_number=number, arrival_seconds=item.arrival_seconds - start_seconds
            )
            for number, item in enumerate(inside, start=1)
        )
        return replace(self, requests=tuple(moved))

    def compressed(self, ratio: float) -> Trace:
        """The same requests arriving `ratio` times faster; remembered in `compression_ratio`.

        Raises:
            InvalidInputError: The ratio is not above 0.
        """
        if not 0 < ratio < math.inf:
            raise InvalidInputError("compression_ratio", ratio, "a finite number above 0")
        faster = (
            replace(item, arrival_seconds=item.arrival_seconds / ratio) for item in self.requests
        )
        return replace(
            self, requests=tuple(faster), compression_ratio=self.compression_ratio * ratio
        )


def trace_names() -> tuple[str, ...]:
    """Traces that are shipped."""
    return tuple(sorted(path.name.removesuffix(".csv.gz") for path in _TRACES.glob("*.csv.gz")))


def load_trace(name: str) -> Trace:
    """A shipped trace by name, or a `.csv` or `.csv.gz` file.

    The file has the columns arrival_seconds, prompt_tokens and output_tokens, in any order, and
    optionally client_id, which becomes the requests' length class, and cached_tokens, the prompt
    tokens found in the prefix cache; other columns are ignored. Rows are ordered by arrival.

    Raises:
        NotFoundError: There is no such trace.
        InvalidInputError: A column is missing or a value is not allowed; names column and row.
    """
    path = Path(name) if name.endswith((".csv", ".csv.gz")) else _TRACES / f"{name}.csv.gz"
    if not path.is_file():
        raise NotFoundError(f"no trace {name!r}; shipped traces: {', '.join(trace_names())}")
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            return Trace(path.name, tuple(_requests(path.name, file)))
    with path.open(encoding="utf-8", newline="") as file:
        return Trace(path.name, tuple(_requests(path.name, file)))


def _requests(name: str, file: TextIO) -> Iterable[Request]:
    reader = csv.DictReader(file)
    columns = reader.fieldnames or ()
    for column in _COLUMNS:
        if column not in columns:
            raise InvalidInputError(
                f"{name}: columns", ", ".join(columns), f"a header with {', '.join(_COLUMNS)}"
            )
    last = 0.0
    for number, row in enumerate(reader, start=1):
        where = f"{name}, row {number}"
        arrival = _number(row["arrival_seconds"], f"{where}: arrival_seconds")
        if arrival < last:
            raise InvalidInputError(
                f"{where}: arrival_seconds", arrival, f"{last:g} or later: rows ordered by arrival"
            )
        last = arrival
        cached = row.get("cached_tokens") or None
        yield Request(
            request_number=number,
            arrival_seconds=arrival,
            prompt_tokens=_tokens(row["prompt_tokens"], f"{where}: prompt_tokens"),
            output_tokens=_tokens(row["output_tokens"], f"{where}: output_tokens"),
            length_class=row.get("client_id") or "",
            cached_tokens=cached and _tokens(cached, f"{where}: cached_tokens", lowest=0),
        )
    if last == 0.0 and reader.line_num < 2:
        raise InvalidInputError(f"{name}: rows", 0, "at least one request")


def _number(text: str | None, name: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InvalidInputError(name, text, "a finite number, 0 or above")
    return value


def _tokens(text: str | None, name: str, lowest: int = 1) -> int:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not lowest <= value < 2**31 or value != int(value):
        raise InvalidInputError(name, text, f"a whole number, {lowest} or above")
    return int(value)


def handed_over(
    requests: Iterable[Request], outcomes: Iterable[RequestOutcome], transfer_seconds: float
) -> list[Request]:
    """The requests of a decode engine that stands behind a prefill engine.

    Args:
        requests: What the prefill engine was given.
        outcomes: What became of them there.
        transfer_seconds: From the first token until the KV is where it is decoded.

    Returns:
        Requests in order of arrival, with their own numbers and lengths.
    """
    by_number = {item.request_number: item for item in requests}
    arrivals = [
        replace(
            by_number[item.request_number],
            arrival_seconds=item.arrival_seconds + item.e2e_seconds + transfer_seconds,
        )
        for item in outcomes
    ]
    return sorted(arrivals, key=lambda item: (item.arrival_seconds, item.request_number))


class OpenLoop:
    """Requests that arrive when they arrive, whatever the engine does.

    Args:
        requests: In order of arrival; taken one by one, so an endless series will do.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = iter(requests)
        self._next: Request | None = next(self._requests, None)

    def next_arrival_seconds(self) -> float | None:
        """Time of the next arrival; None after the last."""
        return None if self._next is None else self._next.arrival_seconds

    def take(self, now_seconds: float) -> Sequence[Request]:
        """Requests that have arrived by now, in order; each is taken once."""
        taken = []
        while self._next is not None and self._next.arrival_seconds <= now_seconds:
            taken.append(self._next)
            self._next = next(self._requests, None)
        return taken

    def finished(self, request: Request, now_seconds: float) -> None:
        """An open loop does not care."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-uniform prompt and output lengths between two bounds each, in tokens."""

    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]

    def draw(self, generator: random.Random) -> tuple[int, int]:
        """A prompt and an output length."""
        return (
            _log_uniform(generator, *self.prompt_tokens),
            _log_uniform(generator, *self.output_tokens),
        )


def _log_uniform(generator: random.Random, low: int, high: int) -> int:
    return round(math.exp(generator.uniform(math.log(low), math.log(high))))


def poisson(
    rate_per_second: float,
    duration_seconds: float,
    lengths: Lengths | Callable[[random.Random], tuple[int, int]],
    generator: random.Random,
) -> Iterable[Request]:
    """Stationary Poisson arrivals.

    Args:
        rate_per_second: Mean arrivals per second.
        duration_seconds: No arrivals after this time.
        lengths: Where prompt and output lengths come from.
        generator: Source of randomness.
    """
    draw = lengths.draw if isinstance(lengths, Lengths) else lengths
    now, number = 0.0, 0
    while (now := now + generator.expovariate(rate_per_second)) < duration_seconds:
        number += 1
        prompt, output = draw(generator)
        yield Request(number, now, prompt, output)


class ClosedLoop:
    """Holds a number of requests in the engine: when one ends, the next arrives at once.

    Args:
        concurrency: Requests held.
        duration_seconds: No arrivals after this time.
        lengths: Where prompt and output lengths come from.
        generator: Source of randomness.
    """

    def __init__(
        self,
        concurrency: int,
        duration_seconds: float,
        lengths: Lengths,
        generator: random.Random,
    ) -> None:
        self._duration = duration_seconds
        self._lengths = lengths
        self._generator = generator
        self._number = 0
        self._due: deque[Request] = deque()
        for _ in range(concurrency):
            self._send(0.0)

    def next_arrival_seconds(self) -> float | None:
        """Time of the next arrival; None when all requests are in the engine."""
        return self._due[0].arrival_seconds if self._due else None

    def take(self, now_seconds: float) -> Sequence[Request]:
        """Requests that have arrived by now, in order; each is taken once."""
        taken = []
        while self._due and self._due[0].arrival_seconds <= now_seconds:
            taken.append(self._due.popleft())
        return taken

    def finished(self, request: Request, now_seconds: float) -> None:  # noqa: ARG002 - of the protocol
        """Send the next one."""
        if now_seconds < self._duration:
            self._send(now_seconds)

    def _send(self, now_seconds: float) -> None:
        self._number += 1
        self._due.append(Request(self._number, now_seconds, *self._lengths.draw(self._generator)))
