"""Which bundle an engine gets: read from the bundles that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from predictors.errors import BundleError
from tests.control.scenes import make_profile
from throttle.control.settings import ControlSettings
from throttle.daemon.brains import ControllerFactory, GpuModel

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


def test_every_shipped_bundle_loads(factory):
    found = dict(factory.warm_up())
    assert len(found) >= 10
    assert not any(found.values()), found
