from __future__ import annotations

import dataclasses

import pytest

from throttle.control.settings import ControlSettings


def test_the_defaults_are_allowed():
    assert ControlSettings().problems() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ttft_guard_ratio", 0.0),
        ("tpot_guard_ratio", 1.5),
        ("violation_ratio", 0.9),
        ("floor_clock_ratio", -0.1),
        ("dwell_seconds", -1.0),
        ("cruise_period_seconds", float("nan")),
        ("load_time_constant_seconds", 0.0),
        ("kv_pressure_ratio", float("inf")),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(field, value):
    (problem,) = dataclasses.replace(ControlSettings(), **{field: value}).problems()
    assert field in problem
    assert str(value) in problem
    assert "allowed" in problem


def test_a_floor_above_the_ceiling_is_refused():
    settings = ControlSettings(floor_clock_ratio=0.8, ceiling_clock_ratio=0.6)
    assert "ceiling_clock_ratio" in settings.problems()[0]


def test_every_number_is_checked():
    """A setting added later cannot be forgotten: an absurd value of each one is refused."""
    for field in dataclasses.fields(ControlSettings):
        if isinstance(field.default, (bool, str)):
            continue
        settings = dataclasses.replace(ControlSettings(), **{field.name: float("nan")})
        assert settings.problems(), field.name


def test_each_rung_of_the_ladder_allows_more_late_answers_than_the_one_before():
    budgets = [
        ControlSettings(posture=each).late_budget()
        for each in ("performance", "balanced", "efficiency")
    ]
    assert budgets == sorted(set(budgets))
    assert ControlSettings(posture="efficiency", late_budget_ratio=0.02).late_budget() == 0.02


@pytest.mark.parametrize("ratio", [0.0, 0.5, -1.0])
def test_a_budget_that_cannot_be_used_is_named(ratio):
    (problem,) = ControlSettings(late_budget_ratio=ratio).problems()
    assert "late_budget_ratio" in problem
