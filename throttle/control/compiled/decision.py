"""A whole decision as one compiled call, for engines that tell of their requests one by one.

Nothing is computed here: the steps are those of the modules beside this one, in the order in which
`throttle.control.controller` takes them. Called one after the other from Python, the way from step
to step costs more than the steps, above all when caches have gone cold between two iterations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.compiled_sweep import predict_shapes, shapes_covered
from predictors.prediction import SHAPE_COLUMNS
from throttle.control import feedback, selection
from throttle.control.compiled.compiler import compiled
from throttle.control.compiled.lateness import lateness_of
from throttle.control.compiled.projection import project_rows
from throttle.control.compiled.scoreboard import advance
from throttle.control.compiled.slack import correct_prediction, slack_of
from throttle.control.feedback import Learned, Observed
from throttle.control.outcome import Outcome
from throttle.control.scoreboard import Column
from throttle.control.selection import Reason

if TYPE_CHECKING:
    from numpy.typing import NDArray


# Places and columns as plain numbers: compiled code takes them for constants.
_SHAPE_WIDTH = len(SHAPE_COLUMNS)
_COLUMNS_COUNT = len(Column)
_SECONDS, _CLOCK, _WATTS = int(Observed.SECONDS), int(Observed.CLOCK), int(Observed.WATTS)
_LOG_BIAS, _WIDENING = int(Learned.LOG_BIAS), int(Learned.WIDENING)
_LOG_POWER_BIAS = int(Learned.LOG_POWER_BIAS)
_KV_PRESSURE, _INFEASIBLE = int(Reason.KV_PRESSURE), int(Reason.INFEASIBLE)
_OUT_OF_ENVELOPE = int(Reason.OUT_OF_ENVELOPE)

_learn_duration: Any = compiled(feedback.learn_duration)
_learn_power: Any = compiled(feedback.learn_power)
_clock_costs: Any = compiled(selection.clock_costs)
_select_clock: Any = compiled(selection.select_clock)
_binding_limit: Any = compiled(selection.binding_limit)


@compiled
def _taken(rows: NDArray[np.float64], places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Copies of some rows, in this order."""
    taken = np.empty((len(places), _COLUMNS_COUNT))
    for position in range(len(places)):
        taken[position] = rows[places[position]]
    return taken


@compiled
def _learn(
    learned: NDArray[np.float64],
    violation_ratio: float,
    observed: NDArray[np.float64],
    predicted: NDArray[np.float64],
    first: int,
) -> None:
    """Take in observed iterations, predicted (3, K, C) from the row `first` on."""
    for position in range(len(observed)):
        row, clock = first + position, int(observed[position, _CLOCK])
        seconds, watts = observed[position, _SECONDS], observed[position, _WATTS]
        phase = 1 if observed[position, 1] > 0.0 else 0
        _learn_duration(
            learned,
            violation_ratio,
            seconds,
            predicted[0, row, clock],
            predicted[1, row, clock],
            phase,
        )
        if not math.isnan(watts):
            _learn_power(learned, watts, predicted[2, row, clock], seconds)


@compiled
def decide(
    requests: tuple[Any, ...],
    lengths: tuple[Any, ...],
    engine: tuple[Any, ...],
    predictor: tuple[Any, ...],
    learning: tuple[Any, ...],
    due: NDArray[np.float64],
    outlook: tuple[Any, ...],
    newcomers: tuple[float, float, bool],
    successors: tuple[float, float],
    now: float,
    pressed: bool,  # noqa: FBT001
    choice: tuple[Any, ...],
    standing: tuple[Any, ...],
    late: tuple[float, float, float],
    outcome: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Advance, project, predict, learn, correct, measure and choose.

    Args:
        requests: `Scoreboard.places`; the rows are changed by the steps.
        lengths: `LengthTable.arguments`.
        engine: Limits on tokens and requests of a batch, KV blocks, tokens of one; GPUs; share of
            the KV cache that is pressure; shares of the limits that may be planned with (TTFT, TBT,
            E2E) and the reserve in seconds; clocks at which lateness is judged.
        predictor: `SweepPredictor.arguments`.
        learning: `PredictionFeedback.learned`; the ratio of violations; what was observed since,
            (n, 10), columns as in `Observed`.
        due: Shapes that the outlook wants predicted, (S, 7).
        outlook: `Outlook.arguments`.
        newcomers: `Outlook.newcomers_arguments`.
        successors: `Outlook.successors_arguments`.
        now: Engine time, seconds.
        pressed: Whether the engine says that its KV cache is as good as full.
        choice: Place of the objective; clocks allowed (C,); those that carry the load (C,); what a
            second less is worth in watts; whether the load is known; index of the ceiling; whether
            to hurry for lost requests.
        standing: `Selector.standing`.
        late: Share of late answers that is never exceeded; the price of one in answers; the share
            to keep to.
        outcome: Filled; places as in `Outcome`.

    Returns:
        Prediction of `due`, (3, S, C), uncorrected.
    """
    rows, running, waiting, steps = requests
    starts, survival, expected_remaining, excess = lengths
    (
        tokens_limit,
        requests_limit,
        blocks_count,
        block_tokens,
        gpus_count,
        pressure_ratio,
        ttft_ratio,
        tbt_ratio,
        e2e_ratio,
        reserve_seconds,
        judged,
    ) = engine
    space, model, lowest, highest = predictor
    learned, violation_ratio, observed = learning
    batches, stretches, token_seconds, after_prompts, after_decodes = outlook
    newcomer_tpot, newcomers_per_second, newcomers_known = newcomers
    objective, allowed, carried, refund_watts, load_known, ceiling, hurry_lost = choice
    clocks_mhz, current, elapsed_seconds, reluctance = standing
    late_limit_ratio, late_answers, late_target_ratio = late
    outcome[:] = 0.0
    advance(rows, steps[0], steps[1], steps[2], steps[3], steps[4])
    nothing = np.empty((3, 0, len(clocks_mhz)))

    (
        shapes,
        iterations,
        kv_blocks,
        prefill_count,
        admitted_count,
        first_segments,
        first_iterations,
        prompts,
        prompt_lengths,
        decodes,
        remaining,
    ) = project_rows(
        _taken(rows, running),
        _taken(rows, waiting),
        starts,
        expected_remaining,
        excess,
        tokens_limit,
        requests_limit,
        blocks_count,
        block_tokens,
        successors[0],
        successors[1],
    )
    segments_count, observed_count = len(shapes), len(observed)
    if segments_count == 0:
        return nothing

    wanted = np.empty((segments_count + observed_count + len(due), _SHAPE_WIDTH))
    wanted[:segments_count] = shapes
    wanted[segments_count : segments_count + observed_count] = observed[:, :_SHAPE_WIDTH]
    wanted[segments_count + observed_count :] = due
    predicted = predict_shapes(wanted, space, model)
    if len(predicted) == 0:
        return nothing
    _learn(learned, violation_ratio, observed, predicted, segments_count)
    power_ratio = math.exp(learned[_LOG_POWER_BIAS])
    latency, upper, joules, seconds = correct_prediction(
        predicted[0],
        predicted[1],
        predicted[2],
        shapes,
        iterations,
        math.exp(learned[_LOG_BIAS]),
        math.exp(learned[_WIDENING]),
        math.exp(learned[_LOG_BIAS + 1]),
        math.exp(learned[_WIDENING + 1]),
        power_ratio,
    )

    slack, slos, numbers, lost_count = slack_of(
        prompts,
        decodes,
        prompt_lengths,
        remaining,
        first_segments,
        first_iterations,
        iterations,
        shapes,
        prefill_count,
        latency,
        upper,
        now,
        batches,
        stretches,
        ttft_ratio,
        tbt_ratio,
        e2e_ratio,
        reserve_seconds,
    )
    work = after_prompts if prefill_count else after_decodes
    late_weight, late_ratio, late_number, late_slack = lateness_of(
        decodes,
        prompts,
        first_segments,
        first_iterations,
        iterations,
        shapes,
        latency,
        upper,
        judged,
        now,
        starts,
        survival,
        batches,
        token_seconds,
        work[0],
        work[1],
        work[2],
        work[3],
        newcomer_tpot,
        newcomers_per_second,
        prefill_count,
        newcomers_known,
    )
    late_known = late_weight > 0.0

    near = max(prefill_count, 1)
    if admitted_count < len(waiting) or pressed or kv_blocks.max() > blocks_count * pressure_ratio:
        index, reason = ceiling, _KV_PRESSURE
    elif not shapes_covered(shapes[:near], lowest, highest).all():
        index, reason = ceiling, _OUT_OF_ENVELOPE
    elif hurry_lost and lost_count:
        index, reason = ceiling, _INFEASIBLE
    else:
        feasible, weights = allowed.copy(), np.ones(len(allowed))
        for clock in range(len(allowed)):
            for row in range(len(slos)):
                feasible[clock] &= slack[row, clock] >= 0.0
            if late_known:
                feasible[clock] &= late_ratio[clock] <= late_limit_ratio
                weights[clock] = 1.0 + late_answers * late_ratio[clock]
        costs = _clock_costs(objective, clocks_mhz, joules, seconds, refund_watts, current, carried)
        index, reason = _select_clock(
            feasible, costs, weights, load_known, clocks_mhz, current, elapsed_seconds, reluctance
        )
    applied = min(index, ceiling)
    kind, number, left = _binding_limit(
        applied,
        slack,
        slos,
        numbers,
        late_known,
        late_ratio,
        late_target_ratio,
        int(late_number),
        late_slack,
    )
    watts = predicted[2]
    gpus_ratio = gpus_count * power_ratio
    outcome[Outcome.DECIDED] = 1.0
    outcome[Outcome.INDEX], outcome[Outcome.REASON] = index, reason
    outcome[Outcome.BINDING], outcome[Outcome.BINDING_REQUEST] = kind, number
    outcome[Outcome.BINDING_SECONDS] = left
    outcome[Outcome.SECONDS], outcome[Outcome.UPPER_SECONDS] = (
        latency[0, applied],
        upper[0, applied],
    )
    outcome[Outcome.WATTS] = watts[0, applied] * gpus_ratio
    outcome[Outcome.FASTEST_SECONDS] = latency[0, -1]
    outcome[Outcome.FASTEST_WATTS] = watts[0, -1] * gpus_ratio
    outcome[Outcome.LOST] = lost_count
    outcome[Outcome.LATE_KNOWN] = late_known
    outcome[Outcome.LATE_RATIO] = late_ratio[applied] if late_known else 0.0
    return predicted[:, segments_count + observed_count :].copy()
