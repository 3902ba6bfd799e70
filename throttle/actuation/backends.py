"""Makes the backend that a configuration names."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from throttle.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from throttle.actuation.backend import ClockDriver, GpuBackend

BackendKind = Literal["simulated", "nvml", "observe"]


def make_clock_driver(kind: BackendKind, simulated_gpus: Path | None = None) -> ClockDriver:
    """Open no more of a driver than setting clocks takes; touches no clock.

    Args:
        kind: As for `make_backend`.
        simulated_gpus: State file, for simulated GPUs.

    Raises:
        As `make_backend`.
    """
    if kind != "nvml":
        return make_backend(kind, simulated_gpus)
    from throttle.actuation.nvml_clocks import NvmlClocks  # noqa: PLC0415 - only what is used

    return NvmlClocks()


def make_backend(
    kind: BackendKind,
    simulated_gpus: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> GpuBackend:
    """Open a driver; touches no clock.

    Args:
        kind: simulated, nvml, or observe: NVIDIA GPUs, read and never written.
        simulated_gpus: State file, for simulated GPUs.
        clock: Seconds, for devices that keep no time of their own.

    Raises:
        DriverError: There is no driver, or it cannot be used.
        NotFoundError: The state file is not there.
        InvalidInputError: No such kind, or no state file is named.
    """
    if kind == "simulated":
        from throttle.actuation.simulated import (  # noqa: PLC0415 - only the one that is used
            SimulatedBackend,
            SimulatedGpuFile,
        )

        if simulated_gpus is None:
            raise InvalidInputError("simulated_gpus", "", "the state file of the simulated GPUs")
        return SimulatedBackend(SimulatedGpuFile.open(simulated_gpus))
    if kind not in {"nvml", "observe"}:
        raise InvalidInputError("backend", kind, "simulated, nvml, observe")
    from throttle.actuation.nvml import NvmlBackend  # noqa: PLC0415 - only the one that is used

    backend = NvmlBackend(clock)
    if kind == "nvml":
        return backend
    from throttle.actuation.observe import ObserveBackend  # noqa: PLC0415 - as above

    return ObserveBackend(backend)
