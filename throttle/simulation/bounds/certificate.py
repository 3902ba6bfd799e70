"""A lower bound of the energy of any clock schedule: a linear programme over iteration types.

Every schedule runs some number of iterations of each type (prompt tokens, generating requests,
context held, clock). Over all of them the work adds up: prompt tokens, output tokens and the
context read for them do not depend on the clocks. So the least `sum x (P - P_idle) t` that covers
the work, plus `P_idle` over the horizon at the lowest idle power, lies below every schedule.

What makes it hold for real schedules:

- A real iteration lies between grid points. It is charged the cost of the lower corner of its box
  and credited the work of the upper corner; cost rises with every kind of work.
- The limit on the mean gap is not put to single iterations, which may break it. Summed over the
  requests that keep it, the time in which they generate is at most TPOT times their gaps; that
  is one constraint on `sum x rows t`.
- Requests that may miss their limits are left out of the work altogether: those that hold the
  most, for each kind of work apart. Dropping their rows from an iteration makes it no dearer.
- TTFT, arrivals and switching are left out, which only lowers the bound.
- The chip's spread is in it; noise of single iterations is not, whose mean is 1.0001 or less.
- It speaks of engines without speculative decoding, prefix cache hits or prefill/decode roles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from throttle.errors import InvalidInputError
from throttle.simulation.operators import IterationWork

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from throttle.simulation.plant import Plant
    from throttle.simulation.requests import Request

#: Lower corners. The last one is open: nothing lies beyond the limits of the engine.
_ROWS: Final = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 19, 22, 26, 30, 35, 40, 46, 53, 61, 70)
_MORE_ROWS: Final = (80, 92, 106, 122, 140, 160, 185, 212, 244, 280, 320, 370, 430, 512, 724)
_PROMPT_TOKENS: Final = (0, 1, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_CONTEXT_FACTOR: Final = 1.25
#: Prompt tokens are charged as chunks of this length: the least attention that they can cost.
_CHUNK_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class Served:
    """Work that no schedule gets around.

    Attributes:
        prompt_tokens: Prompt tokens to compute.
        output_tokens: Output tokens after the first of each request.
        context_tokens: Tokens in KV, summed over those output tokens.
        gap_seconds: Longest time that those tokens may take in all, or infinite.
        longest_context_tokens: No request holds more.
    """

    prompt_tokens: float
    output_tokens: float
    context_tokens: float
    gap_seconds: float
    longest_context_tokens: int

    @classmethod
    def of(
        cls, requests: Sequence[Request], missed_limit: int, tpot_seconds: float | None
    ) -> Served:
        """The work of a trace, less what `missed_limit` requests can take away of each kind.

        Raises:
            InvalidInputError: A request finds part of its prompt cached.
        """
        prompts = np.array([item.prompt_tokens for item in requests], dtype=np.float64)
        outputs = np.array([item.output_tokens for item in requests], dtype=np.float64)
        if any(item.cached_tokens for item in requests):
            raise InvalidInputError("cached_tokens", "above 0", "requests without cached tokens")
        gaps = outputs - 1.0
        # The j-th of them reads the prompt and j tokens before it.
        context = gaps * prompts + gaps * (gaps + 1.0) / 2.0
        kept = len(requests) - missed_limit
        limit = np.inf if tpot_seconds is None else tpot_seconds
        return cls(
            prompt_tokens=float(np.sort(prompts)[:kept].sum()),
            output_tokens=float(np.sort(gaps)[:kept].sum()),
            context_tokens=float(np.sort(context)[:kept].sum()),
            gap_seconds=float(limit * np.sort(gaps)[-kept:].sum()) if kept else np.inf,
            longest_context_tokens=int((prompts + outputs).max()),
        )


@dataclass(frozen=True, slots=True)
class _Types:
    """Iteration types and what each is charged and credited, (n,) each."""

    joules: NDArray[np.float64]
    seconds: NDArray[np.float64]
    least_rows: NDArray[np.float64]
    rows: NDArray[np.float64]
    context: NDArray[np.float64]
    prompts: NDArray[np.float64]


def least_energy_joules(
    plant: Plant,
    served: Served,
    horizon_seconds: float,
    clocks_mhz: Sequence[int] = (),
) -> float:
    """Energy of all GPUs of the engine that no schedule undercuts.

    Args:
        plant: The chip that the schedules run on.
        served: Work to be done.
        horizon_seconds: Horizon that energies are compared over.
        clocks_mhz: Clocks that schedules may use; empty for all of them.

    Raises:
        InvalidInputError: The engine drafts tokens, finds prompts cached, or has a special role.
    """
    engine = plant.parameters.engine
    plain = (
        getattr(engine, "draft_tokens_count", 0) == 0
        and getattr(engine, "prefix_cache_hit_ratio", 0.0) == 0.0
        and getattr(engine, "role", "mixed") == "mixed"
    )
    if not plain:
        raise InvalidInputError(
            "engine", engine, "an engine without drafts, cache hits and roles for the certificate"
        )
    idle = plant.idle_power_watts(plant.clocks_mhz[0])
    active = 0.0
    if served.prompt_tokens or served.output_tokens:
        active = _least_active_joules(
            _types(plant, served, idle, tuple(clocks_mhz) or plant.clocks_mhz), served
        )
    return plant.gpus_count * (active + idle * horizon_seconds)


def _least_active_joules(types: _Types, served: Served) -> float:
    from scipy.optimize import linprog  # type: ignore[import-untyped]  # noqa: PLC0415 - slow to load

    work = np.vstack([-types.prompts, -types.rows, -types.context])
    wanted = -np.array([served.prompt_tokens, served.output_tokens, served.context_tokens])
    if np.isfinite(served.gap_seconds):
        work = np.vstack([work, types.least_rows * types.seconds])
        wanted = np.append(wanted, served.gap_seconds)
    scale = np.maximum(np.abs(wanted), 1.0)
    solved = linprog(types.joules, A_ub=work / scale[:, None], b_ub=wanted / scale, method="highs")
    if not solved.success:
        # No schedule keeps the limit: what is left out of the programme makes no difference.
        solved = linprog(types.joules, A_ub=work[:3] / scale[:3, None], b_ub=wanted[:3] / scale[:3])
    return float(solved.fun)


def _types(plant: Plant, served: Served, idle_watts: float, clocks_mhz: tuple[int, ...]) -> _Types:
    limits = plant.parameters.engine
    kv_tokens = plant.kv_blocks_count * limits.kv_block_tokens
    rows = [each for each in (*_ROWS, *_MORE_ROWS) if each <= limits.running_requests_limit]
    prompts = [each for each in _PROMPT_TOKENS if each <= limits.batched_tokens_limit]
    contexts = [1.0]
    while contexts[-1] * _CONTEXT_FACTOR < served.longest_context_tokens:
        contexts.append(max(contexts[-1] * _CONTEXT_FACTOR, contexts[-1] + 16.0))
    found: list[tuple[float, ...]] = []
    for row_index, row in enumerate(rows):
        most_rows = _next(rows, row_index, limits.running_requests_limit + 1) - 1
        for prompt_index, prompt in enumerate(prompts):
            if row == prompt == 0:
                continue
            most_prompts = _next(prompts, prompt_index, limits.batched_tokens_limit + 1) - 1
            for context_index, context in enumerate(contexts if row else [0.0]):
                if row * context > kv_tokens:
                    break
                longest = _next(contexts, context_index, served.longest_context_tokens)
                credit = (most_rows, min(most_rows * longest, kv_tokens), most_prompts)
                work = _work(row, int(row * context), prompt)
                found += _hull(plant, work, idle_watts, clocks_mhz, (float(row), *credit))
    return _Types(*np.array(found).T)


def _next(values: Sequence[float], index: int, last: float) -> float:
    return values[index + 1] if index + 1 < len(values) else last


def _work(rows: int, context: int, prompt: int) -> IterationWork:
    chunks = [(_CHUNK_TOKENS, 0)] * (prompt // _CHUNK_TOKENS)
    if prompt % _CHUNK_TOKENS:
        chunks.append((prompt % _CHUNK_TOKENS, 0))
    return IterationWork(
        prefill_chunks=tuple(chunks),
        decode_requests_count=rows,
        decode_context_tokens=context,
        sampled_requests_count=rows,
        decode_tokens_count=rows,
    )


def _hull(
    plant: Plant,
    work: IterationWork,
    idle_watts: float,
    clocks_mhz: tuple[int, ...],
    charged_and_credited: tuple[float, ...],
) -> list[tuple[float, ...]]:
    """The clocks that can pay: on the lower hull of energy over time."""
    points = []
    for clock in clocks_mhz:
        cost = plant.iteration(work, clock)
        seconds = cost.latency_seconds
        points.append(((cost.power_watts - idle_watts) * seconds, seconds))
    points.sort(key=lambda point: (point[1], point[0]))
    hull: list[tuple[float, float]] = []
    for joules, seconds in points:
        if hull and joules >= hull[-1][0]:
            continue  # slower and no cheaper
        while len(hull) > 1 and _above(hull[-2], hull[-1], (joules, seconds)):
            hull.pop()
        hull.append((joules, seconds))
    return [(joules, seconds, *charged_and_credited) for joules, seconds in hull]


def _above(
    first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]
) -> bool:
    """Whether `middle` lies on or above the line from `first` to `last`, as energy over time."""
    slope = (last[0] - first[0]) / (last[1] - first[1])
    return middle[0] >= first[0] + slope * (middle[1] - first[1])
