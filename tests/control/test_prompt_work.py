from __future__ import annotations

import numpy as np
import pytest

from throttle.control.prompt_work import (
    PromptCost,
    PromptWorkEstimator,
    prompt_cost,
    prompt_size_shapes,
)
from throttle.control.state import IterationState, Phase, ScheduledRequests


def _iteration(end, tokens, prompts=1, duration=0.02):
    work = ScheduledRequests(
        num_prefill_requests=prompts if tokens else 0,
        sum_prefill_tokens=tokens,
        num_decode_requests=4,
        sum_decode_kv_tokens=400,
    )
    return IterationState(0, Phase.COMPLETED, end, duration, scheduled=work)


#: Every token costs the same.
EVEN = PromptCost(np.array([1.0, 1e5]), np.array([1.0, 1e5]))


def _within(estimator, seconds, *, after_decodes=False, cost=EVEN):
    work = estimator.after_decodes(cost) if after_decodes else estimator.after_prompts(cost)
    ratio, mean, variance = work.within(np.array([seconds]))
    return float(ratio[0]), float(mean[0]), float(variance[0])


def test_evenly_spaced_prompts_fill_windows_in_proportion_to_their_length():
    estimator = PromptWorkEstimator()
    for step in range(500):
        estimator.add(_iteration(0.1 * step, 300))
    ratio, mean, _ = _within(estimator, 1.0)
    assert ratio == pytest.approx(1.0)
    assert mean == pytest.approx(3000, rel=0.1)
    # An answer that ends before the next prompt comes meets none.
    assert _within(estimator, 0.03)[0] < 0.01


def test_bursts_show_as_variance_that_evenly_spaced_prompts_do_not_have():
    even, bursty = PromptWorkEstimator(), PromptWorkEstimator()
    for step in range(900):
        even.add(_iteration(0.1 * step, 300))
        start = 2.0 * (step // 20)  # twenty prompts in a row, every two seconds
        bursty.add(_iteration(start + 0.02 * (step % 20), 300))
    _, even_mean, even_variance = _within(even, 0.2)
    _, bursty_mean, bursty_variance = _within(bursty, 0.2)
    assert bursty_mean > 3 * even_mean
    assert bursty_variance > 3 * even_variance


def test_the_iteration_that_follows_at_once_delays_the_next_token():
    estimator = PromptWorkEstimator()
    for step in range(200):
        end = 1.0 * step
        estimator.add(_iteration(end, 100, duration=0.05))
        # Begins as the one before ends, and lasts longer than the window.
        estimator.add(_iteration(end + 0.2, 4000, duration=0.2))
    ratio, mean, _ = _within(estimator, 0.05)
    assert ratio == pytest.approx(0.5, abs=0.05)  # after every other one
    assert mean == pytest.approx(4000, rel=0.01)


def test_too_little_is_no_estimate():
    estimator = PromptWorkEstimator()
    for step in range(10):
        estimator.add(_iteration(0.1 * step, 300))
    assert estimator.after_prompts(EVEN) is None
    assert estimator.after_decodes(EVEN) is None
    for step in range(10, 100):
        estimator.add(_iteration(0.1 * step, 0))
    assert estimator.after_prompts(EVEN) is None
    assert estimator.after_decodes(EVEN) is None


def test_after_an_iteration_without_prompts_fewer_come_at_once():
    estimator = PromptWorkEstimator()
    for step in range(400):
        begin = 1.0 * step
        estimator.add(_iteration(begin + 0.3, 2000, duration=0.3))
        estimator.add(_iteration(begin + 0.6, 2000, duration=0.3))  # came during the first
        for decode in range(1, 20):
            estimator.add(_iteration(begin + 0.6 + 0.02 * decode, 0))
    after_prompts, _, _ = _within(estimator, 0.02)
    after_decodes, _, _ = _within(estimator, 0.02, after_decodes=True)
    assert after_prompts == pytest.approx(0.5, abs=0.05)
    assert after_decodes < 0.2


def test_without_a_decode_iteration_the_windows_after_prompts_stand_for_all():
    estimator = PromptWorkEstimator()
    for step in range(500):
        estimator.add(_iteration(0.1 * step, 300))
    np.testing.assert_array_equal(
        estimator.after_decodes(EVEN).log_mean_tokens, estimator.after_prompts(EVEN).log_mean_tokens
    )


def test_only_the_last_prompts_are_remembered():
    estimator, recent = PromptWorkEstimator(), PromptWorkEstimator()
    for step in range(5000):
        iteration = _iteration(0.1 * step, 100 if step < 3900 else 700)
        estimator.add(iteration)
        if step >= 5000 - 1024:
            recent.add(iteration)
    assert _within(estimator, 0.5) == _within(recent, 0.5)


def test_large_prompts_weigh_more_than_their_tokens_where_they_cost_more():
    steep = PromptCost(np.array([100.0, 1000.0, 2000.0]), np.array([100.0, 1000.0, 4000.0]))
    estimator = PromptWorkEstimator()
    for step in range(500):
        estimator.add(_iteration(0.1 * step, 2000 if step % 2 else 100))
    _, tokens, _ = _within(estimator, 2.0)
    _, equivalent, _ = _within(estimator, 2.0, cost=steep)
    assert equivalent == pytest.approx(tokens * (4100 / 2100), rel=0.02)
    assert steep.equivalent(np.array([50.0]))[0] == pytest.approx(50.0)


def test_the_cost_of_prompts_is_that_of_the_prediction_and_1_for_the_mean():
    shapes = prompt_size_shapes(0.0, 16.0, 700.0, 8192.0)
    sizes = shapes[1:, 1]
    latency = 0.01 + np.concatenate([[0.0], 2e-5 * sizes + 1e-9 * sizes**2])
    cost = prompt_cost(latency, 1024.0, 8192.0)
    assert cost.equivalent(np.array([1024.0]))[0] == pytest.approx(1024.0)
    expected = 8192 * (2e-5 + 1e-9 * 8192) / (2e-5 + 1e-9 * 1024)
    assert cost.equivalent(np.array([8192.0]))[0] == pytest.approx(expected)
    assert (shapes[:, 3] == 16).all()
    assert sizes[-1] == 8192
