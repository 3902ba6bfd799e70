"""Setting the clocks of NVIDIA GPUs: what the privileged process has of NVML, and nothing else.

It is `import pynvml` of nvidia-ml-py. What NVML does not say and this module relies on: a lock
outlives whoever set it, cannot be read back, and its success means accepted, not achieved. So only
the highest clock is set, the lowest stays the hardware's, and the clock is read afterwards. Memory
clocks are left alone.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from throttle.actuation.backend import ClockReading, EventReason
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


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU as the driver names it.

    Attributes:
        uuid: Its name for ever.
        handle: Its name in this process.
        clocks_mhz: SM clocks at the highest memory clock, rising.
    """

    uuid: str
    handle: Any
    clocks_mhz: tuple[int, ...]


class NvmlClocks:
    """A `ClockDriver` over NVML. Make it after any fork: NVML does not survive one."""

    def __init__(self) -> None:
        """Initialize NVML and look at every GPU; writes nothing.

        A GPU that cannot be looked at is left out of `uuids` and named in `problems`.

        Raises:
            DriverError: There is no driver, or it or the binding cannot be used.
        """
        self._binding = import_binding()
        self.problems: dict[str, str] = {}
        self._devices: dict[str, Device] = {}
        self._without_reasons: set[str] = set()
        try:
            self._binding.nvmlInit()
        except self._binding.NVMLError as error:
            raise self._init_error(error) from None
        try:
            self._find_devices()
        except BaseException:
            self.close()
            raise

    def uuids(self) -> tuple[str, ...]:
        """GPUs that answer."""
        return tuple(self._devices)

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

    def read_clock(self, uuid: str) -> ClockReading:
        """Read the SM clock, and why it is not higher where the GPU tells."""
        device, binding = self._device(uuid), self._binding
        clock = self._ask(
            uuid, "SM clock", binding.nvmlDeviceGetClockInfo, device.handle, binding.NVML_CLOCK_SM
        )
        reasons = 0
        if uuid not in self._without_reasons:
            try:
                reasons = self._ask(
                    uuid,
                    "event reasons",
                    binding.nvmlDeviceGetCurrentClocksEventReasons,
                    device.handle,
                )
            except NotSupportedError:
                self._without_reasons.add(uuid)
        return ClockReading(clock, EventReason(reasons))

    def close(self) -> None:
        """Let go of NVML; clocks stay as they are. A second call does nothing."""
        with contextlib.suppress(self._binding.NVMLError):
            self._binding.nvmlShutdown()

    def _find_devices(self) -> None:
        binding = self._binding
        for index in range(self._ask("", "the number of GPUs", binding.nvmlDeviceGetCount)):
            try:
                device = self._look_at(index)
            except ActuationError as error:
                self.problems[f"index {index}"] = str(error)
            else:
                self._devices[device.uuid] = device

    def _look_at(self, index: int) -> Device:
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
        return Device(uuid, handle, tuple(sorted(set(clocks))))

    def _device(self, uuid: str) -> Device:
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
