from __future__ import annotations

import pytest

from throttle.daemon.gate import LimitSettings, TokenBucket


def test_a_bucket_grants_its_rate_and_a_burst_of_two_seconds(clock):
    bucket = TokenBucket(10.0, clock)
    assert sum(bucket.take() for _ in range(100)) == 20
    clock.seconds += 1.0
    assert sum(bucket.take() for _ in range(100)) == 10
    clock.seconds += 1000.0
    assert sum(bucket.take() for _ in range(100)) == 20


def test_a_slow_bucket_grants_one_at_once(clock):
    bucket = TokenBucket(0.01, clock)
    assert bucket.take()
    assert not bucket.take()
    clock.seconds += 100.0
    assert bucket.take()


@pytest.mark.parametrize(
    ("field", "value"),
    [("message_bytes", 10), ("message_bytes", 2**40), ("calls_per_second", 0.0)],
)
def test_limits_out_of_range_are_named(field, value):
    (problem,) = LimitSettings(**{field: value}).problems()
    assert problem.startswith(f"{field} is {value}; allowed: ")
