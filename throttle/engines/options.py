"""What an operator tells an adapter that lives inside an engine: environment variables.

Engines start their own processes and have their own command lines, so the environment is the one
thing that reaches an adapter in each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from throttle.client import ThrottleClient
from throttle.credentials import read_token, tls_credentials
from throttle.outbox import COMPLETED_STATES_LIMIT
from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping

    import grpc

#: gRPC target of the daemon, such as `unix:///run/throttle/throttle.sock`. Unset: the adapters do
#: nothing.
ADDRESS_VARIABLE: Final = "THROTTLE_ADDRESS"

_PREFIX: Final = "THROTTLE_ENGINE_"

_MODES: Final = {
    "act": engine_pb2.CONTROL_MODE_ACT,
    "shadow": engine_pb2.CONTROL_MODE_SHADOW,
    "record": engine_pb2.CONTROL_MODE_RECORD,
}

_SLOS: Final = ("ttft_seconds", "tbt_seconds", "tpot_seconds", "e2e_seconds")


class OptionsError(ValueError):
    """An environment variable holds what is not allowed; the message names it."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an adapter reaches the daemon and what it registers.

    Attributes:
        address: gRPC target of the daemon.
        engine_id: Unique among the engines of the daemon; empty lets the adapter choose.
        gpu_uuids: GPUs of this engine, in the order of its ranks; empty asks the engine.
        model: Name in the daemon's catalogue; empty sends the engine's config.json.
        mode: What the daemon may do; shadow touches nothing.
        slos: Limits of requests that state none of their own.
        lease_seconds: Longest silence before the GPUs return to default clocks; 0 for the daemon's.
        ca_file: Certificates for TLS; empty for plaintext.
        certificate_file: Client certificate; empty for none.
        key_file: Its key.
        token_file: Bearer token; empty for none.
    """

    address: str
    engine_id: str = ""
    gpu_uuids: tuple[str, ...] = ()
    model: str = ""
    mode: engine_pb2.ControlMode.ValueType = engine_pb2.CONTROL_MODE_SHADOW
    slos: Mapping[str, float] | None = None
    lease_seconds: float = 0.0
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""
    token_file: str = ""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> EngineOptions | None:
        """The options in environment variables; None when `THROTTLE_ADDRESS` is not set.

        Raises:
            OptionsError: Names the variable, its value and what is allowed.
        """
        address = environ.get(ADDRESS_VARIABLE, "")
        if not address:
            return None

        def text(name: str) -> str:
            return environ.get(_PREFIX + name, "").strip()

        mode = text("MODE") or "shadow"
        if mode not in _MODES:
            raise OptionsError(f"{_PREFIX}MODE is {mode!r}; allowed: {', '.join(_MODES)}")
        slos = {
            name: seconds
            for name in _SLOS
            if (seconds := _positive(_PREFIX + name.upper(), text(name.upper()))) is not None
        }
        return cls(
            address=address,
            engine_id=text("ID"),
            gpu_uuids=tuple(part.strip() for part in text("GPUS").split(",") if part.strip()),
            model=text("MODEL"),
            mode=_MODES[mode],
            slos=slos,
            lease_seconds=_positive(_PREFIX + "LEASE_SECONDS", text("LEASE_SECONDS")) or 0.0,
            ca_file=text("CA_FILE"),
            certificate_file=text("CERTIFICATE_FILE"),
            key_file=text("KEY_FILE"),
            token_file=text("TOKEN_FILE"),
        )

    def apply(self, registration: engine_pb2.EngineRegistration) -> None:
        """Write into a registration what the operator said; the rest stays."""
        if self.engine_id:
            registration.engine_id = self.engine_id
        if self.model:
            registration.model.ClearField("config_json")
            registration.model.name = self.model
        registration.mode = self.mode
        registration.lease_timeout_seconds = self.lease_seconds
        for name, seconds in (self.slos or {}).items():
            setattr(registration.default_slos, name, seconds)

    def read_credentials(self) -> tuple[grpc.ChannelCredentials | None, str]:
        """TLS credentials, None for plaintext, and the bearer token, empty for none.

        Raises:
            OSError: A certificate, key or token cannot be read.
            ValueError: One of them is unusable.
        """
        credentials = None
        if self.ca_file:
            credentials = tls_credentials(
                self.ca_file, self.certificate_file or None, self.key_file or None
            )
        return credentials, read_token(self.token_file) if self.token_file else ""

    def connect(
        self,
        registration: engine_pb2.EngineRegistration,
        completed_states_limit: int = COMPLETED_STATES_LIMIT,
    ) -> ThrottleClient:
        """A client for a registration; connects in the background.

        Raises:
            OSError: A certificate, key or token cannot be read.
            ValueError: One of them is unusable, or the registration is.
        """
        credentials, token = self.read_credentials()
        return ThrottleClient(
            registration,
            self.address,
            credentials=credentials,
            token=token,
            completed_states_limit=completed_states_limit,
        )


def _positive(variable: str, text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise OptionsError(f"{variable} is {text!r}; allowed: seconds above 0")
    return value
