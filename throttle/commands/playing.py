"""A simulated engine on one side, a real daemon on the other: what the demo and profiling share."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from throttle.actuation.simulated import SimulatedGpu as SimulatedGpuEntry
from throttle.client import ThrottleClient
from throttle.errors import ThrottleError
from throttle.simulation.engine import SimulatedEngine
from throttle.simulation.experiment import play
from throttle.simulation.gpu import SimulatedGpu
from throttle.simulation.messages import registration_message, state_message
from throttle.v1 import decision_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from throttle.actuation.simulated import SimulatedGpuFile, SimulatedGpuPort
    from throttle.control.state import IterationState, Mode, Slos
    from throttle.simulation.engine import RequestSource
    from throttle.simulation.experiment import RunResult
    from throttle.simulation.plant import Plant

#: Longest wait for one answer. A decision takes well under a millisecond; this outlasts a machine
#: that has stopped for a moment.
_ANSWER_TIMEOUT_SECONDS = 30.0
#: The lease of a player whose simulated time stands still while it waits.
_LEASE_SECONDS = 60.0
#: Simulated time between two samples of the slack.
_SAMPLE_SECONDS = 0.5


@dataclass(slots=True)
class Answers:
    """What a daemon answered over one run.

    Attributes:
        decision_seconds: Time spent in the daemon on each decision.
        round_trip_seconds: Time from handing a state to the client until its decision was there.
        slack_seconds: Sampled pairs of engine time and the binding limit's slack.
        reasons_count: How often each reason was given.
        lost_requests_count: Most requests that were beyond saving at one time.
    """

    decision_seconds: list[float] = field(default_factory=list)
    round_trip_seconds: list[float] = field(default_factory=list)
    slack_seconds: list[tuple[float, float]] = field(default_factory=list)
    reasons_count: dict[str, int] = field(default_factory=dict)
    lost_requests_count: int = 0

    def note(
        self, engine_time_seconds: float, decision: decision_pb2.Decision, seconds: float
    ) -> None:
        """Take in one decision and its round trip."""
        self.decision_seconds.append(decision.decision_duration_seconds)
        self.round_trip_seconds.append(seconds)
        reason = decision_pb2.DecisionReason.Name(decision.reason)
        reason = reason.removeprefix("DECISION_REASON_").lower()
        self.reasons_count[reason] = self.reasons_count.get(reason, 0) + 1
        self.lost_requests_count = max(self.lost_requests_count, decision.lost_requests_count)
        due = not self.slack_seconds or (
            engine_time_seconds - self.slack_seconds[-1][0] >= _SAMPLE_SECONDS
        )
        if due and decision.HasField("binding_limit"):
            self.slack_seconds.append((engine_time_seconds, decision.binding_limit.slack_seconds))


@dataclass(frozen=True, slots=True)
class Play:
    """One run of a simulated engine against a daemon.

    Attributes:
        plant: The simulated GPU and model.
        gpu_uuid: First of the engine's GPUs in the file; the others follow with a suffix.
        seed: Seeds chip, noise and switching delays.
        engine_id: As the daemon will know it.
        mode: What the daemon may do.
        slos: Default limits.
        until_seconds: Simulated time that the run lasts at least.
    """

    plant: Plant
    gpu_uuid: str
    seed: int
    engine_id: str
    mode: Mode
    slos: Slos
    until_seconds: float = 0.0

    def run(
        self,
        file: SimulatedGpuFile,
        target: str,
        source: RequestSource,
        progress: Callable[[float, SimulatedGpu, SimulatedEngine], None],
    ) -> tuple[RunResult, Answers]:
        """Play to the end, waiting for the daemon's answer after every state.

        Raises:
            ThrottleError: The daemon cannot be reached, refuses the engine or stops answering.
        """
        uuids = gpu_uuids(self.gpu_uuid, self.plant.gpus_count)
        port = GpuGroup([file.gpu(uuid) for uuid in uuids])
        gpu = SimulatedGpu(self.plant, port, port, random.Random(self.seed))  # noqa: S311
        engine = SimulatedEngine(gpu, source)
        profile = engine.profile(self.engine_id, uuids, self.slos, self.mode, _LEASE_SECONDS)
        answers = Answers()
        with ThrottleClient(registration_message(profile), target) as client:
            if not client.wait_until_connected(_ANSWER_TIMEOUT_SECONDS):
                raise ThrottleError(f"the daemon at {target} refused: {client.last_error}")

            def decide(state: IterationState) -> None:
                started = time.perf_counter()
                client.submit(state_message(state))
                decision = client.wait_for_decision(state.sequence_number, _ANSWER_TIMEOUT_SECONDS)
                if decision is None:
                    raise ThrottleError(
                        f"the daemon at {target} did not answer state {state.sequence_number} "
                        f"within {_ANSWER_TIMEOUT_SECONDS:g} s: {client.last_error or 'no error'}"
                    )
                seconds = time.perf_counter() - started
                answers.note(state.engine_time_seconds, decision, seconds)

            result = play(
                engine, gpu, decide, lambda now: progress(now, gpu, engine), self.until_seconds
            )
        return result, answers


class GpuGroup:
    """The GPUs of one engine as one: they compute in step, so the slowest lock rules them all."""

    def __init__(self, ports: Sequence[SimulatedGpuPort]) -> None:
        self._ports = tuple(ports)

    def lock_mhz(self) -> int:
        """The lowest lock among them, MHz; 0 when none is locked."""
        return min((lock for port in self._ports if (lock := port.lock_mhz())), default=0)

    def publish(
        self,
        sm_clock_mhz: float,
        power_watts: float,
        energy_joules: float,
        gpu_time_seconds: float,
    ) -> None:
        """Each of them measures the same."""
        for port in self._ports:
            port.publish(sm_clock_mhz, power_watts, energy_joules, gpu_time_seconds)


def gpu_uuids(first: str, count: int) -> tuple[str, ...]:
    """UUIDs of an engine's simulated GPUs, the first one as given."""
    return (first, *(f"{first}-{index}" for index in range(1, count)))


def gpu_entries(plant: Plant, first_uuids: Sequence[str]) -> list[SimulatedGpuEntry]:
    """What the simulated GPU file must hold for engines on this plant."""
    name = plant.parameters.gpu.name
    return [
        SimulatedGpuEntry(uuid, name, plant.clocks_mhz)
        for first in first_uuids
        for uuid in gpu_uuids(first, plant.gpus_count)
    ]


def wait_until_reachable(
    target: str, timeout_seconds: float, still_running: Callable[[], bool]
) -> None:
    """Return once the daemon accepts connections.

    Raises:
        ThrottleError: It does not in time, or ends meanwhile.
    """
    deadline = time.monotonic() + timeout_seconds
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ready = grpc.channel_ready_future(channel)
        while still_running() and time.monotonic() < deadline:
            try:
                ready.result(timeout=0.2)
            except grpc.FutureTimeoutError:
                continue
            return
    why = "did not start in time" if still_running() else "ended before it was ready"
    raise ThrottleError(f"the daemon for {target} {why}; see its log")
