from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from throttle.errors import InvalidInputError, NotFoundError
from throttle.simulation.anchors import clock_comparisons, iteration_comparisons
from throttle.simulation.drawing import RANGES
from throttle.simulation.operators import IterationWork
from throttle.simulation.parameters import gpu_names, load_plant_parameters, plant_names
from throttle.simulation.plant import Plant, draw_plant, plant_for
from throttle.simulation.routing import routing_table, selection_probabilities


def decode(batch, context=700):
    return IterationWork((), batch, batch * context)


def test_published_iterations_are_met_within_15_percent_and_10_percent_on_average():
    found = list(iteration_comparisons())
    assert len(found) == 20
    assert not [item for item in found if not item.is_kept]
    assert all(item.tolerance <= 0.15 for item in found)
    assert sum(abs(item.error) for item in found) / len(found) <= 0.10


def test_published_effects_of_the_clock_are_met_within_their_tolerances():
    found = list(clock_comparisons())
    assert not [item for item in found if not item.is_kept]
    assert max(item.tolerance for item in found) <= 0.10
    assert {item.subject.split(",")[0] for item in found} == {"RTX 5090", "A100", "H200", "L20"}


@pytest.mark.parametrize("batch", [8, 16, 32, 64])
def test_h200_decodes_faster_than_h100(plant, batch):
    h100 = Plant.load("h100-qwen3-30b-a3b").iteration(decode(batch), 1980)
    assert 0.6 < plant.iteration(decode(batch), 1980).latency_seconds / h100.latency_seconds < 0.9


@pytest.mark.parametrize("batch", [8, 16, 32, 64])
def test_h200_decode_at_1200_mhz_loses_little_speed_and_saves_much_energy(plant, batch):
    full, slow = plant.iteration(decode(batch), 1980), plant.iteration(decode(batch), 1200)
    assert -0.16 < full.latency_seconds / slow.latency_seconds - 1 < -0.08
    assert -0.33 < slow.energy_joules / full.energy_joules - 1 < -0.27


def test_large_prefill_is_held_below_the_power_limit_at_a_lower_clock(plant):
    cost = plant.iteration(IterationWork(((8192, 0),)), 1980)
    assert cost.effective_clock_mhz < 1980
    assert cost.power_watts <= 700


def test_prefill_slows_with_clock_far_more_than_decode(plant):
    prefill, batch = IterationWork(((8192, 0),)), decode(32)
    slowdown = [
        plant.iteration(work, 900).latency_seconds / plant.iteration(work, 1500).latency_seconds
        for work in (prefill, batch)
    ]
    assert slowdown[0] > 1.4
    assert slowdown[1] < 1.3


works = st.builds(
    IterationWork,
    prefill_chunks=st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 30000)), max_size=3),
    decode_requests_count=st.integers(1, 256),
    decode_context_tokens=st.integers(256, 600_000),
)
BEHAVIORS = (
    {name: Plant.load(name) for name in plant_names()}
    | {f"draw {seed}": draw_plant("h200-qwen3-30b-a3b", seed) for seed in range(4)}
    | {f"draw of 8 GPUs {seed}": draw_plant("h200-deepseek-v3-ep8", seed) for seed in range(2)}
) | {
    f"drawn {knee} {share}": Plant.load(
        "h200-qwen3-30b-a3b",
        {
            "gpu.power.voltage_knee_ratio": knee,
            "behavior.fixed_clock_sensitivity_ratio": share,
            "gpu.power.limit_watts": 450,
        },
    )
    for knee, share in ((0.3, 0.2), (0.87, 0.9))
}


@settings(max_examples=60, deadline=None)
@given(work=works, name=st.sampled_from(sorted(BEHAVIORS)))
def test_latency_never_rises_and_power_never_falls_with_clock_below_the_cap(work, name):
    plant = BEHAVIORS[name]
    limit = plant.parameters.gpu.power.limit_watts
    costs = [plant.iteration(work, clock) for clock in plant.clocks_mhz]
    for clock, lower, higher in zip(plant.clocks_mhz[1:], costs, costs[1:], strict=False):
        assert higher.latency_seconds <= lower.latency_seconds * (1 + 1e-12)
        assert higher.power_watts >= lower.power_watts * (1 - 1e-12)
        assert higher.effective_clock_mhz <= clock
        assert higher.power_watts <= limit or higher.effective_clock_mhz == plant.clocks_mhz[0]
        assert higher.active_experts == lower.active_experts


@settings(max_examples=60, deadline=None)
@given(work=works, name=st.sampled_from(sorted(BEHAVIORS)))
def test_the_power_cap_picks_the_highest_clock_that_keeps_the_limit(work, name):
    plant = BEHAVIORS[name]
    demand = plant._operators.demand(work)
    kept = [
        terms.clock_mhz
        for terms in plant._terms
        if plant._evaluate(demand, terms)[1] <= plant.parameters.gpu.power.limit_watts
    ]
    top, lowest = plant.maximum_clock_mhz, plant.clocks_mhz[0]
    assert plant.iteration(work, top).effective_clock_mhz == max(kept, default=lowest)


@given(work=works, name=st.sampled_from(sorted(BEHAVIORS)))
def test_shares_sum_to_one(work, name):
    shares = BEHAVIORS[name].iteration(work, 1200).shares
    parts = (shares.compute, shares.memory, shares.fixed, shares.communication)
    assert sum(parts) == pytest.approx(1.0)
    assert min(parts) >= 0


def test_more_work_takes_longer(plant):
    for smaller, larger in (
        (decode(8), decode(9)),
        (decode(8), decode(8, 701)),
        (IterationWork(((100, 0),)), IterationWork(((100, 500),))),
        (decode(8), IterationWork(((64, 0),), 8, 8 * 700)),
    ):
        costs = [plant.iteration(work, 1500).latency_seconds for work in (smaller, larger)]
        assert costs[0] < costs[1]


def test_idle_power_follows_the_clock_as_measured_on_h100():
    plant = Plant.load("h100-qwen3-30b-a3b")
    assert plant.idle_power_watts(345) == pytest.approx(71.7, abs=6)
    assert plant.idle_power_watts(1980) == pytest.approx(121.7, abs=1)


def test_idle_power_lies_below_the_power_of_any_work(plant):
    for clock in plant.clocks_mhz:
        assert plant.idle_power_watts(clock) < plant.iteration(decode(1), clock).power_watts


def test_clocks_between_supported_ones_snap_down(plant):
    assert plant.snap_mhz(1211) == 1200
    assert plant.snap_mhz(100) == 345
    assert plant.snap_mhz(5000) == 1980
    assert plant.iteration(decode(8), 1211) == plant.iteration(decode(8), 1200)


def test_an_iteration_without_work_is_refused(plant):
    with pytest.raises(InvalidInputError, match="at least one token"):
        plant.iteration(IterationWork(), 1980)


def test_chips_differ_in_power_but_not_in_speed(plant):
    costs = [plant.draw_chip(random.Random(s)).iteration(decode(8), 1200) for s in range(20)]
    assert len({cost.latency_seconds for cost in costs}) == 1
    ratios = [c.power_watts / plant.iteration(decode(8), 1200).power_watts for c in costs]
    assert 0.949 < min(ratios) < 1 < max(ratios) < 1.051


def test_uniform_routing_activates_the_textbook_number_of_experts():
    table = routing_table(128, 8, 0.0, 1, 64)
    assert table.active_experts[8] == pytest.approx(128 * (1 - (1 - 8 / 128) ** 8))
    assert table.active_experts[1] == pytest.approx(8)


@given(st.integers(1, 8), st.floats(0, 2.5))
def test_selection_probabilities_sum_to_the_experts_per_token(per_token, skew):
    probabilities = selection_probabilities(64, per_token, skew)
    assert probabilities.sum() == pytest.approx(per_token)
    assert probabilities.max() <= 1.0
    assert probabilities.min() >= 0.0


def test_skewed_routing_activates_fewer_experts_and_loads_ranks_unevenly():
    even, skewed = routing_table(128, 8, 0.0, 8, 512), routing_table(128, 8, 1.0, 8, 512)
    assert skewed.active_experts[16] < even.active_experts[16]
    assert even.fullest_rank_load_ratio == pytest.approx(1.0)
    assert skewed.fullest_rank_load_ratio > 1.2
    assert skewed.fullest_rank_active_experts[16] > skewed.active_experts[16] / 8


def test_tensor_parallel_ranks_share_the_work_and_pay_for_communication():
    one = Plant.load("h200-qwen3-30b-a3b")
    four = Plant.load("h200-qwen3-30b-a3b", {"parallelism.tensor_parallel_count": 4})
    spread = Plant.load(
        "h200-qwen3-30b-a3b",
        {"parallelism.tensor_parallel_count": 4, "parallelism.expert_parallel_count": 4},
    )
    prefill = IterationWork(((8192, 0),))
    costs = [plant.iteration(prefill, 1500) for plant in (one, four, spread)]
    assert costs[1].latency_seconds < costs[0].latency_seconds
    assert costs[0].shares.communication == 0 < costs[1].shares.communication
    assert costs[2].latency_seconds != costs[1].latency_seconds
    assert four.kv_blocks_count > 4 * one.kv_blocks_count


@pytest.mark.parametrize(
    ("gpu", "model", "dtype", "ranks"),
    [
        ("a100-sxm", "mixtral-8x7b", "bf16", 4),
        ("b200", "qwen3-235b-a22b", "fp8_block", 4),
        ("l40s", "gpt-oss-20b", "mxfp4", 1),
        ("h200-sxm", "deepseek-v3", "fp8_block", 8),
        ("h100-sxm", "gpt-oss-120b", "mxfp4", 2),
        ("h100-sxm", "llama-3.1-8b", "bf16", 1),
    ],
)
def test_every_gpu_serves_some_model(tmp_path, gpu, model, dtype, ranks):
    shipped = load_plant_parameters("h200-qwen3-30b-a3b")
    assert gpu in gpu_names()
    text = (
        f'gpu = "{gpu}"\n[model]\nname = "{model}"\nweight_dtype = "{dtype}"\nkv_dtype = "bf16"\n'
        f"[parallelism]\ntensor_parallel_count = {ranks}\nexpert_parallel_count = 1\n"
    )
    for table in ("behavior", "engine"):
        values = getattr(shipped, table)
        lines = [f"{name} = {getattr(values, name)!r}" for name in values.__slots__]
        text += f"[{table}]\n" + "\n".join(lines) + "\n"
    path = tmp_path / "plant.toml"
    path.write_text(text)
    plant = Plant.load(str(path))
    cost = plant.iteration(IterationWork(((512, 100),), 16, 16 * 500), plant.maximum_clock_mhz)
    assert 1e-3 < cost.latency_seconds < 0.2
    limit = plant.parameters.gpu.power.limit_watts
    assert plant.idle_power_watts(plant.maximum_clock_mhz) < cost.power_watts <= limit
    assert plant.kv_blocks_count > 1000


def test_shipped_plants_load():
    for name in plant_names():
        assert BEHAVIORS[name].kv_blocks_count > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"gpu.power.limit_wats": 1}, "limit_wats"),
        ({"gpu.powr.limit_watts": 1}, "gpu.powr"),
        ({"gpu.power.limit_watts": "much"}, "limit_watts is 'much'"),
        ({"gpu.power.limit_watts": float("nan")}, "finite"),
        ({"model.weight_dtype": "int4"}, "int4"),
        ({"parallelism.tensor_parallel_count": 3}, "tensor_parallel_count is 3"),
        ({"parallelism.expert_parallel_count": 3}, "expert_parallel_count is 3"),
        ({"parallelism.tensor_parallel_count": 16}, "allowed: 1, 2, 4, 8"),
        ({"engine.kv_block_tokens": 1.5}, "whole number"),
    ],
)
def test_wrong_parameters_are_named(overrides, message):
    with pytest.raises(InvalidInputError, match=message):
        Plant.load("h200-qwen3-30b-a3b", overrides)


def test_an_unknown_plant_names_the_shipped_ones():
    with pytest.raises(NotFoundError, match="h200-qwen3-30b-a3b"):
        Plant.load("h300")


def test_every_plant_of_the_documentation_is_shipped():
    assert set(plant_names()) == {
        "h200-qwen3-30b-a3b",
        "h200-gpt-oss-120b",
        "h200-deepseek-v3-ep8",
        "h100-qwen3-30b-a3b",
        "h100-mixtral-8x7b-tp2",
        "h100-qwen3-235b-a22b-ep8",
        "a100-mixtral-8x7b-tp4",
        "b200-qwen3-235b-a22b-ep4",
        "h100-llama-3.1-8b",
    }


@pytest.mark.parametrize("name", plant_names())
def test_every_plant_serves_hundreds_of_requests(name):
    plant = Plant.load(name)
    assert plant.kv_blocks_count * plant.parameters.engine.kv_block_tokens > 100_000
    cost = plant.iteration(decode(64), plant.maximum_clock_mhz)
    assert 0.01 < cost.latency_seconds < 0.06
    assert plant.idle_power_watts(plant.maximum_clock_mhz) < cost.power_watts


@pytest.mark.parametrize(
    ("tensor", "expert", "gpus"), [(1, 1, 1), (4, 1, 4), (4, 4, 4), (2, 8, 8), (1, 8, 8)]
)
def test_an_engine_has_as_many_gpus_as_the_wider_of_its_two_splits(tensor, expert, gpus):
    plant = plant_for("h200-sxm", "qwen3-30b-a3b", "bf16", "", tensor, expert)
    assert plant.gpus_count == gpus
    assert plant.iteration(decode(64), 1500).power_watts <= 700


def test_replicated_attention_pays_for_all_to_all_and_keeps_more_kv():
    shared = plant_for("h200-sxm", "qwen3-235b-a22b", "bf16", "", 8, 8)
    replicated = plant_for("h200-sxm", "qwen3-235b-a22b", "bf16", "", 2, 8)
    work = decode(256)
    costs = [plant.iteration(work, 1980) for plant in (shared, replicated)]
    assert costs[0].shares.communication > 0 < costs[1].shares.communication
    assert costs[0].active_experts == costs[1].active_experts
    assert replicated.kv_blocks_count != shared.kv_blocks_count


def test_skewed_routing_slows_spread_experts_by_the_fullest_rank():
    even, skewed = (
        Plant.load("h200-deepseek-v3-ep8", {"behavior.routing_skew_exponent": s})
        for s in (0.0, 0.8)
    )
    prefill = IterationWork(((8192, 0),))
    slow, fast = skewed.iteration(prefill, 1980), even.iteration(prefill, 1980)
    assert slow.latency_seconds > 1.02 * fast.latency_seconds


@pytest.mark.parametrize("gpu", ["a100-sxm", "h100-sxm", "h200-sxm", "b200", "l40s"])
def test_any_gpu_runs_models_without_a_file(gpu):
    for model, dtype in (("olmoe-1b-7b", "bf16"), ("qwen3-30b-a3b", "bf16")):
        plant = plant_for(gpu, model, dtype)
        cost = plant.iteration(decode(8), plant.maximum_clock_mhz)
        assert 1e-3 < cost.latency_seconds < 0.1


def test_an_unknown_gpu_names_the_known_ones():
    with pytest.raises(NotFoundError, match="h200-sxm"):
        plant_for("h300", "qwen3-30b-a3b")


def test_a_format_without_figures_is_refused():
    with pytest.raises(InvalidInputError, match="fp8_block"):
        plant_for("a100-sxm", "qwen3-30b-a3b", "fp8_block")


def test_one_seed_draws_one_plant_and_others_differ():
    first, again, other = (draw_plant("h200-qwen3-30b-a3b", seed) for seed in (7, 7, 8))
    assert first.parameters == again.parameters
    assert first.parameters != other.parameters
    assert first.iteration(decode(8), 1200) == again.iteration(decode(8), 1200)
    assert first.iteration(decode(8), 1200) != other.iteration(decode(8), 1200)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_drawn_figures_lie_in_their_documented_ranges(seed):
    drawn = draw_plant("h100-llama-3.1-8b", seed).parameters
    base = load_plant_parameters("h100-llama-3.1-8b")
    values = {
        "routing_skew_exponent": drawn.behavior.routing_skew_exponent,
        "fixed_clock_sensitivity_ratio": drawn.behavior.fixed_clock_sensitivity_ratio,
        "latency_noise_ratio": drawn.behavior.latency_noise_ratio,
        "chip_power_spread_ratio": drawn.behavior.chip_power_spread_ratio,
        "voltage_knee_ratio": drawn.gpu.power.voltage_knee_ratio,
        "voltage_floor_ratio": drawn.gpu.power.voltage_floor_ratio,
        "memory_knee_ratio": drawn.gpu.memory.knee_ratio,
        "tensor_watts_factor": drawn.gpu.power.tensor_watts / base.gpu.power.tensor_watts,
    }
    assert set(values) == set(RANGES)
    for name, value in values.items():
        low, high = RANGES[name]
        assert low <= value <= high
