"""A bounded load for engines that serve the OpenAI completions protocol, and what came of it.

Requests are sent when they are due (open loop), never more at once than a stated number. Prompts
are lists of random token numbers: their length is exact whatever the tokenizer, and no prefix cache
knows them.
"""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from throttle.errors import InvalidInputError, ThrottleError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Sequence

    from throttle.simulation.requests import Request

#: Token numbers that prompts are drawn from: ordinary words in every vocabulary of today's models.
_TOKEN_NUMBERS = (1000, 20_000)

#: So many failures in a row mean that the engine is gone; more load would not bring it back.
_FAILURES_LIMIT = 20


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go.

    Attributes:
        url: Base of the server, such as http://127.0.0.1:8000.
        model: Name that the server knows the model by.
        ignore_eos: Ask for every token of the planned output (vLLM and SGLang understand that).
        timeout_seconds: Longest silence of the server within a request.
    """

    url: str
    model: str
    ignore_eos: bool = False
    timeout_seconds: float = 120.0

    def __post_init__(self) -> None:
        """Refuse what is no address.

        Raises:
            InvalidInputError: Naming the value.
        """
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise InvalidInputError("url", self.url, "http:// or https:// and a host")
        if not self.timeout_seconds > 0.0:
            raise InvalidInputError("timeout_seconds", self.timeout_seconds, "above 0")

    def connect(self) -> http.client.HTTPConnection:
        """A connection of its own for each request, closed by whoever asked for it."""
        parts = urllib.parse.urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert parts.hostname is not None  # noqa: S101 - checked when made
        return kind(parts.hostname, parts.port, timeout=self.timeout_seconds)

    @property
    def path(self) -> str:
        """Path of the completions."""
        return urllib.parse.urlsplit(self.url).path.rstrip("/") + "/v1/completions"


@dataclass(frozen=True, slots=True)
class Limits:
    """When a load ends.

    Attributes:
        duration_seconds: No request is sent after this.
        requests_count: No more than these are sent.
        concurrency_count: No more than these are under way at once; others are sent late.
        drain_seconds: After `duration_seconds`, running requests are given up after this.
    """

    duration_seconds: float
    requests_count: int = 1_000_000
    concurrency_count: int = 256
    drain_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Refuse limits that end nothing.

        Raises:
            InvalidInputError: Naming the value.
        """
        for name in ("duration_seconds", "requests_count", "concurrency_count", "drain_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidInputError(name, getattr(self, name), "finite, above 0")


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request went.

    Attributes:
        late_seconds: Sent so long after it was due.
        ttft_seconds: From sending to the first token; None without one.
        tpot_seconds: Mean gap between tokens; None with fewer than two.
        output_tokens: Tokens that came.
        failure: Why it failed; empty if it did not.
    """

    late_seconds: float
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    output_tokens: int = 0
    failure: str = ""


class LoadGenerator:
    """Sends requests when they are due and times the answers.

    Args:
        endpoint: Where they go.
        limits: When to stop.
        clock: Monotonic seconds.
        generator: Draws the prompts.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        limits: Limits,
        clock: Callable[[], float],
        generator: random.Random,
    ) -> None:
        self._endpoint, self._limits, self._clock = endpoint, limits, clock
        self._generator = generator
        self._stopped = threading.Event()
        self._slots = threading.Semaphore(limits.concurrency_count)
        self._lock = threading.Lock()  # guards the three below
        self._answers: list[Answer] = []
        self._failures_in_a_row = 0
        self._given_up = ""
        self._began = 0.0

    def run(self, requests: Iterable[Request]) -> list[Answer]:
        """Send until a limit is reached; returns when every request has ended.

        Args:
            requests: In order of arrival.

        Raises:
            ThrottleError: The engine failed many requests in a row.
        """
        self._began = self._clock()
        with ThreadPoolExecutor(self._limits.concurrency_count, "load") as pool:
            try:
                for request in itertools.islice(requests, self._limits.requests_count):
                    if not self._wait_for(request):
                        break
                    numbers = range(*_TOKEN_NUMBERS)
                    prompt = self._generator.choices(numbers, k=request.prompt_tokens)
                    pool.submit(self._send, request, prompt)
            except BaseException:
                self._stopped.set()  # running streams end at their next token
                raise
        if self._given_up:
            raise ThrottleError(
                f"{self._endpoint.url} failed {_FAILURES_LIMIT} requests in a row, the last: "
                f"{self._given_up}. Is the engine up, and is --model the name it serves?"
            )
        return self._answers

    def _wait_for(self, request: Request) -> bool:
        """Wait until a request is due and may be sent; False when nothing may be sent any more."""
        due = request.arrival_seconds
        if due > self._limits.duration_seconds:
            return False
        while (left := self._began + due - self._clock()) > 0.0:
            if self._stopped.wait(min(left, 1.0)):
                return False
        while not self._slots.acquire(timeout=0.2):
            if self._stopped.is_set() or self._elapsed() > self._limits.duration_seconds:
                return False
        if self._stopped.is_set() or self._elapsed() > self._limits.duration_seconds:
            self._slots.release()
            return False
        return True

    def _elapsed(self) -> float:
        return self._clock() - self._began

    def _send(self, request: Request, prompt: Sequence[int]) -> None:
        late = max(self._elapsed() - request.arrival_seconds, 0.0)
        try:
            answer = self._ask(request, prompt, late)
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer = Answer(late, failure=f"{type(error).__name__}: {error}")
        finally:
            self._slots.release()
        with self._lock:
            self._answers.append(answer)
            self._failures_in_a_row = self._failures_in_a_row + 1 if answer.failure else 0
            if self._failures_in_a_row >= _FAILURES_LIMIT:
                self._given_up = self._given_up or answer.failure
                self._stopped.set()

    def _ask(self, request: Request, prompt: Sequence[int], late: float) -> Answer:
        connection = self._endpoint.connect()
        try:
            sent = self._clock()
            body = json.dumps(self._body(request, prompt))
            headers = {"Content-Type": "application/json"}
            connection.request("POST", self._endpoint.path, body, headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                text = response.read(200).decode(errors="replace")
                return Answer(late, failure=f"status {response.status}: {text}")
            return self._timed(response, sent, late)
        finally:
            connection.close()

    def _body(self, request: Request, prompt: Sequence[int]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "prompt": prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body | {"ignore_eos": True} if self._endpoint.ignore_eos else body

    def _timed(self, response: http.client.HTTPResponse, sent: float, late: float) -> Answer:
        first = last = None
        tokens = 0
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                break
            event = json.loads(data)
            if event.get("choices"):
                last = self._clock()
                first = last if first is None else first
                tokens += 1  # servers send one event per step; usage corrects it if they do not
            if event.get("usage"):
                tokens = int(event["usage"]["completion_tokens"])
            end = self._limits.duration_seconds + self._limits.drain_seconds
            if self._stopped.is_set() or self._elapsed() > end:
                return Answer(late, failure="given up at the end of the load")
        if first is None or last is None:
            return Answer(late, failure="no token came")
        tpot = (last - first) / (tokens - 1) if tokens > 1 else None
        return Answer(late, first - sent, tpot, tokens)


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Counts and quantiles over the answers, by stable names.

    Args:
        answers: All of them.
        seconds: How long the load took.
    """
    done = [each for each in answers if not each.failure]
    tokens = sum(each.output_tokens for each in done)
    figures: dict[str, Any] = {
        "requests_count": len(answers),
        "completed_count": len(done),
        "failed_count": len(answers) - len(done),
        "late_count": sum(each.late_seconds > 0.1 for each in answers),
        "duration_seconds": seconds,
        "output_tokens_count": tokens,
        "output_tokens_per_second": tokens / seconds,
    }
    for name in ("ttft", "tpot"):
        found = [getattr(each, f"{name}_seconds") for each in done]
        values = [value for value in found if value is not None]
        for percent in (50, 99):
            quantile = float(np.quantile(values, percent / 100.0)) if values else None
            figures[f"{name}_p{percent}_seconds"] = quantile
    failures = sorted({each.failure for each in answers if each.failure})
    return figures | {"failures": failures[:5]}
