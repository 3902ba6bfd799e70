"""Reads everything that the backend reads of every GPU, and prints it as JSON. Sets nothing.

A process of its own: the loader decides at its start whether NVML is the real one or the fake.
"""

from __future__ import annotations

import json
import sys
import time

from throttle.actuation.backends import make_backend
from throttle.errors import ActuationError, GpuDeniedError, NotFoundError

READINGS_COUNT = 6
PAUSE_SECONDS = 0.15


def survey():
    backend = make_backend("observe")
    try:
        gpus = {uuid: _gpu(backend, uuid) for uuid in backend.uuids()}
        return {"gpus": gpus, "unknown": _error(lambda: backend.read("GPU-none"))}
    finally:
        backend.close()


def _gpu(backend, uuid):
    readings = []
    for turn in range(READINGS_COUNT):
        if turn:
            time.sleep(PAUSE_SECONDS)
        readings.append((time.monotonic(), backend.read(uuid)))
    return {
        "name": backend.name(uuid),
        "clocks_mhz": backend.supported_clocks_mhz(uuid),
        "readings": [_reading(seconds, reading) for seconds, reading in readings],
        "set_refused": _error(lambda: backend.set_maximum_clock(uuid, 1)),
        "reset_refused": _error(lambda: backend.reset_clock(uuid)),
    }


def _reading(seconds, reading):
    return {
        "seconds": seconds,
        "clock_mhz": reading.clock_mhz,
        "power_watts": reading.power_watts,
        "energy_joules": reading.energy_joules,
        "energy_counted": reading.energy_counted,
        "temperature_celsius": reading.temperature_celsius,
        "event_reasons": int(reading.event_reasons),
        "power_scope": reading.power_scope.value,
    }


def _error(call):
    try:
        call()
    except GpuDeniedError:
        return "denied"
    except NotFoundError:
        return "not found"
    except ActuationError as error:
        return f"another: {error}"
    return "none"


if __name__ == "__main__":
    json.dump(survey(), sys.stdout)
