"""Looks at a machine's GPUs and says what stands between them and a daemon that sets clocks.

Reads only. What is inferred rather than read says so: no driver tells of a lock.
"""

from __future__ import annotations

import enum
import importlib.metadata
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from throttle.actuation.backend import EventReason, PowerScope
from throttle.actuation.nvml_clocks import binding_version
from throttle.errors import ActuationError, DriverError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from throttle.actuation.backend import GpuReading
    from throttle.actuation.nvml import NvmlBackend
    from throttle.actuation.surroundings import Surroundings

#: What a live context without work draws at the highest clock beyond what it draws at the lowest,
#: watts: measured by others on such GPUs (8bitai, gpu-parking-tax), or assumed by analogy.
CONTEXT_WATTS: Final = {
    "a100-sxm": (26.3, "measured on another"),
    "h100-sxm": (49.9, "measured on another"),
    "l40s": (66.4, "measured on another"),
    "h200-sxm": (50.0, "assumed by analogy with H100"),
    "b200": (60.0, "assumed by analogy with H100"),
}

PERF_BOOST_VARIABLE: Final = "CUDA_DISABLE_PERF_BOOST"
#: First driver that heeds it.
_PERF_BOOST_DRIVER: Final = (580, 105, 8)
#: Locked clocks came with Volta.
_LOCKING_CAPABILITY: Final = (7, 0)
#: Steps of GPUs are 7 to 15 MHz; two steps below the highest clock is lower than arbitration goes.
_TOLERANCE_MHZ: Final = 30
_SLOWED: Final = (
    EventReason.HARDWARE_SLOWDOWN | EventReason.HARDWARE_THERMAL | EventReason.POWER_BRAKE
)
#: Readings of every GPU, from which its clock under load is told.
READINGS_COUNT: Final = 5
_HOURS_A_YEAR: Final = 8766.0


class Severity(enum.Enum):
    """How much a finding matters to a daemon that is to set clocks."""

    GOOD = "good"
    NOTE = "note"
    WARNING = "warning"
    BLOCKING = "blocking"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found.

    Attributes:
        severity: How much it matters.
        check: What was looked at, in a word or two.
        text: What was found.
        remedy: What to do about it; empty for nothing.
        gpu_uuid: The GPU; empty for the machine.
    """

    severity: Severity
    check: str
    text: str
    remedy: str = ""
    gpu_uuid: str = ""


def examine(
    surroundings: Surroundings,
    open_backend: Callable[[], NvmlBackend],
    pause: Callable[[], None],
) -> list[Finding]:
    """Look at everything.

    Args:
        surroundings: The machine.
        open_backend: Opens NVML.
        pause: Waits between two readings of the clocks.

    Returns:
        Findings, the machine's before those of its GPUs.
    """
    findings = list(_machine(surroundings))
    try:
        backend = open_backend()
    except DriverError as error:
        findings.append(
            Finding(
                Severity.BLOCKING,
                "driver",
                str(error),
                "without a GPU, `throttle serve` still plays simulated ones (`throttle demo`)",
            )
        )
        return findings
    try:
        findings += _driver(backend)
        readings = _watch(backend, pause)
        for uuid in backend.uuids():
            findings += _Gpu(backend, surroundings, uuid, readings[uuid]).findings()
    finally:
        backend.close()
    return findings


def _machine(surroundings: Surroundings) -> Iterator[Finding]:
    if not surroundings.has_sys_admin():
        yield Finding(
            Severity.BLOCKING,
            "permission",
            "this process has no CAP_SYS_ADMIN, so no clock can be set from here",
            "run as root, give the container --cap-add SYS_ADMIN, or only read with backend "
            "'observe'",
        )
    elif not surroundings.in_initial_user_namespace():
        yield Finding(
            Severity.BLOCKING,
            "permission",
            "this process has CAP_SYS_ADMIN in a user namespace of its own, which the driver does "
            "not heed",
            "run without rootless mode, userns-remap or pod user namespaces",
        )
    else:
        yield Finding(Severity.GOOD, "permission", "this process may set clocks (CAP_SYS_ADMIN)")
    for owner in surroundings.clock_owners():
        yield Finding(
            Severity.WARNING,
            "other clock owner",
            f"{owner.where}: {owner.what}",
            "let one tool set clocks: stop it, or keep its GPUs out of `gpus`",
        )
    try:
        version = importlib.metadata.version("pynvml")
    except importlib.metadata.PackageNotFoundError:
        return
    yield Finding(
        Severity.WARNING,
        "binding",
        f"the distribution pynvml {version} is installed beside nvidia-ml-py; it is deprecated, "
        "and older ones shadow the module",
        "pip uninstall pynvml, then pip install --force-reinstall nvidia-ml-py",
    )


def _driver(backend: NvmlBackend) -> Iterator[Finding]:
    yield Finding(
        Severity.GOOD,
        "driver",
        f"NVIDIA driver {backend.driver_version}, nvidia-ml-py {binding_version() or 'unknown'}, "
        f"{len(backend.uuids())} GPUs",
    )
    for where, problem in backend.problems.items():
        yield Finding(
            Severity.WARNING, "GPU", f"the GPU at {where} cannot be used: {problem}", "leave it out"
        )
    if not backend.uuids():
        yield Finding(
            Severity.BLOCKING,
            "GPU",
            "the driver shows no GPU that can be used",
            "give the container its GPUs (--gpus, or NVIDIA_VISIBLE_DEVICES)",
        )


def _watch(backend: NvmlBackend, pause: Callable[[], None]) -> dict[str, list[GpuReading]]:
    """A few readings of every GPU; one that fails has none."""
    readings: dict[str, list[GpuReading]] = {uuid: [] for uuid in backend.uuids()}
    for turn in range(READINGS_COUNT):
        if turn:
            pause()
        for uuid, taken in readings.items():
            try:
                taken.append(backend.read(uuid))
            except ActuationError:
                continue
    return readings


class _Gpu:
    """One GPU under examination."""

    def __init__(
        self,
        backend: NvmlBackend,
        surroundings: Surroundings,
        uuid: str,
        readings: Sequence[GpuReading],
    ) -> None:
        self._backend = backend
        self._surroundings = surroundings
        self._uuid = uuid
        self._readings = readings
        self._clocks = backend.supported_clocks_mhz(uuid)
        self._pids = tuple(
            process.pid for process in self._ask("nvmlDeviceGetComputeRunningProcesses_v3") or ()
        )

    def findings(self) -> Iterator[Finding]:
        """What there is to say, or why nothing can be said."""
        yield self._found(
            Severity.GOOD,
            "model",
            f"{self._backend.marketing_name(self._uuid)}, as {self._backend.name(self._uuid)}; "
            f"{len(self._clocks)} clocks from {self._clocks[0]} to {self._clocks[-1]} MHz",
        )
        yield from self._writable()
        if not self._readings:
            yield self._found(
                Severity.BLOCKING, "reading", "clock, power or energy cannot be read", "nvidia-smi"
            )
            return
        yield from self._power()
        yield from self._others()
        yield from self._savings()

    def _writable(self) -> Iterator[Finding]:
        capability = self._ask("nvmlDeviceGetCudaComputeCapability")
        if capability is not None and tuple(capability) < _LOCKING_CAPABILITY:
            yield self._found(
                Severity.BLOCKING,
                "locking",
                f"compute capability {capability[0]}.{capability[1]} cannot lock clocks",
                "Volta or newer can",
            )
        if reason := self._backend.refusal(self._uuid):
            yield self._found(Severity.BLOCKING, "MIG", reason)
        if self._ask("nvmlDeviceGetPersistenceMode") == 0:
            yield self._found(
                Severity.WARNING,
                "persistence mode",
                "off: without a client the driver forgets locks and its energy counter",
                f"nvidia-smi -i {self._uuid} -pm 1, or run nvidia-persistenced",
            )

    def _power(self) -> Iterator[Finding]:
        reading = self._readings[-1]
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        default = self._ask("nvmlDeviceGetPowerManagementDefaultLimit")
        if limit is not None and default is not None and limit < default:
            yield self._found(
                Severity.WARNING,
                "power cap",
                f"{limit / 1e3:.0f} W of {default / 1e3:.0f} W: the cap may hold clocks below what "
                "is asked for, and somebody manages power here",
                f"nvidia-smi -i {self._uuid} -pl {default / 1e3:.0f} lifts it",
            )
        if reading.power_scope is PowerScope.MODULE:
            yield self._found(
                Severity.NOTE, "power", "readings cover CPU and GPU of the module together"
            )
        elif reading.power_scope is PowerScope.NONE:
            yield self._found(Severity.WARNING, "power", "the GPU does not tell its power")
        if not reading.energy_counted:
            yield self._found(
                Severity.WARNING,
                "energy",
                "there is no energy counter: energy is summed from power readings, which is less "
                "exact",
            )

    def _others(self) -> Iterator[Finding]:
        """Signs of someone else at the clocks."""
        yield from self._application_clock()
        slowed = [reading for reading in self._readings if reading.event_reasons & _SLOWED]
        if slowed:
            yield self._found(
                Severity.WARNING,
                "slowdown",
                "the hardware slows the GPU down (heat, or power brake)",
                "look after cooling and power supply first",
            )
        busy = [r for r in self._readings if EventReason.IDLE not in r.event_reasons]
        if not busy:
            yield self._found(
                Severity.NOTE,
                "locks",
                "idle: a lock by someone else would not show; run again while an engine works",
            )
            return
        highest = max(reading.clock_mhz for reading in busy)
        explained = any(reading.event_reasons for reading in busy)
        if highest < self._clocks[-1] - _TOLERANCE_MHZ and not explained:
            yield self._found(
                Severity.WARNING,
                "locks",
                f"under load it runs at {highest} of {self._clocks[-1]} MHz and the driver gives "
                "no reason: probably somebody locked its clocks (an inference, as no driver tells)",
                f"find out who, then nvidia-smi -i {self._uuid} -rgc; ours: throttle status",
            )
        else:
            yield self._found(Severity.GOOD, "locks", f"no sign of one: {highest} MHz under load")

    def _application_clock(self) -> Iterator[Finding]:
        sm_clock = 1
        now = self._ask("nvmlDeviceGetApplicationsClock", sm_clock)
        default = self._ask("nvmlDeviceGetDefaultApplicationsClock", sm_clock)
        if now is not None and default is not None and now < default:
            yield self._found(
                Severity.WARNING,
                "application clocks",
                f"set to {now} MHz, the default is {default}",
                f"nvidia-smi -i {self._uuid} -rac",
            )

    def _savings(self) -> Iterator[Finding]:
        """What an idle engine costs, and what would save it."""
        reading = self._readings[-1]
        known = CONTEXT_WATTS.get(self._backend.name(self._uuid))
        idle = EventReason.IDLE in reading.event_reasons
        if known is None or not idle:
            why = "it is at work" if not idle else "no figure is known for this model"
            yield self._found(Severity.NOTE, "parking", f"what parking would save: {why}")
            return
        watts, source = known
        if not self._pids:
            yield self._found(
                Severity.NOTE,
                "parking",
                f"draws {reading.power_watts:.0f} W without an engine; an idle one would add about "
                f"{watts:.0f} W (estimate: {source}), which parking saves",
            )
            return
        lowest, highest = self._clocks[0], self._clocks[-1]
        share = (reading.clock_mhz - lowest) / max(1, highest - lowest)
        saved = watts * min(1.0, max(0.0, share))
        if saved < 1.0:
            yield self._found(
                Severity.GOOD, "parking", f"idle at {reading.clock_mhz} MHz: nothing to save"
            )
            return
        yield self._found(
            Severity.NOTE,
            "parking",
            f"idle with an engine it draws {reading.power_watts:.0f} W (measured) at "
            f"{reading.clock_mhz} MHz; parked at {lowest} MHz it would save about {saved:.0f} W "
            f"(estimate: {source}), {saved * _HOURS_A_YEAR / 1e3:.0f} kWh in a year of idling",
            self._parking_remedy(),
        )

    def _parking_remedy(self) -> str:
        daemon = "`throttle serve` parks idle engines"
        if _version(self._backend.driver_version) < _PERF_BOOST_DRIVER:
            return daemon
        unset = [pid for pid in self._pids if not self._boost_disabled(pid)]
        if not unset:
            return f"{daemon}; {PERF_BOOST_VARIABLE}=1 is set already"
        return (
            f"{daemon}; without it, {PERF_BOOST_VARIABLE}=1 in the engine's environment (process "
            f"{', '.join(map(str, unset))}) lets the clock fall by itself"
        )

    def _boost_disabled(self, pid: int) -> bool:
        environment = self._surroundings.environment(pid)
        return environment is not None and environment.get(PERF_BOOST_VARIABLE) == "1"

    def _found(self, severity: Severity, check: str, text: str, remedy: str = "") -> Finding:
        return Finding(severity, check, text, remedy, self._uuid)

    def _ask(self, function: str, *arguments: object) -> Any:  # noqa: ANN401 - as NVML's
        """What NVML says, or None where it does not."""
        try:
            return self._backend.ask(self._uuid, function, *arguments)
        except ActuationError:
            return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
