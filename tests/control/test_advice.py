from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.scenes import make_live, make_profile, make_row
from throttle.control.advice import (
    AdmissionReason,
    ParallelSize,
    ScalingAdvisor,
    Verdict,
    advise_admissions,
)
from throttle.control.arrivals import OfferedLoad
from throttle.control.cruise import (
    CarryingLimits,
    equilibrium_shapes,
    growth_limit_ratio,
    settle,
)
from throttle.control.projection import project
from throttle.testing import FormulaPredictor

PREDICTOR = FormulaPredictor()
LIMITS = CarryingLimits(256.0, 400_000.0, 0.05, 1.0)


def _advise(profile=None, *, running=(), waiting=(), iteration_seconds=0.02, now=1.0):
    live = make_live(running, waiting)
    horizon = project(
        live,
        np.full(len(running), 200.0),
        np.full(len(waiting), 200.0),
        profile or make_profile(),
    )
    upper = np.full(len(horizon.shapes), iteration_seconds)
    return [
        (each.request_number, each.verdict, each.reason)
        for each in advise_admissions(horizon, live, upper, now)
    ]


def _queued(number, **fields):
    return make_row(number, prompt=1000, computed=0, **fields)


def test_a_request_that_fits_and_is_in_time_is_admitted():
    assert _advise(waiting=[_queued(7, arrival=0.9, ttft=1.0)]) == [
        (7, Verdict.ADMIT, AdmissionReason.FITS)
    ]


def test_a_request_whose_first_token_comes_too_late_at_the_fastest_clock_is_lost():
    assert _advise(waiting=[_queued(7, arrival=0.0, ttft=1.01)]) == [
        (7, Verdict.LOST, AdmissionReason.TOO_LATE)
    ]


def test_a_request_without_room_is_held_until_its_time_is_over():
    full = make_profile(running_requests_limit=1)
    running = [make_row(1, generated=5)]
    young, old = _queued(7, arrival=0.9, ttft=1.0), _queued(8, arrival=-1.0, ttft=1.0)
    assert _advise(full, running=running, waiting=[young, old]) == [
        (7, Verdict.HOLD, AdmissionReason.NO_ROOM),
        (8, Verdict.LOST, AdmissionReason.TOO_LATE),
    ]


def test_a_prompt_that_breaks_the_gap_of_a_running_request_is_held():
    queue = [_queued(7, arrival=0.9, ttft=1.0)]
    strict = [make_row(1, generated=5, tbt=0.019)]
    assert _advise(running=strict, waiting=queue) == [
        (7, Verdict.HOLD, AdmissionReason.DELAYS_OTHERS)
    ]
    loose = [make_row(1, generated=5, tbt=0.021)]
    assert _advise(running=loose, waiting=queue)[0][1] is Verdict.ADMIT


def test_a_request_without_limits_is_never_lost():
    assert _advise(waiting=[make_row(7, prompt=100, computed=0, arrival=np.nan)])[0][1] is (
        Verdict.ADMIT
    )


def _load(decode_tokens_per_second):
    requests = decode_tokens_per_second / 150.0
    return OfferedLoad(
        prefill_tokens_per_second=800.0 * requests,
        prefill_iterations_per_second=requests,
        prefill_requests_per_iteration=1.0,
        prefill_kv_tokens_per_iteration=0.0,
        decode_tokens_per_second=decode_tokens_per_second,
        context_tokens=900.0,
    )


def _times(load, ratio):
    return dataclasses.replace(
        load,
        prefill_tokens_per_second=load.prefill_tokens_per_second * ratio,
        prefill_iterations_per_second=load.prefill_iterations_per_second * ratio,
        decode_tokens_per_second=load.decode_tokens_per_second * ratio,
    )


@given(tokens=st.floats(300.0, 2500.0), clock=st.integers(20, len(PREDICTOR.clocks_mhz) - 1))
def test_the_load_grows_to_where_the_equilibrium_stops_carrying_it(tokens, clock):
    load = _load(tokens)
    prediction = PREDICTOR.predict(equilibrium_shapes(load, LIMITS))
    limit = growth_limit_ratio(load, LIMITS, prediction.latency_seconds[:, clock])
    assert limit > 0.0

    def carried(ratio):
        grown = settle(_times(load, ratio), LIMITS, prediction, PREDICTOR.idle_power_watts)
        return bool(np.isfinite(grown.power_watts[clock]))

    assert carried(0.93 * limit)
    assert not carried(1.07 * limit)


def test_nothing_is_carried_where_one_iteration_already_breaks_the_limit():
    load, strict = _load(500.0), dataclasses.replace(LIMITS, tpot_seconds=1e-4)
    latency = PREDICTOR.predict(equilibrium_shapes(load, strict)).latency_seconds[:, -1]
    assert growth_limit_ratio(load, strict, latency) == 0.0


@pytest.mark.parametrize(("load_ratio", "expected"), [(0.5, 1), (1.5, 2), (3.0, 4), (9.0, None)])
def test_the_least_size_that_carries_the_load_is_advised(load_ratio, expected):
    load = _load(1000.0)
    latency = PREDICTOR.predict(equilibrium_shapes(load, LIMITS)).latency_seconds[:, -1]
    at_limit = _times(load, growth_limit_ratio(load, LIMITS, latency))

    class Faster:
        def __init__(self, times):
            self.times = times

        def predict(self, shapes):
            found = PREDICTOR.predict(shapes)
            return dataclasses.replace(found, latency_seconds=found.latency_seconds / self.times)

    sizes = [ParallelSize(count, Faster(count), 1e9) for count in (4, 1, 2)]
    roomy = dataclasses.replace(LIMITS, batch_requests=512.0)
    advisor = ScalingAdvisor(sizes, roomy)
    assert advisor.least_gpus_count(_times(at_limit, load_ratio), 0.0) == expected


def test_size_is_judged_again_after_a_while_and_never_without_a_load():
    advisor = ScalingAdvisor([ParallelSize(1, PREDICTOR, 1e9)], LIMITS)
    assert advisor.least_gpus_count(None, 0.0) is None
    assert advisor.least_gpus_count(_load(100.0), 0.0) == 1
    assert advisor.least_gpus_count(_load(1e6), 5.0) == 1
    assert advisor.least_gpus_count(_load(1e6), 11.0) is None
