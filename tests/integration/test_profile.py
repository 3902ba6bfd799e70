"""`throttle profile` through a real daemon: rounds, resuming, observing, and clocks let go."""

from __future__ import annotations

import pytest

from predictors.dataset import read_records
from throttle.actuation.simulated import SimulatedGpuFile
from throttle.cli import main
from throttle.commands import profile
from throttle.commands.playing import gpu_entries
from throttle.commands.profile import Profiling
from throttle.simulation.plant import Plant
from throttle.simulation.profiling import DeepFilling, chosen_points, profiling_points

UUID = "GPU-simulated-0"


@pytest.fixture(scope="module")
def plant():
    return Plant.load("h200-qwen3-30b-a3b")


@pytest.fixture
def gpus(plant, tmp_path):
    with SimulatedGpuFile.create(tmp_path / "gpus", gpu_entries(plant, [UUID])) as file:
        yield file


def profiling(plant, gpus, tmp_path, seconds, **more):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return Profiling(plant, gpus, tmp_path / "gpus", out, 5, seconds, **more)


def recorded(tmp_path):
    return sorted(path.name[-9:] for path in (tmp_path / "out").glob("*.parquet"))


def test_rounds_are_recorded_and_not_repeated(plant, gpus, tmp_path):
    profiling(plant, gpus, tmp_path, 40.0).run()
    before = recorded(tmp_path)
    assert before[0] == "0.parquet"[-9:]
    assert gpus.read_lock_mhz(UUID) == 0
    profiling(plant, gpus, tmp_path, 40.0).run()
    assert recorded(tmp_path) == before
    profiling(plant, gpus, tmp_path, 90.0).run()  # goes on where it stopped
    assert len(recorded(tmp_path)) > len(before)


def test_prompts_are_a_good_part_of_what_is_recorded(plant, gpus, tmp_path):
    profiling(plant, gpus, tmp_path, 90.0).run()
    frame = read_records([tmp_path / "out"]).frame
    completed = frame[frame["phase"] == "completed"]
    assert (completed["sum_prefill_tokens"] > 0).mean() > 0.05
    assert completed["clock_observed_mhz"].nunique() > 40


def test_it_stops_at_a_stated_error(plant, gpus, tmp_path):
    profiling(plant, gpus, tmp_path, 600.0, target_error_ratio=0.5).run()
    assert len(recorded(tmp_path)) == 1


def test_observing_sets_no_clock_and_says_what_the_records_support(plant, gpus, tmp_path):
    observing = profiling(plant, gpus, tmp_path, 40.0, observe=True)
    observing.run()
    frame = read_records([tmp_path / "out"]).frame
    assert (frame["clock_target_mhz"] == 0).all()
    assert observing.supported_clocks()["decode"] == (1980.0, 1980.0)


def test_a_round_that_breaks_leaves_no_clock_locked_and_no_file(plant, gpus, tmp_path, monkeypatch):
    class Breaking(profile.SweepingLoad):
        asked_count = 0

        def take(self, now_seconds):
            self.asked_count += 1
            if gpus.read_lock_mhz(UUID) != 0 and self.asked_count > 5:
                interrupted.append(now_seconds)
                raise KeyboardInterrupt
            return super().take(now_seconds)

    interrupted = []

    monkeypatch.setattr(profile, "SweepingLoad", Breaking)
    with pytest.raises(KeyboardInterrupt):
        profiling(plant, gpus, tmp_path, 40.0).run()
    assert interrupted  # with a clock locked, so that there was one to let go
    assert gpus.read_lock_mhz(UUID) == 0
    assert recorded(tmp_path) == []
    monkeypatch.undo()
    profiling(plant, gpus, tmp_path, 40.0).run()


def test_every_beginning_of_the_points_is_spread(plant):
    points = profiling_points(400_000, 8192)
    assert len(set(points)) == len(points)
    first = points[: len(points) // 8]
    assert {point.concurrency for point in first} >= {1, 4}
    assert any(point.concurrency >= 32 for point in first)
    assert any(point.lengths.output_tokens == (1, 1) for point in first)


def fillings(kv_tokens, prompt_tokens_per_second, budget_seconds=1200.0):
    filling = DeepFilling(kv_tokens, budget_seconds, 9)
    points = [filling.point(index, prompt_tokens_per_second) for index in range(-1, 11)]
    assert points[0] is None  # before the first
    assert points[-2:] == [None, None]  # behind the last
    return points[1:-2]


def filled_tokens(point):
    return point.concurrency * sum(point.lengths.prompt_tokens) / 2


@pytest.mark.parametrize("tokens_per_second", [1500.0, 3000.0, 6000.0, 40_000.0, 1e6])
def test_filling_takes_no_more_than_its_share_whatever_the_engine(tokens_per_second):
    points = [point for point in fillings(4_000_000, tokens_per_second) if point]
    seconds = sum(map(filled_tokens, points)) / tokens_per_second
    assert seconds <= 0.15 * 1200.0
    # an engine that cannot be filled further than other points do is not filled
    assert bool(points) == (tokens_per_second > 3500.0)


def test_a_slow_engine_is_filled_less_often_and_less_far():
    fast, slow, slowest = (
        [point for point in fillings(4_000_000, speed) if point]
        for speed in (40_000.0, 8000.0, 6000.0)
    )
    assert len(fast) > len(slow) >= len(slowest) >= 3
    depth_fast, depth_slow, depth_slowest = (
        max(map(filled_tokens, points)) for points in (fast, slow, slowest)
    )
    assert depth_fast == pytest.approx(depth_slow, rel=0.01)
    assert depth_slowest < 0.9 * depth_slow


def test_fillings_are_spread_over_the_rounds_and_batches():
    points = fillings(700_000, 40_000.0)
    assert points[0] is not None  # a profile that is cut short has one, too
    assert any(points[5:])
    assert len({point.concurrency for point in points if point}) == 3


def test_nothing_is_filled_before_the_speed_of_prompts_is_known():
    assert fillings(700_000, 0.0) == [None] * 9


def test_a_full_cache_is_recorded(plant, gpus, tmp_path):
    profiling(plant, gpus, tmp_path, 240.0, observe=True).run()  # one clock: always the same
    frame = read_records([tmp_path / "out"]).frame
    assert frame["sum_decode_kv_tokens"].max() > 500_000


def test_a_cache_is_filled_well_beyond_other_points_at_whatever_clocks_it_meets(
    plant, gpus, tmp_path
):
    # how far depends on real time: at low clocks the first answers end before the last prompts
    profiling(plant, gpus, tmp_path, 240.0).run()
    frame = read_records([tmp_path / "out"]).frame
    assert frame["sum_decode_kv_tokens"].max() > 1.5 * 0.75 * 262_144


def test_points_that_are_less_sure_are_drawn_more_often(plant):
    import random  # noqa: PLC0415

    points = profiling_points(400_000, 8192)
    unsure = [10.0 if index < 10 else 0.0 for index in range(len(points))]
    drawn = chosen_points(points, unsure, 2000, random.Random(1))
    share = sum(point in points[:10] for point in drawn) / len(drawn)
    assert share > 3 * 10 / len(points)


def test_a_budget_of_nothing_is_refused(tmp_path, capsys):
    assert main(["profile", "--minutes", "0", "--out", str(tmp_path)]) != 0
    assert "--minutes is 0; allowed: above 0" in capsys.readouterr().err
