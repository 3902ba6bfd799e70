"""NVIDIA GPUs through NVML, as `import pynvml` of nvidia-ml-py gives it.

What NVML does not say and this module relies on: a lock outlives whoever set it, cannot be read
back, and its success means accepted, not achieved. So only the highest clock is set, the lowest
stays the hardware's, and the actuator reads the clock afterwards. Memory clocks are left alone.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import importlib.metadata
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from throttle.actuation.backend import EventReason, GpuReading, PowerScope
from throttle.actuation.energy import EnergyCounter, SummedPower
from throttle.actuation.gpu_names import bundle_gpu_name
from throttle.errors import (
    ActuationError,
    DriverError,
    GpuLostError,
    GpuPermissionError,
    NotFoundError,
    NotSupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_Answer = TypeVar("_Answer")

#: What the binding must have; the last two came with 12.535 and 12.570.
_NEEDED: Final = (
    "nvmlInit",
    "nvmlDeviceSetGpuLockedClocks",
    "nvmlDeviceResetGpuLockedClocks",
    "nvmlDeviceGetFieldValues",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetTemperatureV",
)

#: Power readings, best first: field, scope, and what the scope is called here. The instant one is
#: preferred: the average runs over a second, and on GA100 the plain call is the instant one.
_INSTANT_FIELD, _AVERAGE_FIELD = 186, 185
_GPU_SCOPE, _MODULE_SCOPE = 0, 1
_POWER_FIELDS: Final = (
    (_INSTANT_FIELD, _GPU_SCOPE, PowerScope.GPU),
    (_AVERAGE_FIELD, _GPU_SCOPE, PowerScope.GPU),
    (_INSTANT_FIELD, _MODULE_SCOPE, PowerScope.MODULE),
)

_MILLI: Final = 1e-3
#: Taken for the power limit where the driver does not tell it: above any GPU there is.
_HIGHEST_WATTS: Final = 3000.0


def import_binding() -> Any:  # noqa: ANN401 - the binding has no types
    """The module `pynvml` of nvidia-ml-py.

    Raises:
        DriverError: It is not installed, too old, or shadowed by another package of that name.
    """
    try:
        binding = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        raise DriverError(
            "pynvml cannot be imported; install nvidia-ml-py (pip install 'moe-throttle[daemon]')"
        ) from None
    where = getattr(binding, "__file__", None)
    if hasattr(binding, "__path__"):
        raise DriverError(
            f"pynvml at {where} is a package, which shadows the module of nvidia-ml-py; "
            "pip uninstall pynvml, then pip install --force-reinstall nvidia-ml-py"
        )
    missing = [name for name in _NEEDED if not hasattr(binding, name)]
    if missing:
        raise DriverError(
            f"pynvml at {where} (nvidia-ml-py {binding_version() or 'not installed'}) lacks "
            f"{', '.join(missing)}; allowed: nvidia-ml-py 12.570.86 or newer"
        )
    return binding


def binding_version() -> str:
    """Version of nvidia-ml-py; empty when it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("nvidia-ml-py")
    return ""


@dataclass(slots=True)
class _Device:
    """What is known of one GPU; its counters belong to whoever reads it."""

    uuid: str
    handle: Any
    name: str
    clocks_mhz: tuple[int, ...]
    counter: EnergyCounter
    summed: SummedPower
    power_field: tuple[int, int, PowerScope] | None
    has_power: bool
    has_counter: bool
    reads: set[str]  # optional readings that the device has


class NvmlBackend:
    """A `GpuBackend` over NVML. Make it after any fork: NVML does not survive one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Initialize NVML and look at every GPU; writes nothing.

        A GPU that cannot be looked at is left out of `uuids` and named in `problems`.

        Args:
            clock: Seconds, for the energy of GPUs without a counter.

        Raises:
            DriverError: There is no driver, or it or the binding cannot be used.
        """
        self._binding = import_binding()
        self._clock = clock
        self.problems: dict[str, str] = {}
        try:
            self._binding.nvmlInit()
        except self._binding.NVMLError as error:
            raise self._init_error(error) from None
        try:
            self.driver_version = self._ask(
                "", "the driver's version", self._binding.nvmlSystemGetDriverVersion
            )
            self._devices = self._find_devices()
        except BaseException:
            self.close()
            raise

    def uuids(self) -> tuple[str, ...]:
        """GPUs that answer."""
        return tuple(self._devices)

    def name(self, uuid: str) -> str:
        """The GPU's model, in the words that bundles are named by."""
        return bundle_gpu_name(self._device(uuid).name)

    def marketing_name(self, uuid: str) -> str:
        """The GPU's model, as the driver gives it."""
        return self._device(uuid).name

    def supported_clocks_mhz(self, uuid: str) -> tuple[int, ...]:
        """SM clocks at the highest memory clock, MHz, rising."""
        return self._device(uuid).clocks_mhz

    def refusal(self, uuid: str) -> str:
        """Why this GPU must not be written: it is cut into MIG instances."""
        device, binding = self._device(uuid), self._binding
        try:
            current, pending = self._ask(
                uuid, "MIG mode", binding.nvmlDeviceGetMigMode, device.handle
            )
        except NotSupportedError:
            return ""
        if binding.NVML_DEVICE_MIG_ENABLE in {current, pending}:
            return (
                f"GPU {uuid} is in MIG mode: its instances share one SM clock; "
                f"nvidia-smi -i {uuid} -mig 0 ends it"
            )
        return ""

    def set_maximum_clock(self, uuid: str, clock_mhz: int) -> None:
        """Lock between the lowest clock there is and this one, snapped down to a supported one.

        Raises:
            NotSupportedError: The GPU is in MIG mode, or cannot lock clocks.
            GpuPermissionError: This process has no CAP_SYS_ADMIN.
            GpuLostError: The GPU is gone.
            ActuationError: The driver failed otherwise, or the clock is none.
        """
        device = self._device(uuid)
        if clock_mhz <= 0:
            raise ActuationError(f"GPU {uuid}: {clock_mhz} MHz is not a clock")
        if reason := self.refusal(uuid):
            raise NotSupportedError(reason)
        clocks = device.clocks_mhz
        target = clocks[max(0, bisect.bisect_right(clocks, clock_mhz) - 1)]
        self._ask(
            uuid,
            f"locking clocks at {target} MHz",
            self._binding.nvmlDeviceSetGpuLockedClocks,
            device.handle,
            clocks[0],
            target,
        )

    def reset_clock(self, uuid: str) -> None:
        """Remove any lock, whoever set it; tried in MIG mode too, where one may be left.

        Raises:
            As `set_maximum_clock`.
        """
        self._ask(
            uuid,
            "resetting clocks",
            self._binding.nvmlDeviceResetGpuLockedClocks,
            self._device(uuid).handle,
        )

    def read(self, uuid: str) -> GpuReading:
        """Read what the device tells; what it does not support is left out of the reading."""
        device, binding = self._device(uuid), self._binding
        clock = self._ask(
            uuid, "SM clock", binding.nvmlDeviceGetClockInfo, device.handle, binding.NVML_CLOCK_SM
        )
        power, scope = self._read_power(device)
        now = self._clock()
        energy = device.summed.update(power, now)
        if device.has_counter:
            millijoules = self._ask(
                uuid, "energy counter", binding.nvmlDeviceGetTotalEnergyConsumption, device.handle
            )
            energy = device.counter.update(millijoules * _MILLI, now)
        reasons = self._read_optional(device, "event reasons")
        return GpuReading(
            clock_mhz=clock,
            power_watts=power,
            energy_joules=energy,
            temperature_celsius=self._read_optional(device, "temperature"),
            event_reasons=EventReason(reasons or 0),
            power_scope=scope,
            energy_counted=device.has_counter,
        )

    def close(self) -> None:
        """Let go of NVML; clocks stay as they are. A second call does nothing."""
        with contextlib.suppress(self._binding.NVMLError):
            self._binding.nvmlShutdown()

    def ask(self, uuid: str, function: str, *arguments: object) -> Any:  # noqa: ANN401 - as NVML's
        """Call a reading function of NVML about one GPU, for who looks closer than `read`.

        Raises:
            NotSupportedError: The driver or the GPU does not have it.
            ActuationError: It failed otherwise.
        """
        call = getattr(self._binding, function, None)
        if call is None:
            raise NotSupportedError(f"GPU {uuid}: {function} is not in this binding")
        return self._ask(uuid, function, call, self._device(uuid).handle, *arguments)

    def _find_devices(self) -> dict[str, _Device]:
        binding = self._binding
        devices = {}
        for index in range(self._ask("", "the number of GPUs", binding.nvmlDeviceGetCount)):
            try:
                device = self._look_at(index)
            except ActuationError as error:
                self.problems[f"index {index}"] = str(error)
            else:
                devices[device.uuid] = device
        return devices

    def _look_at(self, index: int) -> _Device:
        binding = self._binding
        handle = self._ask(f"index {index}", "handle", binding.nvmlDeviceGetHandleByIndex, index)
        uuid = self._ask(f"index {index}", "UUID", binding.nvmlDeviceGetUUID, handle)
        memory = self._ask(
            uuid, "memory clocks", binding.nvmlDeviceGetSupportedMemoryClocks, handle
        )
        clocks = (
            self._ask(
                uuid,
                "SM clocks",
                binding.nvmlDeviceGetSupportedGraphicsClocks,
                handle,
                max(memory),
            )
            if memory
            else ()
        )
        if not clocks:
            raise NotSupportedError(f"GPU {uuid}: the driver lists no clocks")
        highest = _HIGHEST_WATTS
        with contextlib.suppress(ActuationError):
            _, most = self._ask(
                uuid,
                "power limits",
                binding.nvmlDeviceGetPowerManagementLimitConstraints,
                handle,
            )
            highest = most * _MILLI
        device = _Device(
            uuid=uuid,
            handle=handle,
            name=self._ask(uuid, "name", binding.nvmlDeviceGetName, handle),
            clocks_mhz=tuple(sorted(set(clocks))),
            counter=EnergyCounter(highest),
            summed=SummedPower(),
            power_field=None,
            has_power=True,
            has_counter=True,
            reads={"event reasons", "temperature"},
        )
        self._probe(device)
        return device

    def _probe(self, device: _Device) -> None:
        """Find out which readings the GPU has, so that none is asked for in vain ever after."""
        for field in _POWER_FIELDS:
            try:
                self._field_value(device, field[0], field[1])
            except NotSupportedError:
                continue
            except ActuationError:
                break  # nothing is known now; the plain call serves
            device.power_field = field
            break
        else:
            device.has_power = self._has(device, self._binding.nvmlDeviceGetPowerUsage)
        device.has_counter = self._has(device, self._binding.nvmlDeviceGetTotalEnergyConsumption)

    def _has(self, device: _Device, function: Callable[..., object]) -> bool:
        try:
            self._ask(device.uuid, "probe", function, device.handle)
        except NotSupportedError:
            return False
        except ActuationError:
            return True  # it failed this once
        return True

    def _read_power(self, device: _Device) -> tuple[float, PowerScope]:
        if device.power_field is not None:
            field, scope, meaning = device.power_field
            return self._field_value(device, field, scope) * _MILLI, meaning
        if not device.has_power:
            return 0.0, PowerScope.NONE
        milliwatts = self._ask(
            device.uuid, "power", self._binding.nvmlDeviceGetPowerUsage, device.handle
        )
        return milliwatts * _MILLI, PowerScope.GPU

    def _field_value(self, device: _Device, field: int, scope: int) -> int:
        binding = self._binding
        (value,) = self._ask(
            device.uuid,
            f"field {field}",
            binding.nvmlDeviceGetFieldValues,
            device.handle,
            [(field, scope)],
        )
        if value.nvmlReturn != binding.NVML_SUCCESS:
            error = binding.NVMLError(value.nvmlReturn)
            raise self._error(device.uuid, f"field {field} in scope {scope}", error)
        return int(value.value.uiVal)

    def _read_optional(self, device: _Device, what: str) -> int | None:
        if what not in device.reads:
            return None
        binding = self._binding
        try:
            if what == "temperature":
                answer = self._ask(
                    device.uuid,
                    what,
                    binding.nvmlDeviceGetTemperatureV,
                    device.handle,
                    binding.NVML_TEMPERATURE_GPU,
                )
            else:
                answer = self._ask(
                    device.uuid,
                    what,
                    binding.nvmlDeviceGetCurrentClocksEventReasons,
                    device.handle,
                )
        except NotSupportedError:
            device.reads.discard(what)
            return None
        return int(answer)

    def _device(self, uuid: str) -> _Device:
        try:
            return self._devices[uuid]
        except KeyError:
            raise NotFoundError(
                f"GPU {uuid!r} is not on this machine; there are: "
                f"{', '.join(self._devices) or 'none'}"
            ) from None

    def _ask(
        self, uuid: str, what: str, function: Callable[..., _Answer], *arguments: object
    ) -> _Answer:
        try:
            return function(*arguments)
        except self._binding.NVMLError as error:
            raise self._error(uuid, what, error) from None

    def _error(self, uuid: str, what: str, error: Any) -> ActuationError:  # noqa: ANN401 - untyped
        """The error of a class that says whether another try may help."""
        binding, code = self._binding, error.value
        text = f"GPU {uuid}: {what}: {error}" if uuid else f"{what}: {error}"
        if code in {
            binding.NVML_ERROR_NOT_SUPPORTED,
            binding.NVML_ERROR_FUNCTION_NOT_FOUND,
            binding.NVML_ERROR_DEPRECATED,
        }:
            return NotSupportedError(text)
        if code == binding.NVML_ERROR_NO_PERMISSION:
            return GpuPermissionError(
                f"{text}; it takes root, or CAP_SYS_ADMIN in the initial user namespace"
            )
        if code in {binding.NVML_ERROR_GPU_IS_LOST, binding.NVML_ERROR_RESET_REQUIRED}:
            return GpuLostError(f"{text}; reset the GPU or reboot")
        return ActuationError(text)

    def _init_error(self, error: Any) -> DriverError:  # noqa: ANN401 - untyped
        binding, code = self._binding, error.value
        remedy = {
            binding.NVML_ERROR_LIBRARY_NOT_FOUND: "install the NVIDIA driver, or give the "
            "container its utilities (NVIDIA_DRIVER_CAPABILITIES=utility)",
            binding.NVML_ERROR_DRIVER_NOT_LOADED: "load the NVIDIA driver",
            binding.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was updated under its kernel "
            "module: reboot",
            binding.NVML_ERROR_NO_PERMISSION: "let this user open /dev/nvidiactl",
            binding.NVML_ERROR_UNKNOWN: "if this is a container, the host may have taken its GPUs "
            "away (systemctl daemon-reload does): start it anew",
        }.get(code, "nvidia-smi may say more")
        return DriverError(f"NVML cannot be initialized: {error}; {remedy}")
