from __future__ import annotations

import dataclasses
import itertools

import pytest

from throttle.errors import InvalidInputError
from throttle.simulation.experiment import on_common_horizon
from throttle.simulation.outcomes import GapHistogram, RequestOutcome
from throttle.simulation.policies.static import FixedClock, MaximumClock
from throttle.simulation.requests import Request
from throttle.simulation.workload import load_trace

SUMMARY_KEYS = {
    "energy_joules",
    "energy_per_output_token_joules",
    "attainment_ratio",
    "ttft_p50_seconds",
    "ttft_p99_seconds",
    "tpot_p50_seconds",
    "tpot_p99_seconds",
    "tbt_p99_seconds",
    "e2e_p99_seconds",
    "requests_count",
    "output_tokens_count",
    "clock_changes_count",
    "horizon_seconds",
}


@pytest.fixture(scope="module")
def minute():
    return load_trace("azure2023_conv_10min").window(60.0, 90.0).requests


def test_two_runs_with_one_seed_are_identical(bench, plant, minute):
    results = [bench(plant, minute, seed=9).play(FixedClock(1200)) for _ in range(2)]
    assert results[0] == results[1]


def test_another_seed_gives_another_run(bench, plant, minute):
    results = [bench(plant, minute, seed=seed).play() for seed in (1, 2)]
    assert results[0].energy_joules != results[1].energy_joules


def test_a_lower_fixed_clock_saves_energy_and_takes_longer(bench, plant, minute):
    results = {
        policy.name: bench(plant, minute).play(policy)
        for policy in (MaximumClock(), FixedClock(1200))
    }
    common = on_common_horizon(results)
    fast, slow = (common[name].summary(1.0, 0.05) for name in ("max", "fixed-1200"))
    assert fast.keys() >= SUMMARY_KEYS
    assert fast["horizon_seconds"] == slow["horizon_seconds"]
    assert 0.4 < slow["energy_joules"] / fast["energy_joules"] < 0.75
    assert slow["tpot_p50_seconds"] > fast["tpot_p50_seconds"]
    assert slow["output_tokens_count"] == fast["output_tokens_count"]
    assert (fast["clock_changes_count"], slow["clock_changes_count"]) == (0, 1)


def test_a_longer_horizon_adds_idle_power(bench, noiseless_plant):
    result = bench(noiseless_plant, [Request(1, 0.0, 100, 10)]).play(FixedClock(600))
    later = result.extended_to(result.horizon_seconds + 10.0)
    added = later.energy_joules - result.energy_joules
    assert added == pytest.approx(10 * noiseless_plant.idle_power_watts(600))
    assert later.idle_energy_joules - result.idle_energy_joules == pytest.approx(added)
    with pytest.raises(InvalidInputError, match="horizon_seconds"):
        later.extended_to(1.0)


def test_playing_on_until_a_time_equals_extending_to_it(bench, noiseless_plant):
    requests = [Request(1, 0.0, 100, 10)]
    short = bench(noiseless_plant, requests).play()
    long = bench(noiseless_plant, requests).play(until_seconds=5.0)
    assert long.horizon_seconds == pytest.approx(5.0)
    assert long.finished_seconds == short.finished_seconds
    assert long.energy_joules == pytest.approx(short.extended_to(5.0).energy_joules)


def test_series_add_up_to_the_energy(bench, plant, minute):
    result = bench(plant, minute).play()
    series = result.series
    times = (0.0, *series.time_seconds)
    spans = [end - start for start, end in itertools.pairwise(times)]
    energy = sum(span * watts for span, watts in zip(spans, series.power_watts, strict=True))
    assert energy == pytest.approx(result.energy_joules, rel=0.03)
    assert all(span < 1.0 for span in spans)
    assert max(series.running_count) > 5


def test_progress_is_told_about_each_half_second(bench, plant, minute):
    times = []
    result = bench(plant, minute).play(progress=times.append)
    assert len(times) == pytest.approx(result.horizon_seconds / 0.52, rel=0.1)


def outcome(ttft, tpot):
    return RequestOutcome(1, 0.0, 10, 1 if tpot is None else 5, ttft, tpot, 1.0, 0)


def test_attainment_counts_every_arrived_request(bench, plant):
    result = bench(plant, [Request(1, 0.0, 10, 1)]).play()
    kept = (outcome(1.0, 0.05), outcome(0.5, None), outcome(1.1, 0.01), outcome(0.1, 0.06))
    result = dataclasses.replace(result, outcomes=kept, arrived_count=5)
    assert result.attainment_ratio(1.0, 0.05) == 2 / 5


def test_gap_quantiles_are_exact_to_one_percent():
    histogram = GapHistogram()
    for index in range(1, 1001):
        histogram.add(index / 1000, 3)
    assert histogram.count == 3000
    assert histogram.quantile_seconds(0.5) == pytest.approx(0.5, rel=0.01)
    assert histogram.quantile_seconds(0.99) == pytest.approx(0.99, rel=0.01)
    assert GapHistogram().quantile_seconds(0.5) == 0.0
