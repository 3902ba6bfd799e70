"""Which requests live, and where each one stands.

The scoreboard of throttLL'eM (Kakolyris et al., HPCA 2025, section IV), kept in columns: one row of
floats per request, so that a projection reads all of them with one gather.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.control.state import (
    EventKind,
    IterationState,
    Phase,
    RequestEvent,
    RequestProgress,
    Slos,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from throttle.control.compilation import CompiledSteps

    #: Which rows run; their computed and generated tokens; engine time, NaN while only planned;
    #: `fastest_seconds`: what `advance` takes after the rows.
    _Steps = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], float, float]

_INITIAL_ROWS = 64
_NOBODY = np.empty(0, np.int64)
#: Of nobody.
_NO_STEPS = (_NOBODY, _NOBODY, _NOBODY, math.nan, 0.0)


class Column(enum.IntEnum):
    """Columns of a request's row. Times are engine time; limits are infinite where none applies."""

    NUMBER = 0  # the engine's number
    ARRIVAL = 1  # seconds; NaN when the arrival was not seen
    PROMPT = 2  # tokens
    TARGET = 3  # tokens that must be in KV before the next output token
    COMPUTED = 4  # of those, tokens already in KV
    GENERATED = 5  # output tokens so far
    MAX_OUTPUT = 6  # tokens; infinite when not limited
    PREDICTED_OUTPUT = 7  # tokens; NaN when the engine does not guess
    LENGTH_CLASS = 8  # index of its class
    FIRST_TOKEN = 9  # seconds; NaN before it
    FIRST_GENERATED = 10  # output tokens at that moment: 1, or more when it was first seen late
    TTFT = 11  # seconds
    TBT = 12  # seconds
    TPOT = 13  # seconds
    E2E = 14  # seconds
    FIRST_FASTEST = 15  # as FIRST_TOKEN, on a clock that counts what the fastest would have taken


@dataclass(frozen=True, slots=True)
class LiveRequests:
    """Rows of live requests, (n, len(Column)), in the order in which they are served.

    Attributes:
        running: Requests that hold KV blocks.
        waiting: Requests that hold none, first come first.
    """

    running: NDArray[np.float64]
    waiting: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """A request that left.

    Attributes:
        length_class: Its class.
        generated_tokens: Its output.
        censored: Whether its own end was not seen.
        mean_gap_ratio: Its mean gap between tokens over its limit; None where there is no limit, or
            no gap, or no end.
        fastest_gap_ratio: The same, had the clock been the fastest while it was generated.
    """

    length_class: str
    generated_tokens: int
    censored: bool
    mean_gap_ratio: float | None = None
    fastest_gap_ratio: float | None = None


def advance(  # noqa: PLR0917 - as its compiled form takes them
    rows: NDArray[np.float64],
    running: NDArray[np.int64],
    computed: NDArray[np.int64],
    generated: NDArray[np.int64],
    now_seconds: float,
    fastest_seconds: float,
) -> None:
    """Move running requests to where they stand now, in place.

    Args:
        rows: All rows.
        running: Which of them run, (n,).
        computed: Prompt tokens in KV, (n,).
        generated: Output tokens, (n,).
        now_seconds: Engine time; NaN while the iteration is only planned.
        fastest_seconds: As given to `Scoreboard.apply`.
    """
    rows[running, Column.COMPUTED] = computed
    rows[running, Column.GENERATED] = generated
    # A resumed request whose answer grows again has its recomputed tokens in KV.
    prompt, target = rows[running, Column.PROMPT], rows[running, Column.TARGET]
    rows[running, Column.TARGET] = np.where(prompt + generated > target, prompt, target)
    if not math.isnan(now_seconds):
        fresh = np.isnan(rows[running, Column.FIRST_TOKEN]) & (generated >= 1)
        rows[running[fresh], Column.FIRST_TOKEN] = now_seconds
        rows[running[fresh], Column.FIRST_FASTEST] = fastest_seconds
        rows[running[fresh], Column.FIRST_GENERATED] = generated[fresh]


class Scoreboard:
    """Applies states in order and answers which requests live.

    Args:
        default_slos: Limits of requests that have none of their own.
        steps: Compiled code to use; None for the definitions.
    """

    def __init__(self, default_slos: Slos, steps: CompiledSteps | None = None) -> None:
        self._default_slos = default_slos
        self._advance = advance if steps is None else steps.advance
        self._rows = np.full((_INITIAL_ROWS, len(Column)), np.nan)
        self._free = list(range(_INITIAL_ROWS - 1, -1, -1))
        self._slot_by_number: dict[int, int] = {}
        self._class_index: dict[str, int] = {}
        self._class_names: tuple[str, ...] = ()
        self._running: list[int] = []
        self._running_index = np.empty(0, np.int64)  # the same, as it is read and written
        self._running_numbers: Sequence[int] | None = []  # None once an event has changed it
        self._waiting: dict[int, None] = {}  # request numbers, in order of arrival
        self._steps: _Steps | None = None  # told, not yet in the rows
        self._progress_seen = False
        self._fastest_seconds = 0.0

    @property
    def knows_requests(self) -> bool:
        """Whether the engine tells of requests one by one; without, only aggregates are known."""
        return self._progress_seen

    @property
    def length_classes(self) -> Sequence[str]:
        """Names of the length classes; the position is the class's index."""
        return self._class_names

    @property
    def running_count(self) -> int:
        """Requests that hold KV blocks."""
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """Requests that hold none."""
        return len(self._waiting)

    def live(self) -> LiveRequests:
        """Rows of the running and the waiting requests, copied."""
        self._catch_up()
        rows, running, waiting, _ = self.places()
        return LiveRequests(rows[running], rows[waiting])

    def places(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], _Steps]:
        """All rows, not copied; which of them run and wait, in the order of `live`; steps.

        The steps are what `advance` takes after the rows: whoever asks has to take them.
        """
        if len(self._running_index) != len(self._running):
            self._running_index = np.array(self._running, dtype=np.int64)
        waiting = _NOBODY
        if self._waiting:
            slots = [self._slot_by_number[number] for number in self._waiting]
            waiting = np.array(slots, dtype=np.int64)
        steps, self._steps = self._steps or _NO_STEPS, None
        return self._rows, self._running_index, waiting, steps

    def _catch_up(self) -> None:
        """Take the steps that were told last."""
        steps, self._steps = self._steps, None
        if steps is not None:
            self._advance(self._rows, *steps)

    def generated_tokens(self) -> NDArray[np.float64]:
        """Output so far of the running requests whose prompt is computed, (n,)."""
        running = self.live().running
        generating = running[:, Column.COMPUTED] >= running[:, Column.TARGET]
        tokens: NDArray[np.float64] = running[generating, Column.GENERATED]
        return tokens

    def apply(self, state: IterationState, fastest_seconds: float = 0.0) -> list[EndedRequest]:
        """Take in one state; returns the requests that ended with it.

        Args:
            state: The state.
            fastest_seconds: Time that the fastest clock would have taken for all that was computed
                so far; only differences count.
        """
        self._catch_up()
        self._fastest_seconds = fastest_seconds
        ended = []
        for event in state.request_events:
            gone = self._apply_event(event, state.engine_time_seconds)
            if gone is not None:
                ended.append(gone)
        if state.progress is not None:
            self._progress_seen = True
            ended += self._apply_progress(state.progress, state)
        return ended

    def _apply_event(self, event: RequestEvent, now: float) -> EndedRequest | None:
        number = event.request_number
        slot = self._slot_by_number.get(number)
        if event.kind is EventKind.ARRIVED:
            if slot is None:  # a replay after a reconnect repeats arrivals
                self._admit(event, now)
            return None
        if slot is None:
            return None  # it lived and ended between two states, or before this stream
        row = self._rows[slot]
        if event.kind is EventKind.FIRST_TOKEN:
            row[Column.FIRST_TOKEN] = now - event.age_seconds
            row[Column.FIRST_FASTEST] = self._fastest_seconds
            row[Column.FIRST_GENERATED] = 1
            row[Column.GENERATED] = max(row[Column.GENERATED], 1)
            return None
        if event.kind is EventKind.PREEMPTED:
            # Recompute: prompt and generated tokens are computed anew, as one prompt.
            row[Column.GENERATED] = event.generated_tokens
            row[Column.TARGET] = row[Column.PROMPT] + event.generated_tokens
            row[Column.COMPUTED] = 0
            # A preempted request goes back to the head of the queue, as in vLLM.
            self._waiting = {number: None, **self._waiting}
            self._stop_running(slot)
            return None
        return self._end(event, slot, now)

    def _admit(self, event: RequestEvent, now: float) -> None:
        slot = self._take_slot(event.request_number)
        slos = event.slos.over(self._default_slos)
        row = self._rows[slot]
        row[:] = np.nan
        row[Column.NUMBER] = event.request_number
        row[Column.ARRIVAL] = now - event.age_seconds
        row[Column.PROMPT] = row[Column.TARGET] = event.prompt_tokens
        row[Column.COMPUTED] = min(event.cached_tokens, event.prompt_tokens)
        row[Column.GENERATED] = 0
        row[Column.MAX_OUTPUT] = _or(event.max_output_tokens, math.inf)
        row[Column.PREDICTED_OUTPUT] = _or(event.predicted_output_tokens, math.nan)
        row[Column.LENGTH_CLASS] = self._class_of(event.length_class)
        row[Column.TTFT] = _or(slos.ttft_seconds, math.inf)
        row[Column.TBT] = _or(slos.tbt_seconds, math.inf)
        row[Column.TPOT] = _or(slos.tpot_seconds, math.inf)
        row[Column.E2E] = _or(slos.e2e_seconds, math.inf)
        self._waiting[event.request_number] = None

    def _end(self, event: RequestEvent, slot: int, now: float) -> EndedRequest:
        row = self._rows[slot]
        generated = max(event.generated_tokens, int(row[Column.GENERATED]))
        cut = event.kind is EventKind.ABORTED or generated >= row[Column.MAX_OUTPUT]
        self._waiting.pop(event.request_number, None)
        self._stop_running(slot)
        del self._slot_by_number[event.request_number]
        self._free.append(slot)
        gap_ratio = fastest_ratio = None
        gaps = generated - row[Column.FIRST_GENERATED]
        if event.kind is not EventKind.ABORTED and gaps > 0 and math.isfinite(row[Column.TPOT]):
            lasted = now - event.age_seconds - row[Column.FIRST_TOKEN]
            gap_ratio = float(lasted / gaps / row[Column.TPOT])
            fastest = self._fastest_seconds - row[Column.FIRST_FASTEST]
            fastest_ratio = float(fastest / gaps / row[Column.TPOT])
        return EndedRequest(self._class_name(row), generated, cut, gap_ratio, fastest_ratio)

    def _apply_progress(
        self, progress: RequestProgress, state: IterationState
    ) -> list[EndedRequest]:
        numbers = progress.request_numbers
        # As long as nobody comes or goes, who runs is known: most iterations are so.
        vanished = [] if numbers == self._running_numbers else self._set_running(progress)
        if not len(numbers):
            return vanished
        done = state.phase is not Phase.PLANNED
        self._steps = (
            self._running_index,
            np.array(progress.computed_prompt_tokens, dtype=np.int64),
            np.array(progress.generated_tokens, dtype=np.int64),
            float(state.engine_time_seconds) if done else math.nan,
            float(self._fastest_seconds),
        )
        return vanished

    def _set_running(self, progress: RequestProgress) -> list[EndedRequest]:
        """Take in who runs; returns those that stopped without a word."""
        numbers = progress.request_numbers
        running = list(map(self._slot_by_number.get, numbers))
        for position, slot in enumerate(running):
            if slot is None:
                computed = progress.computed_prompt_tokens[position]
                running[position] = self._meet_late(numbers[position], computed)
        if self._waiting:
            for number in self._waiting.keys() & set(numbers):
                del self._waiting[number]
        known = [slot for slot in running if slot is not None]
        vanished = [self._drop(slot) for slot in set(self._running).difference(known)]
        self._running, self._running_numbers = known, numbers
        self._running_index = np.array(known, dtype=np.int64)
        return vanished

    def _stop_running(self, slot: int) -> None:
        if slot in self._running:
            self._running.remove(slot)
        self._running_numbers = None

    def _drop(self, slot: int) -> EndedRequest:
        """A request that stopped running without a word: its end is unknown."""
        row = self._rows[slot]
        del self._slot_by_number[int(row[Column.NUMBER])]
        self._free.append(slot)
        return EndedRequest(self._class_name(row), int(row[Column.GENERATED]), censored=True)

    def _meet_late(self, number: int, computed_tokens: int) -> int:
        """A running request whose arrival was never told: it has no TTFT and no E2E limit."""
        slot = self._take_slot(number)
        row = self._rows[slot]
        row[:] = np.nan
        row[Column.NUMBER] = number
        row[Column.PROMPT] = row[Column.TARGET] = row[Column.COMPUTED] = max(computed_tokens, 1)
        row[Column.GENERATED] = 0
        row[Column.MAX_OUTPUT] = math.inf
        row[Column.LENGTH_CLASS] = self._class_of("")
        row[Column.TTFT] = row[Column.E2E] = math.inf
        row[Column.TBT] = _or(self._default_slos.tbt_seconds, math.inf)
        row[Column.TPOT] = _or(self._default_slos.tpot_seconds, math.inf)
        return slot

    def _take_slot(self, number: int) -> int:
        if not self._free:
            count = len(self._rows)
            self._rows = np.vstack([self._rows, np.full_like(self._rows, np.nan)])
            self._free = list(range(2 * count - 1, count - 1, -1))
        slot = self._free.pop()
        self._slot_by_number[number] = slot
        return slot

    def _class_name(self, row: NDArray[np.float64]) -> str:
        return self._class_names[int(row[Column.LENGTH_CLASS])]

    def _class_of(self, name: str) -> int:
        if name not in self._class_index:
            self._class_index[name] = len(self._class_index)
            self._class_names = (*self._class_names, name)
        return self._class_index[name]


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
