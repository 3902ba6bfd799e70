"""A clock schedule found in hindsight: coordinate descent over slots of two seconds.

The schedule knows every arrival and length, switches at once and meets the plant itself. It is
feasible, so its energy lies above the optimum's; a policy without hindsight is compared with it.
Moves lower (or raise) blocks of slots, from long blocks to single slots. Blocks that lie apart are
tried in one play and judged by the energy and the requests around each; what is accepted together
is played again and kept only if it really saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.state import IterationState

SLOT_SECONDS: Final = 2.0
#: Block length in slots, move in grid steps; moves of one play lie two blocks apart.
_LEVELS: Final = ((16, -6), (8, -4), (4, -3), (4, 2), (2, -2), (1, -2), (2, -1), (1, -1))
_STRIDE = 3
#: Slots after a block in which its effect is looked for.
_REACH_SLOTS = 8
#: Steps by which slots around a missed request are raised, and how often that is tried.
_REPAIR_STEPS = 4
_REPAIRS = 12


@dataclass(frozen=True, slots=True)
class Played:
    """What a schedule came to.

    Attributes:
        slot_joules: Energy by slot, over a horizon that all schedules share, (S,).
        arrival_seconds: Arrivals, (R,).
        end_seconds: Ends of the requests, (R,).
        missed: Whether each missed a limit, (R,).
    """

    slot_joules: NDArray[np.float64]
    arrival_seconds: NDArray[np.float64]
    end_seconds: NDArray[np.float64]
    missed: NDArray[np.bool_]

    @property
    def energy_joules(self) -> float:
        """Energy over the horizon."""
        return float(self.slot_joules.sum())


class SchedulePlayer(Protocol):
    """Plays schedules."""

    def play(self, clock_indices: NDArray[np.int64]) -> Played:
        """Play clocks, as positions in the plant's grid, one per slot; the last one goes on."""
        ...


class ScheduledClocks:
    """The policy that follows a schedule; without work it goes to the lowest clock.

    Args:
        clocks_mhz: The plant's grid.
        clock_indices: Positions in it, one per slot; the last one goes on.
    """

    name = "hindsight"

    def __init__(self, clocks_mhz: tuple[int, ...], clock_indices: NDArray[np.int64]) -> None:
        self._lowest = clocks_mhz[0]
        self._by_slot: list[int] = [clocks_mhz[index] for index in clock_indices.tolist()]

    def clock_mhz(self, state: IterationState) -> int:
        """The clock of the slot that the state lies in."""
        progress = state.progress
        idle = state.queued.num_prefill_requests + state.queued.num_decode_requests == 0 and (
            progress is None or not progress.request_numbers
        )
        if idle and not (progress is None and not state.scheduled.empty):
            return self._lowest
        slot = int(state.engine_time_seconds / SLOT_SECONDS)
        return self._by_slot[min(slot, len(self._by_slot) - 1)]


@dataclass(slots=True)
class _Best:
    clock_indices: NDArray[np.int64]
    played: Played


def improve(
    start: NDArray[np.int64],
    player: SchedulePlayer,
    highest: int,
    missed_limit: int,
    plays_limit: int,
) -> tuple[NDArray[np.int64], Played]:
    """Descend from a schedule.

    Args:
        start: Clock per slot, as a position in the grid, (S,).
        player: Plays schedules.
        highest: Position of the highest clock.
        missed_limit: Requests that may miss their limits.
        plays_limit: Most plays.

    Returns:
        The best schedule that keeps the limit, and what it came to; the highest clock everywhere
        where the start could not be repaired.
    """
    search = _Search(player, highest, missed_limit, plays_limit)
    best = search.repaired(start)
    while search.plays_left > 1:
        before = best.played.energy_joules
        for block, move in _LEVELS:
            for offset in range(_STRIDE):
                best = search.moved(best, block, move, offset)
        if best.played.energy_joules > 0.998 * before:
            break
    return best.clock_indices, best.played


class _Search:
    def __init__(
        self, player: SchedulePlayer, highest: int, missed_limit: int, plays_limit: int
    ) -> None:
        self._player = player
        self._highest = highest
        self._missed_limit = missed_limit
        self.plays_left = plays_limit

    def _play(self, clock_indices: NDArray[np.int64]) -> _Best:
        self.plays_left -= 1
        return _Best(clock_indices, self._player.play(clock_indices))

    def _allowed(self, played: Played) -> bool:
        return int(played.missed.sum()) <= self._missed_limit

    def repaired(self, start: NDArray[np.int64]) -> _Best:
        """Raise slots around missed requests until few enough are missed."""
        current = self._play(np.clip(start, 0, self._highest))
        for _ in range(_REPAIRS):
            if self._allowed(current.played):
                return current
            raised = current.clock_indices.copy()
            played = current.played
            for index in np.flatnonzero(played.missed):
                first = int(played.arrival_seconds[index] / SLOT_SECONDS)
                last = int(played.end_seconds[index] / SLOT_SECONDS)
                lifted = current.clock_indices[first : last + 1] + _REPAIR_STEPS
                raised[first : last + 1] = np.minimum(lifted, self._highest)
            current = self._play(raised)
        if self._allowed(current.played):
            return current
        return self._play(np.full_like(start, self._highest))

    def moved(self, best: _Best, block: int, move: int, offset: int) -> _Best:
        """Try one move on every third block; keep the blocks that save."""
        count = len(best.clock_indices)
        starts = range(offset * block, count, _STRIDE * block)
        if self.plays_left < 2 or not starts:
            return best
        trial = best.clock_indices.copy()
        for first in starts:
            trial[first : first + block] += move
        tried = self._play(np.clip(trial, 0, self._highest))
        chosen = self._chosen(best.played, tried.played, list(starts), block)
        while chosen and self.plays_left > 0:
            kept = best.clock_indices.copy()
            for first in chosen:
                kept[first : first + block] = tried.clock_indices[first : first + block]
            if len(chosen) == len(starts):
                result, self.plays_left = tried, self.plays_left
            else:
                result = self._play(kept)
            better = result.played.energy_joules < best.played.energy_joules
            if better and self._allowed(result.played):
                return result
            chosen = chosen[: len(chosen) // 2]  # together they were too much
        return best

    def _chosen(self, before: Played, after: Played, starts: list[int], block: int) -> list[int]:
        """Blocks that save, those without misses first, then by saving per miss while it lasts."""
        budget = self._missed_limit - int(before.missed.sum())
        fresh = np.flatnonzero(after.missed & ~before.missed)
        # A request missed anew is put to the last moved block that began before its end.
        owner = np.searchsorted(np.array(starts) * SLOT_SECONDS, after.end_seconds[fresh]) - 1
        misses = np.bincount(np.maximum(owner, 0), minlength=len(starts))
        savings = []
        for index, first in enumerate(starts):
            window = slice(first, first + block + _REACH_SLOTS)
            saving = float((before.slot_joules[window] - after.slot_joules[window]).sum())
            if saving > 0.0:
                savings.append((int(misses[index]), saving, first))
        savings.sort(key=lambda each: each[1] / (each[0] + 1e-3), reverse=True)
        chosen = []
        for missed, _, first in savings:
            if missed <= max(budget, 0) or missed == 0:
                budget -= missed
                chosen.append(first)
        return chosen
