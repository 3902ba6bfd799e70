"""`throttle.control.lateness` compiled: the same sums, over what can matter.

Nothing is kept per pair of answer and segment, and the tail of the prompts' work is computed only
where it is neither certain nor impossible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from predictors.elementary import cube_roots, exponentials
from throttle.control.compiled.compiler import fused
from throttle.control.lateness import (
    BOUND_DEVIATIONS,
    LEAST_SHARE,
    NEWCOMER_GAPS,
    RECOURSE_RATIO,
    RECOURSE_SECONDS,
    Lateness,
    judged_clocks,
)
from throttle.control.scoreboard import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throttle.control.cruise import Interruptions
    from throttle.control.lateness import Newcomers
    from throttle.control.lengths import LengthTable
    from throttle.control.projection import Horizon
    from throttle.control.prompt_work import PromptWork

#: Normal deviations beyond which the definition's tail is clipped.
_TAIL_LIMIT = 8.0

_NONE = np.empty(0)
_NO_TABLE = np.empty((0, 0))

# Columns as plain numbers: compiled code takes them for constants.
_NUMBER = int(Column.NUMBER)
_GENERATED = int(Column.GENERATED)
_MAX_OUTPUT = int(Column.MAX_OUTPUT)
_PREDICTED_OUTPUT = int(Column.PREDICTED_OUTPUT)
_LENGTH_CLASS = int(Column.LENGTH_CLASS)
_FIRST_TOKEN = int(Column.FIRST_TOKEN)
_FIRST_GENERATED = int(Column.FIRST_GENERATED)
_TPOT = int(Column.TPOT)


def expect_lateness(
    horizon: Horizon,
    latency_seconds: NDArray[np.float64],
    latency_upper_seconds: NDArray[np.float64],
    *,
    now_seconds: float,
    lengths: LengthTable,
    interruptions: Interruptions | None,
    work: PromptWork | None,
    newcomers: Newcomers | None,
    clocks: tuple[int, int],
) -> Lateness | None:
    """As `throttle.control.lateness.expect_lateness`, from what its arguments are made of.

    Args:
        horizon: The projected segments, K of them, not none.
        latency_seconds: Expected duration of an iteration of each segment, (K, C).
        latency_upper_seconds: Its calibrated upper bound, (K, C).
        now_seconds: Engine time.
        lengths: Survival curves of the answers' classes.
        interruptions: What prompts to come add; None while that is not known.
        work: How many come; None where hardly any do.
        newcomers: Who else will be there; None while that is not known.
        clocks: First and last clock that may be chosen.
    """
    if interruptions is None:
        work = None  # the definition then takes their time for zero
    if work is None:
        windows = any_ratio = log_mean = log_variance = _NONE
    else:
        windows, any_ratio = work.log_seconds, work.any_ratio
        log_mean, log_variance = work.log_mean_tokens, work.log_variance
    total, excess, number, slack = lateness_of(
        horizon.decodes,
        horizon.prompts,
        horizon.first_tokens.segments,
        horizon.first_tokens.iterations,
        horizon.iterations,
        horizon.shapes,
        latency_seconds,
        latency_upper_seconds,
        judged_clocks(clocks),
        float(now_seconds),
        lengths.starts,
        lengths.survival,
        _NONE if interruptions is None else interruptions.batches,
        _NO_TABLE if interruptions is None else interruptions.token_seconds,
        windows,
        any_ratio,
        log_mean,
        log_variance,
        float(newcomers.tpot_seconds) if newcomers is not None else 0.0,
        float(newcomers.requests_per_second) if newcomers is not None else 0.0,
        horizon.prefill_segments_count,
        newcomers is not None,
    )
    if total <= 0.0:
        return None
    return Lateness(excess, int(number), slack)


@fused
def _add_late(
    shares: NDArray[np.float64],
    granted: NDArray[np.float64],
    seconds: NDArray[np.float64],
    deviation: NDArray[np.float64],
    token_seconds: NDArray[np.float64],
    before: NDArray[np.float64],
    narrow: NDArray[np.float64],
    known: NDArray[np.float64],
    windows: NDArray[np.float64],
    any_ratio: NDArray[np.float64],
    log_mean: NDArray[np.float64],
    log_variance: NDArray[np.float64],
    room: NDArray[np.float64],
    bits: NDArray[np.int64],
    late: NDArray[np.float64],
) -> None:
    """Add the probability of being late at the end of one segment, weighed, to `late`.

    `PromptWork.within` and `_View._late` of all answers at all clocks. `shares`, `granted` and
    `known` (what no further prompt comes in) are (n,), `seconds`, `deviation` and `token_seconds`
    (J,), and `before`, `narrow` (what an answer's own beginning takes off the two) and `late` are
    (J, n). `room` and `bits` are to work in.
    """
    clocks_count, count = late.shape
    if not len(windows):
        for clock in range(clocks_count):
            for answer in range(count):
                spare = granted[answer] - seconds[clock] + before[clock, answer]
                late[clock, answer] += 0.0 if spare > 0.0 else shares[answer]
        return
    last = len(windows) - 1
    first_seconds, last_seconds = np.exp(windows[0]), np.exp(windows[last])
    steps_per_log = last / (windows[last] - windows[0]) if last else 0.0
    size = clocks_count * count
    logs, moments, came = room[0], room[4], room[5]
    for answer in range(count):
        within = max(granted[answer] - known[answer], 1e-6)
        place = (np.log(within) - windows[0]) * steps_per_log
        low = min(max(int(place), 0), max(last - 1, 0))
        into = min(max(place - low, 0.0), 1.0)
        high = min(low + 1, last)
        share = any_ratio[low] + (any_ratio[high] - any_ratio[low]) * into
        came[answer] = share * min(within / first_seconds, 1.0)
        logs[answer] = log_mean[low] + (log_mean[high] - log_mean[low]) * into
        logs[count + answer] = log_variance[low] + (log_variance[high] - log_variance[low]) * into
    exponentials(logs, bits, moments, 2 * count)
    tokens, variances = moments[:count], moments[count : 2 * count]
    for answer in range(count):
        grown = max((granted[answer] - known[answer]) / last_seconds, 1.0)
        tokens[answer] *= grown
        variances[answer] *= grown
    # one array written per loop: the compiler gives up on telling more of them apart
    spare = room[2, :size].reshape((clocks_count, count))
    deviations = room[3, :size].reshape((clocks_count, count))
    values, results = room[0], room[1]
    for clock in range(clocks_count):
        passed, wide, token = seconds[clock], deviation[clock], token_seconds[clock]
        first = clock * count
        for answer in range(count):
            spare[clock, answer] = granted[answer] - passed + before[clock, answer]
        for answer in range(count):
            spread = max(wide - narrow[clock, answer], 0.0)
            deviations[clock, answer] = np.sqrt(
                variances[answer] * token * token + spread * spread + 1e-12
            )
        for answer in range(count):
            mean = tokens[answer] * token + 1e-9
            values[first + answer] = max(spare[clock, answer], 1e-30) * mean * mean
    cube_roots(values, bits, results, size)
    for clock in range(clocks_count):
        token, first = token_seconds[clock], clock * count
        for answer in range(count):
            mean = 3.0 * (tokens[answer] * token + 1e-9)
            spread = deviations[clock, answer]
            z = (mean - 3.0 * results[first + answer]) / spread - spread / mean
            z = min(max(z, -_TAIL_LIMIT), _TAIL_LIMIT)
            values[first + answer] = -z * (1.5976 + 0.07056 * z * z)
    exponentials(values, bits, results, size)
    for clock in range(clocks_count):
        first = clock * count
        for answer in range(count):
            met = came[answer] / (1.0 + results[first + answer])
            late[clock, answer] += shares[answer] * (met if spare[clock, answer] > 0.0 else 1.0)


@fused
def _survival_at(x: float, starts: NDArray[np.float64], survival: NDArray[np.float64]) -> float:
    """`LengthCurve.survival_ratio` at one place: numpy.interp."""
    last = len(starts) - 1
    if x >= starts[last]:
        end: float = survival[last]
        return end
    if x <= starts[0]:
        begin: float = survival[0]
        return begin
    low = np.searchsorted(starts, x, side="right") - 1
    slope = (survival[low + 1] - survival[low]) / (starts[low + 1] - starts[low])
    between: float = survival[low] + slope * (x - starts[low])
    return between


@fused
def _ending_shares(
    row: NDArray[np.float64],
    generated: float,
    begin: float,
    ends: NDArray[np.float64],
    starts: NDArray[np.float64],
    survival: NDArray[np.float64],
    shares: NDArray[np.float64],
) -> None:
    """`LengthBeliefs.ending_shares` of one answer that goes on from `begin`; fills (K,) shares."""
    curve = survival[int(row[_LENGTH_CLASS])]
    now = max(_survival_at(generated, starts, curve), 1e-9)
    last = len(starts) - 1
    low = np.searchsorted(starts, generated, side="right") - 1
    alive = 1.0
    for segment in range(len(ends)):
        reached = generated + max(ends[segment] - begin, 0.0)
        if reached >= row[_MAX_OUTPUT]:
            after = 0.0
        elif row[_PREDICTED_OUTPUT] > generated:
            after = 1.0 if reached < row[_PREDICTED_OUTPUT] else 0.0
        else:
            while low < last and starts[low + 1] <= reached:
                low += 1
            after = curve[low] / now
            if low < last:
                slope = (curve[low + 1] - curve[low]) / (starts[low + 1] - starts[low])
                after = (curve[low] + slope * (reached - starts[low])) / now
        shares[segment] = alive - after
        alive = after


@fused
def lateness_of(
    decodes: NDArray[np.float64],
    prompts: NDArray[np.float64],
    first_segments: NDArray[np.int64],
    first_iterations: NDArray[np.float64],
    iterations: NDArray[np.float64],
    shapes: NDArray[np.float64],
    latency: NDArray[np.float64],
    upper: NDArray[np.float64],
    judged: NDArray[np.int64],
    now: float,
    starts: NDArray[np.float64],
    survival: NDArray[np.float64],
    batches: NDArray[np.float64],
    batch_token_seconds: NDArray[np.float64],
    windows: NDArray[np.float64],
    any_ratio: NDArray[np.float64],
    log_mean: NDArray[np.float64],
    log_variance: NDArray[np.float64],
    newcomer_tpot: float,
    newcomers_per_second: float,
    prefill_segments_count: int,
    newcomers_known: bool,  # noqa: FBT001 - compiled functions take positions
) -> tuple[float, NDArray[np.float64], float, NDArray[np.float64]]:
    """Weight, excess at every clock, and the foremost answer with its slack at every clock."""
    segments_count, clocks_count = latency.shape
    count = len(judged)
    # the horizon at the judged clocks, as in `_View.of`
    ends = np.empty(segments_count)
    seconds = np.empty((segments_count, count))
    deviation = np.empty((segments_count, count))
    each_deviation = np.empty((segments_count, count))
    token_seconds = np.zeros((segments_count, count))
    passed = 0.0
    for segment in range(segments_count):
        passed += iterations[segment]
        ends[segment] = passed
        low, beyond = 0, 0.0
        if len(batches):  # `Interruptions` at this batch
            batch = shapes[segment, 3]
            place = np.searchsorted(batches, batch, side="right") - 1
            low = min(max(place, 0), len(batches) - 2)
            beyond = (batch - batches[low]) / (batches[low + 1] - batches[low])
            beyond = min(max(beyond, 0.0), 1.0)
        for clock in range(count):
            at = judged[clock]
            spread = (upper[segment, at] - latency[segment, at]) / BOUND_DEVIATIONS
            each_deviation[segment, clock] = spread
            own = latency[segment, at] * iterations[segment]
            wide = spread * iterations[segment]
            seconds[segment, clock] = own if segment == 0 else seconds[segment - 1, clock] + own
            deviation[segment, clock] = (
                wide if segment == 0 else deviation[segment - 1, clock] + wide
            )
            if len(batches):
                token_seconds[segment, clock] = (
                    batch_token_seconds[low, at] * (1.0 - beyond)
                    + batch_token_seconds[low + 1, at] * beyond
                )
    answers_count = len(decodes) + len(prompts)
    shares = np.zeros((segments_count, answers_count))
    granted = np.zeros((segments_count, answers_count))
    # what an answer's own beginning takes off, at each clock: nothing for those that go on
    before = np.zeros((count, answers_count))
    narrow = np.zeros((count, answers_count))
    likely = np.zeros(answers_count, np.int64)
    own_shares = np.empty(segments_count)
    weight = 0.0
    for answer in range(answers_count):
        decoding = answer < len(decodes)
        row = decodes[answer] if decoding else prompts[answer - len(decodes)]
        tpot, generated = row[_TPOT], row[_GENERATED]
        limited, banked, begin = np.isfinite(tpot), 0.0, 0.0
        if decoding:
            elapsed = now - row[_FIRST_TOKEN]
            if not (limited and np.isfinite(elapsed)):
                likely[answer] = -1
                continue
            # granted for the tokens that are there, less what they took
            banked = tpot * (generated - row[_FIRST_GENERATED]) - elapsed
        else:
            generated = max(generated, 1.0)
            tpot = tpot if limited else 1.0
            first = first_segments[answer - len(decodes)]
            left = iterations[first] - first_iterations[answer - len(decodes)]
            begin = ends[first] - left
            for clock in range(count):
                own = latency[first, judged[clock]]
                before[clock, answer] = seconds[first, clock] - left * own
                wide = left * each_deviation[first, clock]
                narrow[clock, answer] = deviation[first, clock] - wide
        _ending_shares(row, generated, begin, ends, starts, survival, own_shares)
        most = -np.inf
        for segment in range(segments_count):
            gaps = ends[segment] - begin
            share = own_shares[segment] if limited and gaps > 0.0 else 0.0
            shares[segment, answer] = share
            granted[segment, answer] = tpot * max(gaps, 0.0) + banked
            if share > most:
                likely[answer], most = segment, share
    # lateness that will be judged again before it is here counts less
    kernel, kernel_seconds = np.empty(segments_count), 0.0
    started = 0.0
    for segment in range(segments_count):
        ended = seconds[segment, count - 1]
        kernel[segment] = np.exp(-0.5 * (started + ended) / RECOURSE_SECONDS)
        kernel_seconds += kernel[segment] * (ended - started)
        started = ended
    weight = 0.0
    for segment in range(segments_count):
        for answer in range(answers_count):
            shares[segment, answer] *= kernel[segment]
            weight += shares[segment, answer]
    # whose prompts share the next iterations is known; others come only after them
    known_segments = min(max(prefill_segments_count, 1), segments_count)
    planned = seconds[known_segments - 1, count - 1]
    known = np.full(answers_count, planned)
    for answer in range(len(decodes), answers_count):
        known[answer] = max(planned - before[count - 1, answer], 0.0)
    late = np.zeros((count, answers_count))
    most_at_once = max(answers_count, len(NEWCOMER_GAPS)) * max(count, 2)
    room, bits = np.empty((6, most_at_once)), np.empty(most_at_once, np.int64)
    for segment in range(segments_count):
        if shares[segment].any():
            _add_late(
                shares[segment],
                granted[segment],
                seconds[segment],
                deviation[segment],
                token_seconds[segment],
                before,
                narrow,
                known if segment >= known_segments else granted[segment],
                windows,
                any_ratio,
                log_mean,
                log_variance,
                room,
                bits,
                late,
            )
    foremost, foremost_number = -np.inf, 0.0
    foremost_slack = np.full(count, np.inf)
    for answer in range(answers_count):
        segment = likely[answer]
        if segment < 0:
            continue
        behind = 0.0
        for clock in range(count):
            behind += late[clock, answer] - late[count - 1, answer]
        if behind > foremost:
            row = decodes[answer] if answer < len(decodes) else prompts[answer - len(decodes)]
            foremost, foremost_number = behind, row[_NUMBER]
            for clock in range(count):
                foremost_slack[clock] = (
                    granted[segment, answer] - seconds[segment, clock] + before[clock, answer]
                )
    late_sum, total = np.empty(count), np.full(count, weight)
    for clock in range(count):
        late_sum[clock] = late[clock].sum()
    if newcomers_known:
        segment, gaps_count = min(prefill_segments_count, segments_count - 1), len(NEWCOMER_GAPS)
        everyone = survival[len(survival) - 1]
        alive = _survival_at(1.0, starts, everyone)
        coming, allowed = np.empty(gaps_count), newcomer_tpot * NEWCOMER_GAPS
        taken, spread = np.empty((count, gaps_count)), np.empty((count, gaps_count))
        for index in range(gaps_count):
            gaps = NEWCOMER_GAPS[index]
            after = _survival_at(1.0 + gaps, starts, everyone)
            coming[index] = alive - after
            alive = after
            for clock in range(count):
                taken[clock, index] = -gaps * latency[segment, judged[clock]]
                spread[clock, index] = -gaps * each_deviation[segment, clock]
        newcomers_late = np.zeros((count, gaps_count))
        nothing = np.zeros(count)
        _add_late(
            coming,
            allowed,
            nothing,
            nothing,
            token_seconds[segment],
            taken,
            spread,
            np.zeros(gaps_count),
            windows,
            any_ratio,
            log_mean,
            log_variance,
            room,
            bits,
            newcomers_late,
        )
        for clock in range(count):
            came = newcomers_per_second * kernel_seconds * RECOURSE_RATIO
            late_sum[clock] += came * newcomers_late[clock].sum()
            total[clock] += came
    # the excess, never rising with the clock, interpolated in logarithms
    logs = np.empty(count)
    reached_late = late_sum[count - 1] / max(total[count - 1], 1e-9)
    worst = 0.0
    for clock in range(count - 1, -1, -1):
        worst = max(worst, late_sum[clock] / max(total[clock], 1e-9) - reached_late)
        logs[clock] = np.log(worst + LEAST_SHARE)
    excess = np.empty(clocks_count)
    slack = np.empty(clocks_count)
    low = 0
    for clock in range(clocks_count):
        while low < count - 2 and clock >= judged[low + 1]:
            low += 1
        if clock <= judged[0]:
            log, left_over = logs[0], foremost_slack[0]
        elif clock >= judged[count - 1]:
            log, left_over = logs[count - 1], foremost_slack[count - 1]
        else:
            width, into = judged[low + 1] - judged[low], clock - judged[low]
            log = logs[low] + (logs[low + 1] - logs[low]) / width * into
            left_over = foremost_slack[low]
            if np.isfinite(left_over):  # infinite where only newcomers can be late
                left_over += (foremost_slack[low + 1] - foremost_slack[low]) / width * into
        excess[clock] = np.exp(log) - LEAST_SHARE
        slack[clock] = left_over
    return total.max(), excess, foremost_number, slack
