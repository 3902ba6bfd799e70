"""What a soak is judged by, and the table that it prints."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Share of the processors that daemon and engines may take: engines that start take some too, and
#: a decision waits for whatever else runs.
CARRIED_RATIO = 0.5
GROWTH_RATIO = 0.02
#: Of docs/performance.md: many engines on two cores that their load shares.
DECISION_P99_SECONDS = 0.008


@dataclass
class Report:
    """What came of it; everything simulated but time, processors and memory."""

    engines_count: int
    wanted_states_per_second: float
    processors_count: int = len(os.sched_getaffinity(0))
    daemon_seconds_per_state: float = 0.0
    engine_seconds_per_state: float = 0.0
    requests_per_second: float = 0.0
    seconds: float = 0.0
    crashed_together_count: int = 0
    crashes_count: int = 0
    release_seconds_maximum: float = 0.0
    return_seconds_maximum: float = 0.0
    states_per_second: float = 0.0
    overtaken_ratio: float = 0.0
    decision_p50_seconds: float = 0.0
    decision_p99_seconds: float = 0.0
    leases_lost_count: int = 0
    locks_left_count: int = 0
    machine_load_mean: float = 0.0
    settled_seconds: float = 0.0
    memory_settled_bytes: float = 0.0
    memory_end_bytes: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def wanted_processors(self) -> float:
        """What the load that was asked for would take."""
        each = self.daemon_seconds_per_state + self.engine_seconds_per_state
        return self.wanted_states_per_second * each

    @property
    def carried_ratio(self) -> float:
        """How many times that load the machine carries."""
        return CARRIED_RATIO * self.processors_count / max(self.wanted_processors, 1e-9)

    @property
    def growth_ratio(self) -> float:
        """Of memory, since it was to have settled."""
        return self.memory_end_bytes / max(self.memory_settled_bytes, 1.0) - 1.0

    def judge(self) -> None:
        """Add the bars that were missed to the problems."""
        if self.growth_ratio > GROWTH_RATIO:
            self.problems.append(
                f"memory grew by {self.growth_ratio:.1%}; allowed: {GROWTH_RATIO:.0%}"
            )
        if self.leases_lost_count:
            self.problems.append(f"{self.leases_lost_count} leases of living engines ended")
        if self.locks_left_count:
            self.problems.append(f"{self.locks_left_count} GPUs stayed throttled without an engine")
        if self.decision_p99_seconds > DECISION_P99_SECONDS:
            self.problems.append(
                f"p99 of a decision is {self.decision_p99_seconds * 1e3:.1f} ms; allowed: "
                f"{DECISION_P99_SECONDS * 1e3:g} ms"
            )

    def table(self) -> str:
        """For people, in Markdown."""
        lines = ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in self._rows())]
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield (
            "load wanted",
            f"{self.wanted_states_per_second:.0f} states/s from {self.engines_count} engines",
        )
        yield (
            "processor time of a state",
            (
                f"{_ms(self.daemon_seconds_per_state)} of the daemon, "
                f"{_ms(self.engine_seconds_per_state)} of its engine"
            ),
        )
        carried = self.carried_ratio >= 1.0
        yield (
            "processors that it wants",
            f"{self.wanted_processors:.1f} of {self.processors_count}: "
            + ("played whole" if carried else "too many, so the engines got fewer requests"),
        )
        yield (
            "load played",
            (
                f"{self.states_per_second:.0f} states/s for {self.seconds / 60:.1f} min, "
                f"{self.requests_per_second:.3f} requests/s of each engine"
            ),
        )
        yield "states overtaken by newer ones", f"{self.overtaken_ratio:.2%}"
        yield "processes that waited or ran, mean", f"{self.machine_load_mean:.1f}"
        yield (
            "crashes",
            (
                f"{self.crashes_count}, {self.crashed_together_count} engines each; clocks at "
                f"default within {self.release_seconds_maximum:.1f} s, all back within "
                f"{self.return_seconds_maximum:.1f} s"
            ),
        )
        settled = f"{self.settled_seconds / 60:.1f} min"
        yield f"memory after {settled}", f"{self.memory_settled_bytes / 1e6:.1f} MB"
        yield "memory at the end", f"{self.memory_end_bytes / 1e6:.1f} MB"
        yield "growth", f"{self.growth_ratio:+.1%} (allowed: {GROWTH_RATIO:+.0%})"
        yield "leases lost", f"{self.leases_lost_count} (allowed: 0)"
        yield "clocks left locked", f"{self.locks_left_count} (allowed: 0)"
        yield "decision, p50", _ms(self.decision_p50_seconds)
        allowed = f"(allowed: {_ms(DECISION_P99_SECONDS)})"
        yield "decision, p99", f"{_ms(self.decision_p99_seconds)} {allowed}"
        yield "missed", "; ".join(self.problems) or "nothing"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
