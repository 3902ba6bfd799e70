"""Which bundle an engine gets: read from the bundles that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from predictors.errors import BundleError
from tests.control.scenes import Engine, make_profile
from throttle.control.settings import ControlSettings
from throttle.daemon.brains import PREDICTORS_LIMIT, ControllerFactory, GpuModel

MODELS = Path(__file__).resolve().parents[2] / "models"
H200 = GpuModel("h200-sxm", tuple(range(345, 1981, 15)))


@pytest.fixture(scope="module")
def factory():
    return ControllerFactory(MODELS, ControlSettings())


def test_an_engine_gets_the_bundle_of_its_gpu_and_model(factory):
    found = factory.build(make_profile(model_name="qwen3-30b-a3b"), H200)
    assert found.bundle == "h200-sxm__qwen3-30b-a3b__tp1ep1"
    assert found.candidate_clocks_mhz == H200.clocks_mhz


def test_a_model_without_a_bundle_of_its_own_gets_the_generic_one_for_its_clocks(factory):
    found = factory.build(make_profile(model_name="olmoe-1b-7b"), H200)
    assert found.bundle == "generic-moe"
    assert found.candidate_clocks_mhz == H200.clocks_mhz


def test_a_question_about_gpus_elsewhere_needs_a_bundle_of_the_model(factory):
    with pytest.raises(BundleError, match="0 bundles"):
        factory.build(make_profile(model_name="olmoe-1b-7b"), None)


def test_engines_of_ever_new_kinds_do_not_pile_up_predictors(factory):
    profile, clocks = make_profile(model_name="olmoe-1b-7b"), H200.clocks_mhz
    lasting = factory.build(profile, GpuModel("h200-sxm", clocks)).brain
    for fewer in range(1, PREDICTORS_LIMIT + 10):
        factory.build(profile, GpuModel("h200-sxm", clocks[fewer:]))
        again = factory.build(profile, GpuModel("h200-sxm", clocks)).brain
        assert again._forecaster._predictor is lasting._forecaster._predictor  # used, so kept
    assert len(factory._predictors) == PREDICTORS_LIMIT


def _advised_gpus_count(brain):
    """After six seconds of eight answers that each take a token in 10 ms."""
    engine = Engine()
    for number in range(1, 9):
        engine.arrive(number)
        engine.running[number] = (100, 1)
    for _ in range(600):
        state = engine.state()
        brain.observe(state, 0)
        decision = brain.decide(state)
        engine.running = {n: (c, g + 1) for n, (c, g) in engine.running.items()}
    return decision.advice.least_gpus_count


def test_the_size_advised_is_the_least_on_which_the_model_fits(factory):
    small = make_profile(model_name="qwen3-30b-a3b", wants_advice=True, kv_blocks_count=40_000)
    assert _advised_gpus_count(factory.build(small, H200).brain) == 1
    # 93 GB of weights and 21 GB of KV on two GPUs: one of them would not hold the weights
    large = make_profile(
        model_name="mixtral-8x7b",
        tensor_parallel_count=2,
        gpu_uuids=("GPU-0", "GPU-1"),
        wants_advice=True,
    )
    assert _advised_gpus_count(factory.build(large, H200).brain) == 2


def test_every_shipped_bundle_loads(factory):
    found = dict(factory.warm_up())
    assert len(found) >= 10
    assert not any(found.values()), found
