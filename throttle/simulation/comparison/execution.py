"""Runs over local processes, a Dask cluster, or this process; progress with the time left."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from throttle.errors import ThrottleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TextIO

T = TypeVar("T")
R = TypeVar("R")


class Executor(Protocol):
    """Maps a function over tasks somewhere."""

    def __enter__(self) -> Self:
        """Start."""
        ...

    def __exit__(self, *_: object) -> None:
        """Stop."""
        ...

    def map(
        self, function: Callable[[T], R], tasks: Sequence[T], done: Callable[[], None]
    ) -> list[R]:
        """Results in the order of the tasks; `done` is called as each one ends."""
        ...


class InProcess:
    """One task after another, here."""

    def __enter__(self) -> Self:
        """Nothing to start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to stop."""

    def map(
        self, function: Callable[[T], R], tasks: Sequence[T], done: Callable[[], None]
    ) -> list[R]:
        """Results in the order of the tasks."""
        results = []
        for task in tasks:
            results.append(function(task))
            done()
        return results


class LocalProcesses:
    """Processes of their own, started afresh (spawn), each with one thread.

    Args:
        jobs: How many.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        """Start the processes."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited: workers share the cores already
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self._jobs, mp_context=context)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop them; what has not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(
        self, function: Callable[[T], R], tasks: Sequence[T], done: Callable[[], None]
    ) -> list[R]:
        """Results in the order of the tasks; the first failure ends all.

        Raises:
            ThrottleError: `with` is missing.
        """
        if self._pool is None:
            raise ThrottleError("LocalProcesses is used outside its `with` block; enter it first")
        futures: list[Future[R]] = [self._pool.submit(function, task) for task in tasks]
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                future.result()
                done()
        return [future.result() for future in futures]


class DaskCluster:
    """Workers of a Dask cluster, which must have this package and the files that runs name.

    Args:
        scheduler: Address of the scheduler.
    """

    def __init__(self, scheduler: str) -> None:
        self._scheduler = scheduler
        self._client: Any = None
        self._distributed: Any = None

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            ThrottleError: Dask is not installed, or no scheduler answers.
        """
        try:
            self._distributed = importlib.import_module("distributed")
        except ImportError:
            raise ThrottleError(
                "--dask needs the package distributed, which is not installed; install it, or "
                "leave --dask out for local processes"
            ) from None
        try:
            self._client = self._distributed.Client(self._scheduler, timeout="10s")
        except OSError as error:
            raise ThrottleError(
                f"no Dask scheduler at {self._scheduler}: {error}; start one, or leave --dask out"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect."""
        if self._client is not None:
            self._client.close()

    def map(
        self, function: Callable[[T], R], tasks: Sequence[T], done: Callable[[], None]
    ) -> list[R]:
        """Results in the order of the tasks."""
        futures = self._client.map(function, tasks, pure=False)
        for future in self._distributed.as_completed(futures):
            future.result()
            done()
        results: list[R] = self._client.gather(futures)
        return results


class Progress:
    """How many tasks are done and how long the rest will take, on stderr.

    A live line on a terminal; elsewhere a line about each ten seconds.

    Args:
        what: What is being done.
        count: Tasks.
        stream: Where to write; None for stderr.
    """

    def __init__(self, what: str, count: int, stream: TextIO | None = None) -> None:
        self._what, self._count = what, count
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._done = 0
        self._started = self._shown = time.monotonic()
        if count:
            self._show("")

    def done(self) -> None:
        """One more task has ended."""
        self._done += 1
        now = time.monotonic()
        last = self._done == self._count
        if not (self._live or last or now - self._shown >= 10.0):
            return
        self._shown = now
        spent = now - self._started
        left = spent / self._done * (self._count - self._done)
        self._show(f", {_minutes(spent)} in all" if last else f", about {_minutes(left)} left")
        if last and self._live:
            self._stream.write("\n")

    def _show(self, rest: str) -> None:
        line = f"{self._what}: {self._done} of {self._count}{rest}"
        self._stream.write(f"\r\x1b[K{line}" if self._live else f"{line}\n")
        self._stream.flush()


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90.0 else f"{seconds / 60.0:.1f} min"
