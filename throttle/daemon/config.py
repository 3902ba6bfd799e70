"""What an operator may configure, and every check that needs no machine."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

# needed at run time: the fields' types are read from the annotations
from throttle.actuation.backends import BackendKind  # noqa: TC001 - as above
from throttle.actuation.settings import STATE_DIRECTORY, ActuationSettings
from throttle.control.settings import ControlSettings
from throttle.daemon.breaker import BreakerSettings
from throttle.daemon.credentials import TlsSettings
from throttle.daemon.gate import LimitSettings
from throttle.daemon.layers import (
    ConfigurationError,
    build,
    environment_layer,
    file_layer,
    flag_layer,
)
from throttle.daemon.logs import LogFormat, LogLevel  # noqa: TC001 - as above
from throttle.daemon.messages import LEASE_MAXIMUM_SECONDS, LEASE_MINIMUM_SECONDS
from throttle.daemon.telemetry import TelemetrySettings
from throttle.daemon.tracing import TracingSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Prefix of environment variables; `__` stands for a dot.
VARIABLE_PREFIX: Final = "THROTTLE_"
#: Names the configuration file when no flag does.
FILE_VARIABLE: Final = "THROTTLE_CONFIG"

#: What Kubernetes sets in every pod beside a service whose name begins with "throttle".
_SERVICE_LINK: Final = re.compile(
    r"THROTTLE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
)

_SOCKET_MODE = re.compile(r"0?[0-7][0-7]0")
#: What the adapters inside engines read (`throttle.engines.options`): the containers of a pod often
#: share one environment.
_ENGINE: Final = re.compile(r"THROTTLE_(ADDRESS$|ENGINE_)")

_PORT_MAXIMUM = 65_535
_SOCKET_PATH_BYTES = 107  # sun_path of Linux, less its end


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    """How long a silent engine may hold its GPUs; what engines ask for is brought within.

    Attributes:
        minimum_seconds: Shortest lease granted, from 0.1.
        maximum_seconds: Longest lease granted, up to 60.
    """

    minimum_seconds: float = LEASE_MINIMUM_SECONDS
    maximum_seconds: float = LEASE_MAXIMUM_SECONDS


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """Everything `throttle serve` can be told.

    Attributes:
        socket: Unix socket to listen on; empty for none.
        tcp_address: HOST:PORT to listen on as well; empty for none.
        tcp_allow_remote: Allow a tcp_address that other machines can reach although it is not
            encrypted or does not ask who calls.
        socket_mode: Mode of the socket, octal; nothing for others.
        socket_group: Group of the socket, by name or number; empty for the daemon's own.
        access: Access list: who may call, by token or certificate, and for which GPUs. Empty lets
            whoever reaches the socket or the port speak for every configured GPU.
        gpus: UUIDs of the GPUs that may be throttled; no other is ever written. Empty means every
            GPU of a simulated backend; real ones must be named.
        backend: Driver of the GPUs: nvml sets and reads NVIDIA GPUs, observe reads them only,
            simulated plays GPUs in a file.
        simulated_gpus: State file of the simulated GPUs, for the backend "simulated".
        bundles: Where trained bundles lie, each in its own directory.
        recordings: Where the iterations of every engine are recorded; empty records nothing.
        metrics_address: HOST:PORT where Prometheus may ask; empty for none.
        log_level: Least level logged: debug, info, warning, error.
        log_format: console, json, or auto: console on a terminal, else json.
        drain_seconds: Longest time for calls to end after SIGTERM; clocks are restored before.
        engines_limit: Most engines at once.
        lease: How long a silent engine may hold its GPUs.
        limits: What one caller may ask for.
        tls: How TCP is encrypted.
        tracing: Which decisions are traced.
        actuation: How clocks are set.
        breaker: When throttling an engine is given up for a while.
        telemetry: How GPUs are read.
        control: How clocks are chosen.
    """

    socket: Path | None = Path("/run/throttle/throttle.sock")
    tcp_address: str = ""
    tcp_allow_remote: bool = False
    socket_mode: str = "0660"
    socket_group: str = ""
    access: Path | None = None
    gpus: tuple[str, ...] = ()
    backend: BackendKind = "simulated"
    simulated_gpus: Path | None = None
    bundles: Path = Path("models")
    recordings: Path | None = None
    metrics_address: str = ""
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    drain_seconds: float = 5.0
    engines_limit: int = 32
    lease: LeaseSettings = field(default_factory=LeaseSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)
    actuation: ActuationSettings = field(default_factory=ActuationSettings)
    breaker: BreakerSettings = field(default_factory=BreakerSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    control: ControlSettings = field(default_factory=ControlSettings)

    @property
    def state_directory(self) -> Path:
        """Where the records of the GPUs lie."""
        if self.actuation.state_directory is not None:
            return self.actuation.state_directory
        if self.backend == "simulated" and self.simulated_gpus is not None:
            file = self.simulated_gpus.resolve()  # one file by two names is one set of GPUs
            return file.with_name(file.name + ".state")
        return STATE_DIRECTORY

    @property
    def addresses(self) -> str:
        """Where it listens, for messages."""
        return ", ".join(filter(None, (str(self.socket or ""), self.tcp_address)))

    def problems(self) -> list[str]:
        """Values that cannot be used, alone or together; one line each."""
        found: list[str] = []
        if self.socket is None and not self.tcp_address:
            found.append("socket and tcp_address are empty; allowed: at least one of them")
        if self.socket is not None and len(os.fsencode(self.socket)) > _SOCKET_PATH_BYTES:
            found.append(
                f"socket is {str(self.socket)!r}; allowed: a path of up to {_SOCKET_PATH_BYTES} "
                "bytes"
            )
        if not _SOCKET_MODE.fullmatch(self.socket_mode):
            found.append(
                f"socket_mode is {self.socket_mode!r}; allowed: octal, for owner and group alone, "
                "such as 0660 or 0600"
            )
        found += self._address_problems()
        found += self.tls.problems()
        found += [f"tracing.{problem}" for problem in self.tracing.problems()]
        found += [f"limits.{problem}" for problem in self.limits.problems()]
        if len(set(self.gpus)) != len(self.gpus):
            found.append(f"gpus is {list(self.gpus)}; allowed: UUIDs, each once")
        if self.backend == "simulated" and self.simulated_gpus is None:
            found.append(
                "simulated_gpus is empty; allowed: the state file of the simulated GPUs when "
                "backend is 'simulated'"
            )
        if self.backend == "nvml" and not self.gpus:
            found.append(
                "gpus is empty; allowed: the UUIDs that may be written when backend is 'nvml' "
                "(`throttle doctor` lists them)"
            )
        if not 0 < self.drain_seconds <= 60:
            found.append(f"drain_seconds is {self.drain_seconds}; allowed: above 0, up to 60")
        if self.engines_limit < 1:
            found.append(f"engines_limit is {self.engines_limit}; allowed: 1 or more")
        lowest, highest = self.lease.minimum_seconds, self.lease.maximum_seconds
        if not LEASE_MINIMUM_SECONDS <= lowest <= highest <= LEASE_MAXIMUM_SECONDS:
            found.append(
                f"lease.minimum_seconds is {lowest} and lease.maximum_seconds {highest}; allowed: "
                f"{LEASE_MINIMUM_SECONDS} to {LEASE_MAXIMUM_SECONDS}, the minimum not above the "
                "maximum"
            )
        found += [f"actuation.{problem}" for problem in self.actuation.problems()]
        found += [f"telemetry.{problem}" for problem in self.telemetry.problems()]
        found += [f"breaker.{problem}" for problem in self.breaker.problems()]
        found += [f"control.{problem}" for problem in self.control.problems()]
        return found

    def _address_problems(self) -> list[str]:
        found: list[str] = []
        for name, address in (
            ("tcp_address", self.tcp_address),
            ("metrics_address", self.metrics_address),
        ):
            if not address:
                continue
            try:
                host, _ = split_address(address)
            except ValueError:
                found.append(
                    f"{name} is {address!r}; allowed: HOST:PORT with a port from 0 to 65535"
                )
                continue
            if name == "tcp_address" and not (
                _is_loopback(host) or self._remote_is_safe() or self.tcp_allow_remote
            ):
                found.append(
                    f"tcp_address is {address!r}; allowed: a loopback address such as "
                    "127.0.0.1:7077, or with tls.certificate and tls.key, and tls.client_ca or "
                    "access; or set tcp_allow_remote"
                )
        return found

    def _remote_is_safe(self) -> bool:
        """Whether TCP is encrypted and asks who calls."""
        asks = self.tls.client_ca is not None or self.access is not None
        return self.tls.certificate is not None and asks


def load_config(
    flags: Mapping[str, str], environ: Mapping[str, str], path: Path | None
) -> DaemonConfig:
    """The configuration of the flags, the environment, a file and the defaults, strongest first.

    Args:
        flags: By dotted key.
        environ: Environment variables.
        path: The file; None asks the environment variable `THROTTLE_CONFIG` for one.

    Raises:
        ConfigurationError: Lists everything that is wrong, not only the first thing.
    """
    problems: list[str] = []
    layers = [
        flag_layer(flags),
        environment_layer(environ, VARIABLE_PREFIX, _no_setting),
    ]
    if path is None and environ.get(FILE_VARIABLE):
        path = Path(environ[FILE_VARIABLE])
    if path is not None:
        try:
            layers.append(file_layer(path))
        except ConfigurationError as error:
            problems += error.problems
    config, found = build(DaemonConfig, layers)
    problems += [text for _, text in found]
    if config is not None:
        # a value that was refused already stands at its default here: say nothing more of it
        refused = {key for key, _ in found}
        problems += [text for text in config.problems() if text.split(" ", 1)[0] not in refused]
    if problems or config is None:
        raise ConfigurationError(problems)
    return config


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 host stands in brackets.

    Raises:
        ValueError: It is no such address.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) <= _PORT_MAXIMUM):
        raise ValueError(address)
    return host.removeprefix("[").removesuffix("]"), int(port)


def _no_setting(variable: str) -> bool:
    return (
        variable == FILE_VARIABLE
        or _ENGINE.match(variable) is not None
        or _SERVICE_LINK.fullmatch(variable) is not None
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
