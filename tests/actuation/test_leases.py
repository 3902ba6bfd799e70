from __future__ import annotations

import pytest

from throttle.actuation.leases import LeaseTable, allowed_clocks_mhz, snap
from throttle.actuation.settings import ActuationSettings
from throttle.errors import ConflictError, InvalidInputError, NotFoundError

CLOCKS = (300, 600, 900, 1200)


def table(**settings):
    return LeaseTable({"a": CLOCKS, "b": CLOCKS}, ActuationSettings(**settings))


def test_lowering_again_too_soon_is_held_and_nothing_is_remembered_of_it():
    leases = table(lowering_interval_seconds=1.0)
    grant = leases.claim("x", ["a", "b"], 0.0)
    assert leases.order(grant.epoch, 900, 0.0) == {"a": 900, "b": 900}
    assert leases.order(grant.epoch, 600, 0.9) is None
    assert leases.order(grant.epoch, 900, 0.95) == {"a": 900, "b": 900}
    assert leases.order(grant.epoch, 600, 1.0) == {"a": 600, "b": 600}


@pytest.mark.parametrize("clock", [1200, 0])
def test_raising_and_resetting_are_never_delayed(clock):
    leases = table(lowering_interval_seconds=60.0)
    grant = leases.claim("x", ["a"], 0.0)
    leases.order(grant.epoch, 600, 0.0)
    assert leases.order(grant.epoch, clock, 0.0) == {"a": clock}


def test_a_new_lease_does_not_lower_sooner():
    leases = table(lowering_interval_seconds=1.0)
    first = leases.claim("x", ["a"], 0.0)
    leases.order(first.epoch, 900, 0.0)
    leases.end(first.epoch)
    second = leases.claim("x", ["a"], 0.5)
    assert leases.order(second.epoch, 600, 0.5) is None


def test_raises_beyond_the_burst_go_straight_to_default_clocks():
    fine = tuple(range(300, 1300, 5))
    leases = LeaseTable({"a": fine}, ActuationSettings(lowering_interval_seconds=0.0))
    grant = leases.claim("x", ["a"], 0.0)
    leases.order(grant.epoch, 300, 0.0)
    asked = [leases.order(grant.epoch, 305 + 5 * step, 0.0)["a"] for step in range(22)]
    assert asked[:20] == [305 + 5 * step for step in range(20)]
    assert asked[20] == 0


def test_a_lease_ends_unless_it_is_renewed():
    leases = table(lease_seconds=2.0)
    grant = leases.claim("x", ["a"], 0.0)
    assert leases.expired(1.99) == ()
    leases.renew(1.99)
    assert leases.expired(3.98) == ()
    assert leases.expired(3.99) == (grant,)


def test_an_epoch_is_never_given_twice_and_fences_what_comes_late():
    leases = table()
    first = leases.claim("x", ["a"], 0.0)
    leases.end(first.epoch)
    second = leases.claim("x", ["a"], 0.0)
    assert second.epoch > first.epoch
    with pytest.raises(ConflictError, match="no longer in force"):
        leases.order(first.epoch, 600, 0.0)
    assert leases.end(first.epoch) is None
    assert leases.owner("a") == "x"


def test_no_gpu_and_an_unknown_one_are_refused():
    leases = table()
    with pytest.raises(NotFoundError, match="at least one"):
        leases.claim("x", [], 0.0)
    with pytest.raises(NotFoundError, match="'c' is not among the configured ones: a, b"):
        leases.claim("x", ["a", "c"], 0.0)
    assert leases.owner("a") == ""


def test_clocks_stay_between_floor_and_ceiling():
    settings = ActuationSettings(floor_clock_mhz=400, ceiling_clock_mhz=1000)
    assert allowed_clocks_mhz(CLOCKS, settings) == (600, 900)
    assert [snap(clock, (600, 900)) for clock in (1, 599, 899, 900, 5000, 0)] == [
        600, 600, 600, 900, 900, 0,
    ]  # fmt: skip


def test_bounds_without_a_clock_between_them_are_refused():
    settings = ActuationSettings(floor_clock_mhz=601, ceiling_clock_mhz=899)
    with pytest.raises(InvalidInputError, match="300 to 1200 MHz"):
        allowed_clocks_mhz(CLOCKS, settings)
    assert ActuationSettings(floor_clock_mhz=900, ceiling_clock_mhz=600).problems()
