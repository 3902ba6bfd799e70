"""NVIDIA GPUs through NVML, readings included: what the unprivileged processes have of it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from throttle.actuation.backend import GpuReading, PowerScope
from throttle.actuation.energy import EnergyCounter, SummedPower
from throttle.actuation.gpu_names import bundle_gpu_name
from throttle.actuation.nvml_clocks import NvmlClocks
from throttle.errors import ActuationError, NotSupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from throttle.actuation.nvml_clocks import Device

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


@dataclass(slots=True)
class _Gauges:
    """What one GPU measures; the counters belong to whoever reads it."""

    device: Device
    name: str
    counter: EnergyCounter
    summed: SummedPower = dataclasses.field(default_factory=SummedPower)
    power_field: tuple[int, int, PowerScope] | None = None
    has_power: bool = True
    has_counter: bool = True
    has_temperature: bool = True


class NvmlBackend(NvmlClocks):
    """A `GpuBackend` over NVML. Make it after any fork: NVML does not survive one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Initialize NVML and look at every GPU; writes nothing.

        A GPU that cannot be looked at is left out of `uuids` and named in `problems`.

        Args:
            clock: Seconds, for the energy of GPUs without a counter.

        Raises:
            DriverError: There is no driver, or it or the binding cannot be used.
        """
        self._clock = clock
        self._gauges: dict[str, _Gauges] = {}
        super().__init__()
        try:
            self.driver_version = self._ask(
                "", "the driver's version", self._binding.nvmlSystemGetDriverVersion
            )
        except BaseException:
            self.close()
            raise

    def name(self, uuid: str) -> str:
        """The GPU's model, in the words that bundles are named by."""
        return bundle_gpu_name(self.marketing_name(uuid))

    def marketing_name(self, uuid: str) -> str:
        """The GPU's model, as the driver gives it."""
        return self._gauges[self._device(uuid).uuid].name

    def read(self, uuid: str) -> GpuReading:
        """Read what the device tells; what it does not support is left out of the reading."""
        clock = self.read_clock(uuid)
        gauges, binding = self._gauges[uuid], self._binding
        power, scope = self._read_power(gauges)
        now = self._clock()
        energy = gauges.summed.update(power, now)
        if gauges.has_counter:
            millijoules = self._ask(
                uuid,
                "energy counter",
                binding.nvmlDeviceGetTotalEnergyConsumption,
                gauges.device.handle,
            )
            energy = gauges.counter.update(millijoules * _MILLI, now)
        return GpuReading(
            clock_mhz=clock.clock_mhz,
            power_watts=power,
            energy_joules=energy,
            temperature_celsius=self._read_temperature(gauges),
            event_reasons=clock.event_reasons,
            power_scope=scope,
            energy_counted=gauges.has_counter,
        )

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

    def _look_at(self, index: int) -> Device:
        device, binding = super()._look_at(index), self._binding
        highest = _HIGHEST_WATTS
        with contextlib.suppress(ActuationError):
            _, most = self._ask(
                device.uuid,
                "power limits",
                binding.nvmlDeviceGetPowerManagementLimitConstraints,
                device.handle,
            )
            highest = most * _MILLI
        name = self._ask(device.uuid, "name", binding.nvmlDeviceGetName, device.handle)
        gauges = _Gauges(device, name, EnergyCounter(highest))
        self._probe(gauges)
        self._gauges[device.uuid] = gauges
        return device

    def _probe(self, gauges: _Gauges) -> None:
        """Find out which readings the GPU has, so that none is asked for in vain ever after."""
        for field in _POWER_FIELDS:
            try:
                self._field_value(gauges.device, field[0], field[1])
            except NotSupportedError:
                continue
            except ActuationError:
                break  # nothing is known now; the plain call serves
            gauges.power_field = field
            break
        else:
            gauges.has_power = self._has(gauges.device, self._binding.nvmlDeviceGetPowerUsage)
        gauges.has_counter = self._has(
            gauges.device, self._binding.nvmlDeviceGetTotalEnergyConsumption
        )

    def _has(self, device: Device, function: Callable[..., object]) -> bool:
        try:
            self._ask(device.uuid, "probe", function, device.handle)
        except NotSupportedError:
            return False
        except ActuationError:
            return True  # it failed this once
        return True

    def _read_power(self, gauges: _Gauges) -> tuple[float, PowerScope]:
        if gauges.power_field is not None:
            field, scope, meaning = gauges.power_field
            return self._field_value(gauges.device, field, scope) * _MILLI, meaning
        if not gauges.has_power:
            return 0.0, PowerScope.NONE
        milliwatts = self._ask(
            gauges.device.uuid,
            "power",
            self._binding.nvmlDeviceGetPowerUsage,
            gauges.device.handle,
        )
        return milliwatts * _MILLI, PowerScope.GPU

    def _field_value(self, device: Device, field: int, scope: int) -> int:
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

    def _read_temperature(self, gauges: _Gauges) -> int | None:
        if not gauges.has_temperature:
            return None
        binding = self._binding
        try:
            answer = self._ask(
                gauges.device.uuid,
                "temperature",
                binding.nvmlDeviceGetTemperatureV,
                gauges.device.handle,
                binding.NVML_TEMPERATURE_GPU,
            )
        except NotSupportedError:
            gauges.has_temperature = False
            return None
        return int(answer)
