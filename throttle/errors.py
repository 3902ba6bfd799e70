"""Errors that callers tell apart. Each message says what, which value, and what is allowed."""

from __future__ import annotations


class ThrottleError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidInputError(ThrottleError):
    """A value from outside is not allowed.

    Attributes:
        field: Dotted name of the field.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} is {value!r}; allowed: {allowed}")
        self.field = field


class NotFoundError(ThrottleError):
    """A named thing (GPU, model, engine, bundle) does not exist here."""


class ConflictError(ThrottleError):
    """A thing is held by another, such as a GPU, an engine id or a socket."""


class ActuationError(ThrottleError):
    """A GPU did not do what it was told."""


class GpuDeniedError(ActuationError):
    """A GPU can never be set here: no permission, or the device cannot."""


class GpuLostError(ActuationError):
    """A GPU fell off the bus or wants a reset; trying again soon is of no use."""


class GpuPermissionError(GpuDeniedError):
    """This process may not write a GPU; another, with more rights, could."""


class NotSupportedError(GpuDeniedError):
    """A device or its driver has no such function."""


class DriverError(ActuationError):
    """The driver or its binding cannot be used at all."""
