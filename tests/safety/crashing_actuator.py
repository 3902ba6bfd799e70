"""The actuator's process, made to kill itself at one step of its journal. Run by path, by tests."""

from __future__ import annotations

import os
import signal
import sys

from throttle.actuation import process
from throttle.actuation.journal import GpuRecord


def die_at(step):
    if step == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()  # the signal comes before this returns


class CrashingRecord(GpuRecord):
    """A journal whose process may die around its writes."""

    def intend(self, clock_mhz):
        die_at("before_intent")
        super().intend(clock_mhz)
        die_at("after_intent")

    def mark(self, clock_mhz):
        die_at("before_mark")
        super().mark(clock_mhz)
        die_at("after_mark")


class CrashingBackend:
    """A driver whose process may die right after it was set."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def set_maximum_clock(self, uuid, clock_mhz):
        self._backend.set_maximum_clock(uuid, clock_mhz)
        die_at("after_set")


if __name__ == "__main__":
    process.GpuRecord = CrashingRecord
    sys.exit(
        process.main(sys.argv[2], lambda orders: CrashingBackend(process.open_backend(orders)))
    )
