"""Sends an engine's states from a process beside it; the engine pays for a write to a socket.

gRPC's own threads would compute in the engine's process, and take the interpreter's lock from its
loop several times an iteration: a millisecond of each (docs/integration.md). Here the engine's
thread serializes a state and writes it to a socket pair without waiting. `throttle.engines.sender`
reads the other end and owns the stream. It says nothing by itself: an engine that dies closes the
socket and with it the stream, and one that hangs lets the lease run out.
"""

from __future__ import annotations

import json
import logging
import random
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from throttle.client import ReconnectBackoff
from throttle.outbox import CARRIED_EVENTS_LIMIT, COMPLETED_STATES_LIMIT, Outbox
from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from throttle.engines.options import EngineOptions
    from throttle.engines.reporter import StateSink

#: Bytes of the length before each message, little-endian.
LENGTH_BYTES: Final = 4

_NOTHING: Final = memoryview(b"")

_log = logging.getLogger("throttle.engines")


class Child(Protocol):
    """What is used of `subprocess.Popen`."""

    def kill(self) -> None:
        """End it at once."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: It has not ended.
        """


#: Starts a sender; returns it and the engine's end of the socket pair.
Launch: TypeAlias = "Callable[[], tuple[Child, socket.socket]]"


def connect_aside(options: EngineOptions, registration: engine_pb2.EngineRegistration) -> StateSink:
    """Report from a process of its own; from this one where none can be started.

    Raises:
        OSError: A certificate, key or token cannot be read.
        ValueError: One of them is unusable, or the registration is.
    """
    options.read_credentials()  # an error belongs here, not in the sender's log
    try:
        return SenderProcess(options, registration)
    except OSError as error:
        _log.warning("no process to report from (%s): the engine's own reports", error)
        return options.connect(registration)


class SenderProcess:
    """The engine's side of a sender process.

    States pass through the same `Outbox` as a client's: while the socket takes them each goes out
    at once; behind a sender that does not read the newest wins, completed iterations wait in a
    short line and no event is lost; what waits goes out with the next state or heartbeat, and until
    then the lease may run out, which is safe. A sender that has ended is replaced after a pause, on
    a thread of its own, and told of every live request.
    """

    def __init__(
        self,
        options: EngineOptions,
        registration: engine_pb2.EngineRegistration,
        *,
        backoff: ReconnectBackoff | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
        launch: Launch | None = None,
    ) -> None:
        """Start the sender.

        Args:
            options: What the sender connects with.
            registration: What it registers.
            backoff: Pauses before a sender that has ended is replaced.
            clock: Monotonic seconds.
            draw: Random numbers in [0, 1) for the pauses.
            launch: Starts a sender.

        Raises:
            OSError: None can be started.
        """
        settings = json.dumps(asdict(options)).encode()
        self._greeting = framed(settings) + framed(registration.SerializeToString())
        self._backoff = backoff or ReconnectBackoff(initial_seconds=1.0, maximum_seconds=60.0)
        self._clock = clock
        self._draw = draw
        self._launch = launch or _launch
        self._lock = threading.Lock()  # guards what follows
        self._outbox = Outbox(CARRIED_EVENTS_LIMIT, COMPLETED_STATES_LIMIT)
        self._socket: socket.socket | None = None
        self._idle_socket: socket.socket | None = None  # the same while it has taken everything
        self._child: Child | None = None
        self._unsent = _NOTHING  # the rest of a message that the socket took a part of
        self._replay = False
        self._starting = False
        self._started_seconds = 0.0
        self._retry_seconds = 0.0
        self._failures_count = 0
        self._closed = False
        self._refused_count = 0
        self._begin(*self._launch())

    @property
    def refused_count(self) -> int:
        """Submissions that were no `IterationState`, or failed."""
        return self._refused_count

    @property
    def failures_count(self) -> int:
        """Senders in a row that ended early or could not be started."""
        return self._failures_count

    def submit(self, state: engine_pb2.IterationState) -> None:
        """Hand in a state; returns at once and never raises. See `ThrottleClient.submit`."""
        try:
            if not isinstance(state, engine_pb2.IterationState):
                self._refused_count += 1
                return
            with self._lock:
                # a state alone, and all before it written: nearly always
                if self._idle_socket is not None and not state.request_events:
                    if self._write_directly(self._idle_socket, state):
                        return
                elif self._closed:
                    return
                full = self._outbox.put(state, connected=self._socket is not None)
                if self._socket is None:
                    self._start_again()
                elif full:
                    self._lose("it does not read")
                else:
                    self._write(self._socket)
        except Exception:  # noqa: BLE001 - the engine's loop must never see an error of ours
            self._refused_count += 1

    def close(self, timeout_seconds: float = 2.0) -> None:
        """End the stream, which returns the GPUs to default clocks; further calls do nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            child, ours = self._child, self._socket
            if ours is not None:
                self._write(ours)
            self._drop_socket()
        if child is not None:
            _end(child, timeout_seconds)

    def _write_directly(self, idle: socket.socket, state: engine_pb2.IterationState) -> bool:
        """Write a state that no event travels with; returns whether the socket took any of it."""
        message = framed(state.SerializeToString())
        try:
            sent = idle.send(message)
        except OSError:  # full or closed: `_write` finds out
            return False
        if sent < len(message):
            self._unsent = memoryview(message)[sent:]
            self._idle_socket = None
        return True

    def _write(self, ours: socket.socket) -> None:
        """Write what waits, as far as the socket takes it."""
        self._idle_socket = None
        try:
            while True:
                if not self._unsent:
                    if self._outbox.empty:
                        if not self._replay:
                            self._idle_socket = ours
                        return
                    state = self._outbox.take(replay=self._replay)
                    self._replay = False
                    self._unsent = memoryview(framed(state.SerializeToString()))
                sent = ours.send(self._unsent)
                self._unsent = self._unsent[sent:] if sent < len(self._unsent) else _NOTHING
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(str(error))

    def _begin(self, child: Child, ours: socket.socket) -> None:
        self._child, self._socket = child, ours
        self._unsent = memoryview(self._greeting)
        self._replay = True
        self._started_seconds = self._clock()
        self._write(ours)

    def _lose(self, why: str) -> None:
        """The sender is gone, or of no use."""
        if self._child is not None:
            self._child.kill()
        self._drop_socket()
        self._outbox.disconnect()
        if self._clock() - self._started_seconds > self._backoff.maximum_seconds:
            self._failures_count = 0
        self._fail(why)

    def _fail(self, why: str) -> None:
        self._failures_count += 1
        pause = self._backoff.delay_seconds(self._failures_count, self._draw())
        self._retry_seconds = self._clock() + pause
        if self._failures_count == 1:
            _log.warning("the process that reports for this engine has ended (%s)", why)

    def _drop_socket(self) -> None:
        ours, self._socket, self._idle_socket = self._socket, None, None
        self._unsent = _NOTHING
        if ours is not None:
            ours.close()

    def _start_again(self) -> None:
        if self._starting or self._clock() < self._retry_seconds:
            return
        self._starting = True
        # starting a process takes milliseconds, which are not the engine's
        threading.Thread(target=self._restart, name="throttle-sender", daemon=True).start()

    def _restart(self) -> None:
        try:
            before, self._child = self._child, None
            if before is not None:
                _end(before, 0.0)
            child, ours = self._launch()
        except OSError as error:
            with self._lock:
                self._starting = False
                self._fail(str(error))
            return
        with self._lock:
            self._starting = False
            if not self._closed:
                self._begin(child, ours)
                return
        ours.close()
        _end(child, 1.0)


def framed(message: bytes) -> bytes:
    """A message behind its length."""
    return len(message).to_bytes(LENGTH_BYTES, "little") + message


def _end(child: Child, timeout_seconds: float) -> None:
    try:
        child.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _launch() -> tuple[Child, socket.socket]:
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            # -P: the engine's working directory holds no modules of ours
            command = [sys.executable, "-P", "-m", "throttle.engines.sender", str(theirs.fileno())]
            child = subprocess.Popen(  # noqa: S603 - ourselves
                command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
            )
    except BaseException:
        ours.close()
        raise
    ours.settimeout(0.0)
    return child, ours
