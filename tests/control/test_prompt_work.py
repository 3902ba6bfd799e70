from __future__ import annotations

import numpy as np
import pytest

from throttle.control.prompt_work import PromptWorkEstimator
from throttle.control.state import IterationState, Phase, ScheduledRequests


def _iteration(end, tokens, prompts=1, duration=0.02):
    work = ScheduledRequests(
        num_prefill_requests=prompts if tokens else 0,
        sum_prefill_tokens=tokens,
        num_decode_requests=4,
        sum_decode_kv_tokens=400,
    )
    return IterationState(0, Phase.COMPLETED, end, duration, scheduled=work)


def _within(estimator, seconds):
    ratio, mean, variance = estimator.estimate().within(np.array([seconds]))
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
    assert estimator.estimate() is None
    for step in range(10, 100):
        estimator.add(_iteration(0.1 * step, 0))
    assert estimator.estimate() is None
