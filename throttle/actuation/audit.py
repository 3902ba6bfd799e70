"""The log of the privileged process and of its parent: one line for each event."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from throttle.actuation.hand import ClockChange

_LINES_LIMIT: Final = 1000


def log_line(event: str, level: str, fields: dict[str, object], *, as_json: bool) -> str:
    """One event as a line of text, or of JSON."""
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    if as_json:
        return json.dumps({**fields, "event": event, "level": level, "timestamp": now})
    pairs = " ".join(f"{name}={value!r}" for name, value in fields.items())
    return f"{now} [{level:<7}] {event:<30} {pairs}"


def write_line(line: str) -> None:
    """Write to standard error, whole."""
    os.write(2, line.encode() + b"\n")


class AuditLog:
    """One line for each event, written aside: who reads them may not hold up the process."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._lines: queue.Queue[str] = queue.Queue(_LINES_LIMIT)
        self._dropped_count = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def __call__(self, event: str, level: str = "info", **fields: object) -> None:
        """Log; lines are dropped and counted when nobody takes them."""
        if self._dropped_count:
            fields["dropped_lines_count"] = self._dropped_count
        try:
            self._lines.put_nowait(log_line(event, level, fields, as_json=self._as_json))
        except queue.Full:
            self._dropped_count += 1

    def change(self, change: ClockChange) -> None:
        """Log one write."""
        level = "error" if change.problem else "info"
        self("clock_written", level, **dataclasses.asdict(change))

    def flush(self, timeout_seconds: float) -> None:
        """Wait until lines are out, for a while."""
        deadline = time.monotonic() + timeout_seconds
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            write_line(line)
            self._lines.task_done()
