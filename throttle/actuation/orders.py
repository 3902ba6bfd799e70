"""What the supervisor tells the privileged process that it starts, as one argument."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from throttle.actuation.settings import ActuationSettings

if TYPE_CHECKING:
    from throttle.actuation.backends import BackendKind


@dataclass(frozen=True, slots=True)
class Orders:
    """What the supervisor tells the process it starts.

    Attributes:
        backend: Kind of driver.
        simulated_gpus: State file of simulated GPUs; empty for none.
        gpus: UUIDs that may be written, in the order that messages name them by; empty means all.
        directory: Where the records of the GPUs lie.
        holder: What others are told who find a GPU taken.
        settings: Bounds and times.
        log_json: Whether log lines are JSON.
        channel: File descriptor of the socket to the controller; -1 to reset GPUs and end.
        parent: Process id of the supervisor; 0 when there is none.
        pulse: File descriptor of the eventfd that says that the process runs; -1 for none.
    """

    backend: BackendKind
    simulated_gpus: str
    gpus: tuple[str, ...]
    directory: str
    holder: str
    settings: ActuationSettings
    log_json: bool
    channel: int = -1
    parent: int = 0
    pulse: int = -1

    def to_json(self) -> str:
        """As one argument of a command line."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Orders:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        settings = dict(values.pop("settings"), state_directory=None)
        gpus = tuple(values.pop("gpus"))
        return cls(gpus=gpus, settings=ActuationSettings(**settings), **values)
