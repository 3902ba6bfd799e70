"""Correction by feedback, the horizon's sums and `throttle.control.slack.measure_slack`, compiled.

The rows of the slack table are the definition's, but for limits at one position that do not follow
one another: the definition keeps the tightest, here all stay. The least slack is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from throttle.control.compiled.compiler import compiled
from throttle.control.scoreboard import Column
from throttle.control.slack import TBT_DECODE_SEGMENTS, SlackTable, Slo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from predictors.prediction import Prediction
    from throttle.control.cruise import Interruptions
    from throttle.control.feedback import PredictionFeedback
    from throttle.control.projection import Horizon
    from throttle.control.slack import Guards

_NONE = np.empty(0)
_NO_TABLE = np.empty((0, 0))

# Columns and limits as plain numbers: compiled code takes them for constants.
_NUMBER = int(Column.NUMBER)
_ARRIVAL = int(Column.ARRIVAL)
_FIRST_TOKEN = int(Column.FIRST_TOKEN)
_TTFT_LIMIT = int(Column.TTFT)
_TBT_LIMIT = int(Column.TBT)
_E2E_LIMIT = int(Column.E2E)
_TTFT, _TBT, _E2E = int(Slo.TTFT), int(Slo.TBT), int(Slo.E2E)


def correct(
    prediction: Prediction, horizon: Horizon, feedback: PredictionFeedback
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """`PredictionFeedback.correct`, and what the whole horizon takes.

    Returns:
        Latency and its upper bound, (K, C) each; energy of one GPU and time over the horizon, (C,).
    """
    decode, mixed = feedback.factors(mixed=False), feedback.factors(mixed=True)
    latency, upper, joules, seconds = correct_prediction(
        prediction.latency_seconds,
        prediction.latency_upper_seconds,
        prediction.power_watts,
        horizon.shapes,
        horizon.iterations,
        *decode,
        *mixed,
        feedback.power_ratio,
    )
    return latency, upper, joules, seconds


def measure_slack(
    horizon: Horizon,
    latency_seconds: NDArray[np.float64],
    latency_upper_seconds: NDArray[np.float64],
    now_seconds: float,
    guards: Guards,
    interruptions: Interruptions | None,
) -> SlackTable:
    """As `throttle.control.slack.measure_slack`.

    Args:
        horizon: The projected segments; must not be empty.
        latency_seconds: Expected duration of an iteration of each segment, (K, C).
        latency_upper_seconds: Its calibrated upper bound, (K, C).
        now_seconds: Engine time.
        guards: How much of each limit may be planned with.
        interruptions: How prompts to come stretch segments; None for not at all.
    """
    slack, slos, numbers, lost_count = slack_of(
        horizon.prompts,
        horizon.decodes,
        horizon.prompt_lengths,
        horizon.remaining_tokens,
        horizon.first_tokens.segments,
        horizon.first_tokens.iterations,
        horizon.iterations,
        horizon.shapes,
        horizon.prefill_segments_count,
        latency_seconds,
        latency_upper_seconds,
        float(now_seconds),
        _NONE if interruptions is None else interruptions.batches,
        _NO_TABLE if interruptions is None else interruptions.ratios,
        float(guards.ttft_ratio),
        float(guards.tbt_ratio),
        float(guards.e2e_ratio),
        float(guards.reserve_seconds),
    )
    return SlackTable(slack, slos, numbers, lost_count)


@compiled
def correct_prediction(
    predicted: NDArray[np.float64],
    predicted_upper: NDArray[np.float64],
    watts: NDArray[np.float64],
    shapes: NDArray[np.float64],
    iterations: NDArray[np.float64],
    decode_bias: float,
    decode_widening: float,
    mixed_bias: float,
    mixed_widening: float,
    power_ratio: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """What `correct` returns, factors of both phases given."""
    segments_count, clocks_count = len(shapes), predicted.shape[1]
    latency = np.empty((segments_count, clocks_count))
    upper = np.empty((segments_count, clocks_count))
    joules, seconds = np.zeros(clocks_count), np.zeros(clocks_count)
    for segment in range(segments_count):
        mixed = shapes[segment, 1] > 0.0
        bias = mixed_bias if mixed else decode_bias
        wide = mixed_widening if mixed else decode_widening
        length = iterations[segment]
        for clock in range(clocks_count):
            latency[segment, clock] = predicted[segment, clock] * bias
        for clock in range(clocks_count):
            bound = predicted_upper[segment, clock] * bias * wide
            upper[segment, clock] = max(bound, latency[segment, clock])
        for clock in range(clocks_count):
            seconds[clock] += length * latency[segment, clock]
        for clock in range(clocks_count):
            joules[clock] += length * (latency[segment, clock] * watts[segment, clock])
    joules *= power_ratio
    return latency, upper, joules, seconds


@compiled
def slack_of(
    prompts: NDArray[np.float64],
    decodes: NDArray[np.float64],
    prompt_lengths: NDArray[np.float64],
    remaining: NDArray[np.float64],
    first_segments: NDArray[np.int64],
    first_iterations: NDArray[np.float64],
    iterations: NDArray[np.float64],
    shapes: NDArray[np.float64],
    prefill_count: int,
    latency: NDArray[np.float64],
    upper: NDArray[np.float64],
    now: float,
    batches: NDArray[np.float64],
    ratios: NDArray[np.float64],
    ttft_ratio: float,
    tbt_ratio: float,
    e2e_ratio: float,
    reserve_seconds: float,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], int]:
    """Slack (M, C), kinds and numbers (M,), and how many requests are lost."""
    segments_count, clocks_count = latency.shape
    last = clocks_count - 1
    # _Timeline: expected time at the fastest clock, upper bound at every clock
    stretched = np.empty((segments_count, clocks_count))
    before = np.zeros((segments_count, clocks_count))
    fastest, fastest_before = np.empty(segments_count), np.zeros(segments_count)
    ends = np.empty(segments_count)
    passed = 0.0
    for segment in range(segments_count):
        stretched[segment] = upper[segment]
        fastest[segment] = latency[segment, last]
        if len(batches) and segment >= prefill_count:  # `Interruptions.stretch_ratio`
            batch = shapes[segment, 3]
            place = np.searchsorted(batches, batch, side="right") - 1
            low = min(max(place, 0), len(batches) - 2)
            beyond = (batch - batches[low]) / (batches[low + 1] - batches[low])
            beyond = min(max(beyond, 0.0), 1.0)
            for clock in range(clocks_count):
                ratio = ratios[low, clock] * (1.0 - beyond) + ratios[low + 1, clock] * beyond
                stretched[segment, clock] *= ratio
            fastest[segment] *= ratios[low, last] * (1.0 - beyond) + ratios[low + 1, last] * beyond
        if segment:
            length = iterations[segment - 1]
            for clock in range(clocks_count):
                spent = stretched[segment - 1, clock] * length
                before[segment, clock] = before[segment - 1, clock] + spent
            fastest_before[segment] = fastest_before[segment - 1] + fastest[segment - 1] * length
        passed += iterations[segment]
        ends[segment] = passed
    tbt_limit = np.inf
    for request in range(len(decodes)):
        tbt_limit = min(tbt_limit, decodes[request, _TBT_LIMIT])
    judged = min(prefill_count + TBT_DECODE_SEGMENTS, segments_count)
    most = 2 * len(prompts) + len(decodes) + judged
    slack = np.empty((most, clocks_count))
    slos, numbers = np.empty(most, np.int64), np.empty(most, np.int64)
    planned = np.empty(most)
    rows = lost_count = 0
    lost = np.zeros(len(prompts), np.bool_)
    # what is left to each first token
    held_segment, held_iterations = -1, 0.0
    for request in range(len(prompts)):
        row = prompts[request]
        granted = row[_TTFT_LIMIT] - (now - row[_ARRIVAL])
        if not np.isfinite(granted) or not np.isnan(row[_FIRST_TOKEN]):
            continue
        segment, into = first_segments[request], first_iterations[request]
        if fastest_before[segment] + fastest[segment] * into > granted:
            lost[request] = True
            lost_count += 1
            continue
        allowed = granted * ttft_ratio - reserve_seconds
        if rows and segment == held_segment and into == held_iterations:
            if allowed >= planned[rows - 1]:
                continue
            rows -= 1
        held_segment, held_iterations = segment, into
        planned[rows], slos[rows], numbers[rows] = allowed, _TTFT, np.int64(row[_NUMBER])
        for clock in range(clocks_count):
            time = before[segment, clock] + stretched[segment, clock] * into
            slack[rows, clock] = allowed - time
        rows += 1
    # what is left to each last token
    for request in range(len(prompts) + len(decodes)):
        prompt = request < len(prompts)
        row = prompts[request] if prompt else decodes[request - len(prompts)]
        granted = row[_E2E_LIMIT] - (now - row[_ARRIVAL])
        if not np.isfinite(granted):
            continue
        if prompt:
            begin = ends[first_segments[request]] - iterations[first_segments[request]]
            end = begin + first_iterations[request] + prompt_lengths[request] - 1.0
        else:
            end = remaining[request - len(prompts)]
        segment = min(np.searchsorted(ends, end), segments_count - 1)
        into = end - (ends[segment] - iterations[segment])
        if fastest_before[segment] + fastest[segment] * into > granted:
            lost_count += not prompt or not lost[request]
            continue
        slos[rows], numbers[rows] = _E2E, np.int64(row[_NUMBER])
        for clock in range(clocks_count):
            time = before[segment, clock] + stretched[segment, clock] * into
            slack[rows, clock] = granted * e2e_ratio - time
        rows += 1
    # what is left to every single gap of the next iterations
    if np.isfinite(tbt_limit):
        for segment in range(judged):
            if latency[segment, last] <= tbt_limit:
                slos[rows], numbers[rows] = _TBT, 0
                for clock in range(clocks_count):
                    slack[rows, clock] = tbt_limit * tbt_ratio - upper[segment, clock]
                rows += 1
    return slack[:rows], slos[:rows], numbers[:rows], lost_count
