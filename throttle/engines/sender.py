"""The process that reports for an engine: `python -m throttle.engines.sender DESCRIPTOR`.

Started by `throttle.engines.sender_process`, which tells over the socket what to connect with, what
to register, and then each state. Ends with that socket, and the stream ends with it.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Final

from throttle.engines.options import EngineOptions
from throttle.engines.sender_process import LENGTH_BYTES
from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Pause between two looks at the socket of an engine at work. A reader that waits in the kernel is
#: woken by the engine's own write, may take its core, and is paid for by the engine.
PAUSE_SECONDS: Final = 0.005

#: Silence after which the engine counts as idle: its next write shall wake this process at once.
IDLE_SECONDS: Final = 0.5

_CHUNK_BYTES: Final = 1 << 18

_log = logging.getLogger("throttle.engines")


def chunks(
    theirs: socket.socket,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[bytes]:
    """What an engine writes, as it comes, until its end of the socket is closed."""
    read_seconds = float("-inf")
    while True:
        at_work = clock() - read_seconds < IDLE_SECONDS
        try:
            chunk = theirs.recv(_CHUNK_BYTES, socket.MSG_DONTWAIT if at_work else 0)
        except BlockingIOError:
            pause(PAUSE_SECONDS)
            continue
        if not chunk:
            return
        yield chunk
        read_seconds = clock()


def messages(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The messages in chunks of a stream; one that its end cuts off is none."""
    unread = b""
    for chunk in chunks:
        unread = unread + chunk if unread else chunk
        start = 0
        while len(unread) - start >= LENGTH_BYTES:
            body = start + LENGTH_BYTES
            end = body + int.from_bytes(unread[start:body], "little")
            if end > len(unread):
                break
            yield unread[body:end]
            start = end
        unread = unread[start:]


def forward(told: Iterator[bytes]) -> None:
    """Send what an engine tells, until it tells no more.

    Raises:
        OSError: The socket has failed, or a certificate, key or token cannot be read.
        ValueError: One of them is unusable, or the registration is.
    """
    settings, registration = next(told, None), next(told, None)
    if settings is None or registration is None:
        return  # the engine ended before it said anything
    options = EngineOptions(**json.loads(settings))
    with options.connect(engine_pb2.EngineRegistration.FromString(registration)) as client:
        for message in told:
            client.submit(engine_pb2.IterationState.FromString(message))


def main() -> None:
    """Forward until the engine's end of the socket is closed."""
    # Ctrl-C reaches the engine's whole process group; the engine says when it has ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="throttle sender: %(message)s")
    with socket.socket(fileno=int(sys.argv[1])) as theirs:
        try:
            forward(messages(chunks(theirs)))
        except (OSError, ValueError) as error:
            _log.warning("ends: %s", error)
            sys.exit(1)


if __name__ == "__main__":
    main()
