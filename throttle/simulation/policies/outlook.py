"""What an engine will compute next, as its scheduler would: the common eyes of the baselines.

Every baseline that predicts sees the engine through the scoreboard of `throttle.control`, as our
controller does; where an engine tells only aggregates, the last iteration stands for the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.prediction import SHAPE_COLUMNS
from throttle.control.projection import shape_of
from throttle.control.scoreboard import Column, Scoreboard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from throttle.control.scoreboard import EndedRequest
    from throttle.control.state import EngineProfile, IterationState

_NOBODY = np.empty((0, len(Column)))


@dataclass(frozen=True, slots=True)
class Outlook:
    """The next iterations.

    Attributes:
        shapes: Iterations that compute prompts, one by one, (K, 7); without prompts the one decode
            iteration that comes next; empty when there is no work.
        prompts_at: For each of `prompts`, how many iterations until its first token; 0 where that
            lies beyond `shapes`, (p,).
        prompts: Scoreboard rows of requests whose prompt is not computed, in order, (p, columns).
        decodes: Rows of the requests that generate, (d, columns).
        waiting_count: Requests that wait.
    """

    shapes: NDArray[np.float64]
    prompts_at: NDArray[np.int64]
    prompts: NDArray[np.float64]
    decodes: NDArray[np.float64]
    waiting_count: int

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return len(self.shapes) == 0

    @property
    def has_prompts(self) -> bool:
        """Whether the next iteration computes prompts."""
        return bool(len(self.shapes)) and bool(self.shapes[0, 1] > 0.0)

    def oldest_wait_seconds(self, now_seconds: float) -> float:
        """Longest time since the arrival of a request without a first token; 0 without any."""
        waits = now_seconds - self.prompts[:, Column.ARRIVAL]
        waits = waits[np.isnan(self.prompts[:, Column.FIRST_TOKEN]) & np.isfinite(waits)]
        return float(waits.max(initial=0.0))


class EngineView:
    """Follows one engine.

    Args:
        profile: Its limits.
        horizon_iterations: Prompt iterations planned ahead.
    """

    def __init__(self, profile: EngineProfile, horizon_iterations: int = 12) -> None:
        self._profile = profile
        self._horizon = horizon_iterations
        self._scoreboard = Scoreboard(profile.default_slos)

    @property
    def length_classes(self) -> Sequence[str]:
        """Names of the length classes, by the index in the rows."""
        return self._scoreboard.length_classes

    def observe(self, state: IterationState) -> list[EndedRequest]:
        """Take in one state; returns the requests that ended with it."""
        return self._scoreboard.apply(state)

    def outlook(self, state: IterationState) -> Outlook:
        """The next iterations after a state that has been observed."""
        if not self._scoreboard.knows_requests:
            return self._of_aggregates(state)
        live = self._scoreboard.live()
        running = live.running
        computing = running[:, Column.COMPUTED] < running[:, Column.TARGET]
        decodes = running[~computing]
        free_slots = max(self._profile.running_requests_limit - len(running), 0)
        prompts = np.vstack([running[computing], live.waiting])
        allowed = int(computing.sum()) + free_slots
        count = float(len(decodes))
        held = float((decodes[:, Column.PROMPT] + decodes[:, Column.GENERATED]).sum())
        if not len(prompts):
            shapes = np.array([[0.0, 0.0, 0.0, count, held, count, 0.0]] if count else [])
            return Outlook(
                shapes.reshape(-1, len(SHAPE_COLUMNS)),
                np.empty(0, dtype=np.int64),
                prompts,
                decodes,
                0,
            )
        shapes, finished_at = self._plan(prompts[:allowed], count, held)
        finished_at += [0] * (len(prompts) - len(finished_at))
        return Outlook(
            shapes,
            np.array(finished_at, dtype=np.int64),
            prompts,
            decodes,
            len(live.waiting),
        )

    def _plan(
        self, prompts: NDArray[np.float64], count: float, held: float
    ) -> tuple[NDArray[np.float64], list[int]]:
        """Chunked prefill as in vLLM: running requests first, then prompts in order."""
        limit = float(self._profile.batched_tokens_limit)
        target = prompts[:, Column.TARGET]
        in_kv = np.minimum(prompts[:, Column.COMPUTED], target - 1.0).tolist()
        left = (target - np.array(in_kv)).tolist()
        shapes: list[list[float]] = []
        finished: list[int] = []
        index = 0
        while index < len(left) and len(shapes) < self._horizon:
            budget = max(limit - count, 1.0)
            tokens = context = chunks = pairs = 0.0
            arriving = arriving_kv = 0.0
            while index < len(left) and budget > 0.0:
                chunk = min(left[index], budget)
                tokens, context, chunks = tokens + chunk, context + in_kv[index], chunks + 1.0
                pairs += chunk * (in_kv[index] + 0.5 * chunk)
                budget -= chunk
                left[index] -= chunk
                in_kv[index] += chunk
                if left[index] > 0.0:
                    break
                finished.append(len(shapes) + 1)
                arriving, arriving_kv = arriving + 1.0, arriving_kv + in_kv[index]
                index += 1
            shapes.append([chunks, tokens, context, count, held, count, pairs])
            held += count + arriving_kv
            count += arriving
        finished += [0] * (len(left) - len(finished))
        if not shapes:  # prompts wait and none finds a slot
            shapes = [[0.0, 0.0, 0.0, count, held, count, 0.0]] if count else []
        return np.array(shapes).reshape(-1, len(SHAPE_COLUMNS)), finished

    def _of_aggregates(self, state: IterationState) -> Outlook:
        shape = shape_of(state.scheduled)
        shapes = np.array([shape] if any(shape) else []).reshape(-1, len(SHAPE_COLUMNS))
        waiting = state.queued.num_prefill_requests + state.queued.num_decode_requests
        return Outlook(shapes, np.empty(0, dtype=np.int64), _NOBODY, _NOBODY, waiting)
