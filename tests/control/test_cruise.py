from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from throttle.control.arrivals import LoadEstimator, OfferedLoad
from throttle.control.cruise import (
    CarryingLimits,
    equilibrium_shapes,
    expect_interruptions,
    settle,
)
from throttle.control.state import IterationState, Phase, ScheduledRequests
from throttle.testing import FormulaPredictor

PREDICTOR = FormulaPredictor()
OPEN = CarryingLimits(512, 1e12, np.inf, np.inf)


def _load(decode_tokens_per_second, requests_per_second=None):
    requests = (
        decode_tokens_per_second / 200 if requests_per_second is None else requests_per_second
    )
    return OfferedLoad(
        prefill_tokens_per_second=1000.0 * requests,
        prefill_iterations_per_second=requests,
        prefill_requests_per_iteration=1.0,
        prefill_kv_tokens_per_iteration=0.0,
        decode_tokens_per_second=decode_tokens_per_second,
        context_tokens=1100.0,
    )


def _settle(load, limits=OPEN, predictor=PREDICTOR):
    prediction = predictor.predict(equilibrium_shapes(load, limits))
    idle = predictor.idle_power_watts
    return settle(load, limits, prediction, np.full_like(idle, idle[0]))


@pytest.mark.parametrize("rate", [20.0, 200.0, 1000.0, 2500.0])
def test_the_equilibrium_generates_exactly_what_arrives(rate):
    result = _settle(_load(rate))
    carried = np.isfinite(result.power_watts)
    assert carried[-1]
    generated = (result.batch_requests / result.tpot_seconds)[carried]
    np.testing.assert_allclose(generated, rate, rtol=1e-3)


def test_a_slower_clock_settles_at_a_larger_batch():
    result = _settle(_load(1000.0))
    assert (np.diff(result.batch_requests) <= 1e-9).all()


def test_at_light_load_power_comes_near_to_rest_and_at_heavy_load_to_busy():
    light, heavy = _settle(_load(0.5)), _settle(_load(2500.0))
    rest = PREDICTOR.idle_power_watts[0]
    assert light.power_watts[-1] == pytest.approx(rest, rel=0.1)
    assert heavy.power_watts[-1] == pytest.approx(500.0, rel=0.01)


def test_when_never_idle_a_floor_power_paid_anyway_makes_the_lowest_clock_the_cheapest():
    assert np.argmin(_settle(_load(500.0)).power_watts) == 0


def test_at_light_load_with_a_busy_floor_hurrying_to_rest_is_cheaper_than_the_lowest_clock():
    floor = dataclasses.replace(PREDICTOR, static_watts=400.0, dynamic_watts=100.0)
    result = _settle(_load(60.0), predictor=floor)
    assert np.argmin(result.power_watts) > 0


def test_clocks_that_cannot_carry_the_load_within_a_limit_are_out():
    load = _load(1000.0)
    free = _settle(load)
    limit = float(free.tpot_seconds[40])
    result = _settle(load, dataclasses.replace(OPEN, tpot_seconds=limit))
    assert np.isinf(result.power_watts[:39]).all()
    assert np.isfinite(result.power_watts[41:]).all()
    small = dataclasses.replace(OPEN, batch_requests=float(free.batch_requests[40]))
    assert np.isinf(_settle(load, small).power_watts[:39]).all()
    kv = dataclasses.replace(OPEN, kv_tokens=float(free.batch_requests[40]) * 1100.0)
    assert np.isinf(_settle(load, kv).power_watts[:39]).all()


def test_the_engine_keeps_room_for_a_crowd_larger_than_the_mean_batch():
    load = _load(1000.0)
    mean = _settle(load).batch_requests[-1]
    tight = dataclasses.replace(OPEN, batch_requests=float(np.ceil(1.05 * mean)))
    roomy = dataclasses.replace(OPEN, batch_requests=float(np.ceil(mean + 4.0 * np.sqrt(mean))))
    assert not np.isfinite(_settle(load, tight).power_watts[-1])
    assert np.isfinite(_settle(load, roomy).power_watts[-1])
    bursty = dataclasses.replace(load, dispersion_ratio=9.0)
    assert not np.isfinite(_settle(bursty, roomy).power_watts[-1])


def test_answers_that_arrive_count_before_they_flow_and_only_upwards():
    load = dataclasses.replace(_load(1000.0), requests_per_second=2.0)
    assert load.with_answers_of(600.0).decode_tokens_per_second == 1200.0
    assert load.with_answers_of(100.0) == load
    assert load.with_answers_of(1e6).decode_tokens_per_second == pytest.approx(1500.0)


def test_more_prompts_than_a_clock_can_compute_have_no_equilibrium():
    assert np.isinf(_settle(_load(200.0, requests_per_second=60.0)).power_watts).all()


def test_interruptions_stretch_time_by_what_prompts_add_per_second():
    load = _load(1000.0)
    prediction = PREDICTOR.predict(equilibrium_shapes(load, OPEN))
    interruptions = expect_interruptions(load, OPEN, prediction, deviations=0.0)
    decode, mixed = np.split(prediction.latency_seconds, 2)
    row = int(np.searchsorted(interruptions.batches, 16))
    expected = 1.0 / (1.0 - 5.0 * (mixed[row, -1] - decode[row, -1]))
    assert interruptions.stretch_ratio(np.array([16.0]))[0, -1] == pytest.approx(expected)
    per_token = (mixed[row, -1] - decode[row, -1]) / 1000.0
    assert interruptions.prompt_token_seconds(np.array([16.0]))[0, -1] == pytest.approx(per_token)
    bursts = expect_interruptions(load, OPEN, prediction, deviations=1.0)
    assert (bursts.ratios >= interruptions.ratios).all()


def _completed(now, decodes, prompt_tokens=0):
    work = ScheduledRequests(
        num_prefill_requests=1 if prompt_tokens else 0,
        sum_prefill_tokens=prompt_tokens,
        num_decode_requests=decodes,
        sum_decode_kv_tokens=decodes * 500,
    )
    return IterationState(0, Phase.COMPLETED, now, 0.01, scheduled=work)


def test_the_load_is_what_flows_per_second_of_engine_time():
    estimator = LoadEstimator(time_constant_seconds=60.0, settling_seconds=5.0)
    for step in range(3000):
        estimator.add(_completed(step * 0.01, 12, prompt_tokens=800 if step % 20 == 0 else 0))
    load = estimator.load()
    assert load.decode_tokens_per_second == pytest.approx(1200, rel=0.02)
    assert load.prefill_tokens_per_second == pytest.approx(4000, rel=0.02)
    assert load.prefill_iterations_per_second == pytest.approx(5, rel=0.02)
    assert load.context_tokens == pytest.approx(500)


def test_the_load_is_unknown_until_it_has_settled():
    estimator = LoadEstimator(60.0, 5.0)
    for step in range(400):
        estimator.add(_completed(step * 0.01, 12))
    assert estimator.load() is None


@pytest.mark.parametrize(("burst", "expected"), [(1, 1.0), (6, 6.0)])
def test_arrivals_in_bursts_are_told_from_independent_ones(burst, expected):
    random = np.random.default_rng(5)
    estimator = LoadEstimator(300.0, 5.0)
    for step in range(60_000):
        prompts = burst * random.poisson(0.05 / burst)
        work = ScheduledRequests(
            num_prefill_requests=int(prompts),
            sum_prefill_tokens=int(prompts) * 100,
            num_decode_requests=8,
        )
        estimator.add(IterationState(step, Phase.COMPLETED, step * 0.01, 0.01, scheduled=work))
    assert estimator.load().dispersion_ratio == pytest.approx(expected, rel=0.3)


def test_old_load_is_forgotten():
    estimator = LoadEstimator(10.0, 1.0)
    for step in range(2000):
        estimator.add(_completed(step * 0.01, 40))
    for step in range(6000):
        estimator.add(_completed(20.0 + step * 0.01, 4))
    assert estimator.load().decode_tokens_per_second == pytest.approx(400, rel=0.05)
