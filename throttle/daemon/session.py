"""One engine's registration: its states in, decisions out, its GPUs held meanwhile.

Whatever goes wrong ends at default clocks: a silent engine, a brain that raises, a GPU that does
not obey, an operator's wish, the end of the stream.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from throttle.actuation.leases import DEFAULT_CLOCKS
from throttle.control.selection import Decision, Reason
from throttle.control.state import Mode
from throttle.daemon.answers import decision_message, energy_message
from throttle.daemon.telemetry import GpuWindow
from throttle.daemon.tracing import no_tracing
from throttle.daemon.turns import Turns
from throttle.errors import ActuationError, ConflictError
from throttle.v1 import engine_pb2, throttle_service_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from structlog.typing import FilteringBoundLogger

    from throttle.actuation.actuator import Actuator, Lease
    from throttle.control.state import EngineProfile, IterationState
    from throttle.daemon.brains import EngineBrain
    from throttle.daemon.breaker import SloBreaker
    from throttle.daemon.mailbox import Arrival
    from throttle.daemon.metrics import DaemonMetrics
    from throttle.daemon.recording import Recording
    from throttle.daemon.telemetry import GpuMeter
    from throttle.daemon.tracing import DecisionTracer
    from throttle.v1 import decision_pb2

_FALLBACK_REASONS = frozenset({Reason.FAULT, Reason.LEASE_EXPIRED})


class Session:
    """One registration, from its first message to the end of its stream.

    `handle` and `expire` are called by the control thread alone; `release`, `close`, `status` and
    `release_if_stuck` by any.
    """

    def __init__(
        self,
        *,
        registration_id: str,
        profile: EngineProfile,
        engine_brain: EngineBrain | None,
        actuator: Actuator,
        meter: GpuMeter,
        recording: Recording | None,
        breaker: SloBreaker | None = None,
        metrics: DaemonMetrics,
        clock: Callable[[], float],
        log: FilteringBoundLogger,
        trace: DecisionTracer = no_tracing,
        turns: Turns | None = None,
    ) -> None:
        """Take the GPUs if the engine asked to act.

        Args:
            registration_id: Unique name of this registration.
            profile: The engine.
            engine_brain: Decides; None for an engine that only records.
            actuator: Sets clocks.
            meter: Reads the engine's GPUs.
            recording: Where states are kept; None to keep none.
            breaker: Says when throttling must be given up; None never does.
            metrics: Counts.
            clock: Monotonic seconds of the daemon; leases run on it.
            log: Bound to the engine.
            trace: Told of each decision.
            turns: Shared with the engines that decide beside it; its own if None.

        Raises:
            ConflictError: A GPU is held by another engine.
            ActuationError: A GPU does not obey.
        """
        self.registration_id = registration_id
        self.profile = profile
        self.engine_brain = engine_brain
        self._actuator = actuator
        self._meter = meter
        self._recording = recording
        self._breaker = breaker
        clocks = engine_brain.candidate_clocks_mhz if engine_brain is not None else ()
        self._highest_clock_mhz = max(clocks, default=0)
        self._metrics = metrics
        self._clock = clock
        self._log = log
        self._trace = trace
        self._turns = turns or Turns()
        self._lease: Lease | None = None
        if profile.mode is Mode.ACT:
            self._lease = actuator.acquire(profile.engine_id, profile.gpu_uuids)
        self._closing = threading.Lock()
        self._closed = False
        self._released = False
        self._error: Exception | None = None  # of the decision under way
        self._faulty = False  # whether the last decision had one
        self._applied_clock_mhz = DEFAULT_CLOCKS
        self._last_state_seconds: float | None = None
        self._last_sequence_number = 0
        self._last_engine_seconds = 0.0
        self._busy_since_seconds: float | None = None
        self._last_decision: decision_pb2.Decision | None = None
        self._states_count = 0
        self._decisions_count = 0
        self._clock_changes_count = 0

    @property
    def lease_deadline_seconds(self) -> float | None:
        """When the lease ends unless a state comes, by the daemon's clock; None when none is held.

        Before the first state it never ends by itself: the stream's own end suffices, as the GPUs
        are at default clocks until then.
        """
        if self._lease is None or self._last_state_seconds is None:
            return None
        return self._last_state_seconds + self.profile.lease_seconds

    def handle(
        self,
        arrivals: Sequence[Arrival],
        newer: Callable[[], Sequence[Arrival]] = tuple,
    ) -> decision_pb2.Decision:
        """Take in states in order and decide on the newest.

        Args:
            arrivals: At least one.
            newer: Gives those that came while this engine waited for its turn.
        """
        started = self._clock()
        self._busy_since_seconds = started
        self._error = None
        window = self._read_gpus()
        with self._turns.turn():
            arrivals = [*arrivals, *newer()]
            decision = self._observe_and_decide(arrivals, window)
        newest = arrivals[-1].state
        self._states_count += len(arrivals)
        self._metrics.iterations_received.inc(len(arrivals))
        if len(arrivals) > 1:
            self._metrics.iterations_dropped.labels("overtaken").inc(len(arrivals) - 1)
        duration = self._clock() - started
        decision, applied = self._apply(decision)
        self._meter.note([arrival.state for arrival in arrivals])
        self._count_energy(newest.engine_time_seconds)
        self._last_state_seconds = self._clock()
        self._last_sequence_number = newest.sequence_number
        self._busy_since_seconds = None
        self._note_transition()
        return self._answer(decision, applied=applied, duration_seconds=duration)

    def expire(self) -> decision_pb2.Decision:
        """Give the GPUs of a silent engine back; its next state takes them again."""
        self._metrics.leases_expired.inc()
        self._log.warning("lease_expired", lease_seconds=self.profile.lease_seconds)
        self._give_back()
        decision = Decision(DEFAULT_CLOCKS, Reason.LEASE_EXPIRED)
        return self._answer(decision, applied=False, duration_seconds=0.0)

    def release_if_stuck(self, waiting_since_seconds: float | None) -> None:
        """Give the GPUs back when states have come but no decision follows for a whole lease.

        Args:
            waiting_since_seconds: When the oldest state that waits came; None when none waits.
        """
        moments = [
            moment
            for moment in (waiting_since_seconds, self._busy_since_seconds)
            if moment is not None
        ]
        if not moments or self._lease is None:
            return
        if self._clock() - min(moments) > self.profile.lease_seconds:
            self._metrics.leases_expired.inc()
            self._log.error("control_stuck", lease_seconds=self.profile.lease_seconds)
            self._give_back()

    def release(self) -> tuple[str, ...]:
        """Give the GPUs back for as long as this registration lives, by an operator's wish.

        Returns:
            The GPUs that were held.
        """
        self._released = True
        held = self.profile.gpu_uuids if self._lease is not None else ()
        self._give_back()
        self._log.info("control_released", gpu_uuids=held)
        return held

    def close(self) -> None:
        """Give the GPUs back and finish the recording; a second call waits for the first."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._released = True
            self._give_back()
            self._meter.close()
            if self._recording is not None:
                self._recording.close()
                self._log.info(
                    "recording_closed",
                    path=str(self._recording.path),
                    rows_count=self._recording.rows_count,
                    dropped_rows_count=self._recording.dropped_rows_count,
                    failure=self._recording.failure,
                )

    def status(self) -> throttle_service_pb2.EngineStatus:
        """What an operator sees."""
        last_state = self._last_state_seconds
        engine_brain = self.engine_brain
        coverage = engine_brain.brain.coverage_ratio if engine_brain else None
        return throttle_service_pb2.EngineStatus(
            engine_id=self.profile.engine_id,
            registration_id=self.registration_id,
            mode=engine_pb2.ControlMode.ValueType(self.profile.mode),
            gpu_uuids=self.profile.gpu_uuids,
            bundle=engine_brain.bundle if engine_brain else "",
            states_count=self._states_count,
            decisions_count=self._decisions_count,
            clock_changes_count=self._clock_changes_count,
            state_age_seconds=-1.0 if last_state is None else self._clock() - last_state,
            last_decision=self._last_decision,
            latency_bias_ratio=engine_brain.brain.latency_bias_ratio if engine_brain else 1.0,
            coverage_ratio=-1.0 if coverage is None else coverage,
            energy=energy_message(self._meter.energy()),
        )

    def _read_gpus(self) -> GpuWindow:
        try:
            return self._meter.window()
        except ActuationError as error:
            self._error = error
            return GpuWindow(0, 0)

    def _observe_and_decide(self, arrivals: Sequence[Arrival], window: GpuWindow) -> Decision:
        """The brain's decision, or a fault; states reach brain and recording in order."""
        brain = self.engine_brain.brain if self.engine_brain is not None else None
        blind = window.without_energy()
        newest = arrivals[-1]
        for arrival in arrivals:
            if self._recording is not None and window.clock_mhz > 0:
                self._recording.append(
                    arrival.state,
                    arrival.message,
                    window if arrival is newest else blind,
                    self._applied_clock_mhz,
                )
        if brain is None:
            return Decision(DEFAULT_CLOCKS, Reason.RECORDING)
        try:
            # a window over several states is the power of none of them
            power = window.power_watts if len(arrivals) == 1 else None
            for arrival in arrivals:
                brain.observe(arrival.state, window.clock_mhz, power)
                self._ask_breaker(arrival.state)
            if self._released:
                return Decision(DEFAULT_CLOCKS, Reason.RELEASED)
            if self._breaker is not None and self._breaker.is_open(
                newest.state.engine_time_seconds
            ):
                return Decision(DEFAULT_CLOCKS, Reason.BREAKER_OPEN)
            return brain.decide(newest.state)
        except Exception as error:  # noqa: BLE001 - whatever fails, the GPUs go to default clocks
            self._error = error
            return Decision(DEFAULT_CLOCKS, Reason.FAULT)

    def _ask_breaker(self, state: IterationState) -> None:
        if self._breaker is None or self.profile.mode is not Mode.ACT:
            return
        trips = self._breaker.trips_count
        throttled = DEFAULT_CLOCKS < self._applied_clock_mhz < self._highest_clock_mhz
        self._breaker.observe(state, throttled=throttled)
        if self._breaker.trips_count > trips:
            self._metrics.breaker_trips.inc()
            self._log.error("slo_breaker_open")

    def _apply(self, decision: Decision) -> tuple[Decision, bool]:
        """Set the clock; returns what came of it and whether it was applied."""
        if self.profile.mode is not Mode.ACT:
            return decision, False
        if self._released:
            return Decision(DEFAULT_CLOCKS, Reason.RELEASED), False
        try:
            lease = self._lease
            if lease is None or lease.released:
                lease = self._actuator.acquire(self.profile.engine_id, self.profile.gpu_uuids)
                self._lease = lease
            if self._released:  # while this thread took the GPUs
                self._give_back()
                return Decision(DEFAULT_CLOCKS, Reason.RELEASED), False
            before = self._applied_clock_mhz
            answer = lease.set_clock(decision.target_clock_mhz, decision.reason.name.lower())
            self._applied_clock_mhz = answer.clock_mhz
        except ConflictError:  # given back, or taken by another engine meanwhile
            self._applied_clock_mhz = DEFAULT_CLOCKS
            reason = Reason.RELEASED if self._released else Reason.LEASE_EXPIRED
            return Decision(DEFAULT_CLOCKS, reason), False
        except ActuationError as error:
            self._applied_clock_mhz = DEFAULT_CLOCKS
            self._error = error
            return Decision(DEFAULT_CLOCKS, Reason.FAULT), False
        if self._applied_clock_mhz != before:
            self._clock_changes_count += 1
            self._log.info(
                "clock_changed",
                from_mhz=before,
                to_mhz=self._applied_clock_mhz,
                reason=decision.reason.name.lower(),
                slack_seconds=decision.binding.slack_seconds if decision.binding else None,
            )
            self._metrics.note_change(
                self.profile.engine_id,
                before,
                self._applied_clock_mhz,
                decision.reason.name.lower(),
            )
        return decision, answer.applied and decision.reason is not Reason.FAULT

    def _answer(
        self, decision: Decision, *, applied: bool, duration_seconds: float
    ) -> decision_pb2.Decision:
        message = decision_message(
            decision,
            self._last_sequence_number,
            applied=applied,
            applied_clock_mhz=self._applied_clock_mhz,
            decision_duration_seconds=duration_seconds,
        )
        self._last_decision = message
        self._decisions_count += 1
        reason = decision.reason
        outcome = "fallback" if reason in _FALLBACK_REASONS else "applied" if applied else "held"
        self._metrics.count_decision(message, outcome, reason.name.lower())
        self._trace(self.profile, message, outcome, reason.name.lower())
        self._log.debug(
            "decision",
            sequence_number=message.sequence_number,
            target_mhz=message.target_clock_mhz,
            reason=reason.name.lower(),
            applied=applied,
            decision_seconds=duration_seconds,
        )
        return message

    def _count_energy(self, engine_seconds: float) -> None:
        """Count what the last decision came to until now, by the engine's time."""
        elapsed = engine_seconds - self._last_engine_seconds
        self._last_engine_seconds = engine_seconds
        if self._last_decision is not None:
            # silence beyond the lease is not known to be this load
            elapsed = min(max(elapsed, 0.0), self.profile.lease_seconds)
            self._metrics.count_energy(self._last_decision, elapsed)

    def _give_back(self) -> None:
        lease, self._lease = self._lease, None
        if lease is None:
            return
        try:
            lease.release()
        except ActuationError as error:
            self._log.error("reset_failed", error=str(error))
        if self._applied_clock_mhz != DEFAULT_CLOCKS:
            self._clock_changes_count += 1
            self._log.info("clock_changed", from_mhz=self._applied_clock_mhz, to_mhz=DEFAULT_CLOCKS)
            self._metrics.note_change(
                self.profile.engine_id, self._applied_clock_mhz, DEFAULT_CLOCKS, "given_back"
            )
            self._applied_clock_mhz = DEFAULT_CLOCKS

    def _note_transition(self) -> None:
        """Count a fault, and log it when it comes and when it goes: not once per state."""
        if self._error is not None:
            self._metrics.faults.inc()
            if not self._faulty:
                self._log.error("control_fault", exc_info=self._error)
        elif self._faulty:
            self._log.info("control_recovered")
        self._faulty = self._error is not None
        self._error = None  # its traceback refers to this session, which it would keep
