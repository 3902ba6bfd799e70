"""Bundles on disk: what is refused, and how one is found."""

from __future__ import annotations

import json
import shutil

import pytest

from predictors.bundle import find_bundle, load_bundle
from predictors.errors import BundleError, PredictorsError
from predictors.training import save


@pytest.fixture
def directory(bundle, tmp_path):
    return save(bundle, tmp_path)


def change(directory, **values):
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_written_bundle_loads_as_it_was(bundle, directory):
    assert directory.name == "h200-sxm__qwen3-30b-a3b__tp1ep1"
    assert {path.name for path in directory.iterdir()} == {
        "manifest.json",
        "latency.ubj",
        "power.ubj",
        "MODEL_CARD.md",
    }
    assert load_bundle(directory) == bundle


def test_writing_twice_gives_the_same_bytes(bundle, directory, tmp_path):
    again = save(bundle, tmp_path / "again")
    for path in directory.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["latency.ubj", "power.ubj", "MODEL_CARD.md"])
def test_a_changed_file_is_refused_by_its_hash(directory, name):
    path = directory / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match=f"sha256 of {name} is .*; allowed: "):
        load_bundle(directory)


@pytest.mark.parametrize("name", ["manifest.json", "latency.ubj"])
def test_a_missing_file_is_refused(directory, name):
    (directory / name).unlink()
    with pytest.raises(BundleError, match=name):
        load_bundle(directory)


def test_another_format_version_is_refused(directory):
    change(directory, format_version=99)
    with pytest.raises(BundleError, match="format_version is 99; allowed: 3"):
        load_bundle(directory)


def test_another_order_of_features_is_refused(directory):
    features = json.loads((directory / "manifest.json").read_text())["features"]
    change(directory, features=features[::-1])
    with pytest.raises(BundleError, match=r"features is .*; allowed: "):
        load_bundle(directory)


def test_other_roofline_constants_are_refused(directory):
    roofline = json.loads((directory / "manifest.json").read_text())["roofline"]
    change(directory, roofline=roofline | {"compute_efficiency": 0.5})
    with pytest.raises(BundleError, match=r"roofline is .*compute_efficiency"):
        load_bundle(directory)


@pytest.mark.parametrize(
    "values",
    [
        {"gpu": "abacus"},
        {"calibration": {}},
        {"clocks_mhz": []},
        {"clocks_mhz": [900, 600]},
        {"base_coefficients": {}},
        {"architecture": {"name": "half"}},
        {"parallelism": {"tensor_parallel_count": 0, "expert_parallel_count": 1}},
    ],
)
def test_a_damaged_manifest_is_refused_in_one_line(directory, values):
    change(directory, **values)
    with pytest.raises(BundleError) as raised:
        load_bundle(directory)
    assert "\n" not in str(raised.value)


def test_the_bundle_of_an_engine_is_found(directory):
    shutil.copytree(directory, directory.parent / "other__bundle__tp8ep8")
    found = find_bundle(directory.parent, "NVIDIA H200", "Qwen/Qwen3-30B-A3B")
    assert found == directory


def test_a_missing_bundle_is_named_beside_those_present(directory):
    with pytest.raises(BundleError, match=r"h200-sxm__qwen3-30b-a3b__tp4ep1 .*there: h200"):
        find_bundle(directory.parent, "h200-sxm", "qwen3-30b-a3b", 4)
    with pytest.raises(PredictorsError, match="gpu is 'abacus'"):
        find_bundle(directory.parent, "abacus", "qwen3-30b-a3b")


def test_the_card_says_that_figures_are_simulated(directory):
    assert "**Simulated.**" in (directory / "MODEL_CARD.md").read_text()
