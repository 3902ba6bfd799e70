"""The state file, byte for byte as `nvml.c` lays it out."""

from __future__ import annotations

import ctypes
from typing import Final

MAGIC: Final = int.from_bytes(b"FAKENVML", "little")
VERSION: Final = 1
GPUS_LIMIT: Final = 16
MEMORY_CLOCKS_LIMIT: Final = 4
CLOCKS_LIMIT: Final = 320
PROCESSES_LIMIT: Final = 8
FAULTS_LIMIT: Final = 32
FUNCTIONS_LIMIT: Final = 64
WRITES_LIMIT: Final = 4096
NAME_BYTES: Final = 96


class GpuLayout(ctypes.Structure):
    """One GPU."""

    _fields_ = (
        ("uuid", ctypes.c_char * NAME_BYTES),
        ("name", ctypes.c_char * NAME_BYTES),
        ("memory_clocks_count", ctypes.c_int32),
        ("memory_clocks_mhz", ctypes.c_int32 * MEMORY_CLOCKS_LIMIT),
        ("clocks_count", ctypes.c_int32 * MEMORY_CLOCKS_LIMIT),
        ("clocks_mhz", ctypes.c_int32 * CLOCKS_LIMIT * MEMORY_CLOCKS_LIMIT),
        ("lock_minimum_mhz", ctypes.c_int32),
        ("lock_maximum_mhz", ctypes.c_int32),
        ("application_clock_mhz", ctypes.c_int32),
        ("application_clocks_code", ctypes.c_int32),
        ("ceiling_mhz", ctypes.c_int32),
        ("lost", ctypes.c_int32),
        ("mig_supported", ctypes.c_int32),
        ("mig_enabled", ctypes.c_int32),
        ("persistence", ctypes.c_int32),
        ("temperature_celsius", ctypes.c_int32),
        ("module_power", ctypes.c_int32),
        ("processes_count", ctypes.c_int32),
        ("processes_pid", ctypes.c_int32 * PROCESSES_LIMIT),
        ("steady_mhz", ctypes.c_int32),
        ("previous_mhz", ctypes.c_int32),
        ("compute_major", ctypes.c_int32),
        ("compute_minor", ctypes.c_int32),
        ("ceiling_reasons", ctypes.c_uint64),
        ("changed_seconds", ctypes.c_double),
        ("settle_seconds", ctypes.c_double),
        ("load_ratio", ctypes.c_double),
        ("idle_watts", ctypes.c_double),
        ("context_watts", ctypes.c_double),
        ("busy_watts", ctypes.c_double),
        ("module_watts", ctypes.c_double),
        ("power_limit_watts", ctypes.c_double),
        ("power_limit_default_watts", ctypes.c_double),
        ("power_limit_minimum_watts", ctypes.c_double),
        ("power_limit_maximum_watts", ctypes.c_double),
        ("energy_joules", ctypes.c_double),
        ("energy_seconds", ctypes.c_double),
        ("energy_wrap_millijoules", ctypes.c_double),
    )


class FaultLayout(ctypes.Structure):
    """A fault to inject; free while `remaining` is 0."""

    _fields_ = (
        ("function", ctypes.c_char * 56),
        ("gpu", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("remaining", ctypes.c_int32),
        ("hang", ctypes.c_int32),
        ("delay_minimum_seconds", ctypes.c_double),
        ("delay_maximum_seconds", ctypes.c_double),
    )


class FunctionLayout(ctypes.Structure):
    """How often a function was called."""

    _fields_ = (("function", ctypes.c_char * 56), ("calls_count", ctypes.c_int64))


class WriteLayout(ctypes.Structure):
    """One call that would have written."""

    _fields_ = (
        ("sequence_number", ctypes.c_int64),
        ("time_seconds", ctypes.c_double),
        ("pid", ctypes.c_int32),
        ("gpu", ctypes.c_int32),
        ("minimum", ctypes.c_uint32),
        ("maximum", ctypes.c_uint32),
        ("kind", ctypes.c_int32),
        ("code", ctypes.c_int32),
    )


class StateLayout(ctypes.Structure):
    """The whole file."""

    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("version", ctypes.c_int32),
        ("bytes", ctypes.c_int32),
        ("loaded", ctypes.c_int32),
        ("generation", ctypes.c_int32),
        ("gpus_count", ctypes.c_int32),
        ("permission", ctypes.c_int32),
        ("time_virtual", ctypes.c_int32),
        ("cuda_version", ctypes.c_int32),
        ("time_seconds", ctypes.c_double),
        ("driver_version", ctypes.c_char * 80),
        ("writes_count", ctypes.c_int64),
        ("gpus", GpuLayout * GPUS_LIMIT),
        ("faults", FaultLayout * FAULTS_LIMIT),
        ("functions", FunctionLayout * FUNCTIONS_LIMIT),
        ("writes", WriteLayout * WRITES_LIMIT),
    )


#: C structure -> its mirror, for the test that compares their sizes.
STRUCTURES: Final[dict[str, type[ctypes.Structure]]] = {
    "State": StateLayout,
    "Gpu": GpuLayout,
    "Fault": FaultLayout,
    "Function": FunctionLayout,
    "Write": WriteLayout,
}
