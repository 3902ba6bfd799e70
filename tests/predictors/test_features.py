"""Features and the roofline base."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictors.active_experts import expected_active_experts
from predictors.analytic import COEFFICIENTS, GPUS, FittedBase, gpu_by_name
from predictors.architecture import catalogue, from_catalogue
from predictors.errors import PredictorsError
from predictors.features import (
    CLOCK_FEATURE,
    FEATURES,
    FeatureSpace,
    Parallelism,
    fullest_replica,
    rows_at,
)
from predictors.prediction import BatchShape

SHAPES = np.array(
    [
        [0.0, 0.0, 0.0, 8.0, 8000.0, 8.0, 0.0],
        [1.0, 512.0, 1024.0, 8.0, 8000.0, 8.0, 655_360.0],
        [2.0, 900.0, 0.0, 0.0, 0.0, 0.0, 202_500.0],
        [0.3, 70.5, 11.0, 7.5, 9000.25, 7.5, 3260.0],
    ]
)


def space(model="qwen3-30b-a3b", tensor=1, expert=1, gpu="h200-sxm"):
    return FeatureSpace(from_catalogue(model), Parallelism(tensor, expert), GPUS[gpu])


def column(features, name):
    return features[list(FEATURES).index(name)]


@given(
    st.floats(0.01, 1e6),
    st.integers(1, 512).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))),
)
def test_active_experts_stay_between_those_of_one_token_and_all(tokens, experts):
    count, per_token = experts
    active = expected_active_experts(np.array([tokens]), count, per_token)[0]
    assert 0.0 < active <= count * (1 + 1e-12)
    if tokens >= 1.0:
        assert active >= per_token * (1 - 1e-9)


def test_active_experts_match_the_published_table():
    active = expected_active_experts(np.array([1.0, 8.0, 64.0]), 128, 8)
    assert active == pytest.approx([8.0, 52.0, 126.0], abs=0.5)


@pytest.mark.parametrize("name", catalogue())
@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (8, 1), (8, 8), (1, 8)])
def test_features_are_finite_for_every_model_and_spread(name, tensor, expert):
    features, terms = space(name, tensor, expert).build(SHAPES)
    assert features.shape == (len(FEATURES), len(SHAPES))
    assert np.isfinite(features).all()
    assert (terms >= 0.0).all()


def test_prompt_attention_counts_query_key_pairs():
    shape = BatchShape(2.0, 200.0, 1000.0)
    features, _ = space().build(np.array([shape.row()]))
    # two prompts of 100 new tokens, each over 500 old ones and on average half of the new
    assert column(features, "prefill_attention_pairs")[0] == 2 * (100 * 500 + 100 * 50)


def test_reported_pairs_replace_the_estimate():
    # one prompt of 150 new tokens over 1000 old ones, and one that begins with 50
    pairs = 150 * (1000 + 75) + 50 * 25
    shape = BatchShape(2.0, 200.0, 1000.0, prefill_attention_pairs=pairs)
    features, _ = space().build(np.array([shape.row()]))
    assert column(features, "prefill_attention_pairs")[0] == pairs


@given(
    st.lists(st.integers(1, 4096), min_size=1, max_size=2),
    st.integers(4096, 100_000),
    st.floats(0.0, 500.0),
)
def test_sums_tell_which_of_two_prompts_the_fullest_replica_computes(chunks, old, decoding):
    # the first goes on over old KV, as chunked prefill leaves at most one; the other begins
    contexts = [old, 0][: len(chunks)]
    pairs = sum(new * (kv + new / 2) for new, kv in zip(chunks, contexts, strict=True))
    whole = BatchShape(len(chunks), sum(chunks), old, decoding, 900.0, decoding, pairs)
    requests, tokens, kv, decodes, _, _, fullest = fullest_replica(np.array([whole.row()]).T, 8.0)[
        :, 0
    ]
    index = int(np.argmax(chunks))
    assert requests == 1.0
    assert tokens == pytest.approx(chunks[index], rel=1e-6, abs=1e-3)
    assert decodes == pytest.approx(decoding / 8)
    if len(chunks) == 1 or chunks[0] != chunks[1]:
        new = chunks[index]
        assert kv == contexts[index]
        assert fullest == pytest.approx(new * (kv + new / 2), rel=1e-5, abs=1.0)


def test_many_prompts_spread_evenly_over_the_replicas():
    whole = BatchShape(32.0, 3200.0, 640.0, 8.0, 800.0, 8.0)
    share = fullest_replica(np.array([whole.row()]).T, 8.0)[:, 0]
    assert share == pytest.approx(np.array(whole.row()) / 8.0)


def test_fullest_rank_holds_more_than_an_even_share():
    features, _ = space("deepseek-v3", 8, 8).build(SHAPES)
    even = column(features, "active_experts_count") / 8
    fullest = column(features, "fullest_rank_experts_count")
    assert fullest[0] > 1.2 * even[0]
    assert (fullest >= even).all()
    assert (fullest <= 256 / 8).all()


def test_a_window_bounds_the_kv_that_is_read():
    model = from_catalogue("gpt-oss-20b")
    long = np.array([[0.0, 0.0, 0.0, 1.0, 100_000.0, 1.0, 0.0]])
    features, _ = space("gpt-oss-20b").build(long)
    full_layers = 12 * model.kv_elements_per_token_and_layer * model.kv_bytes * 100_001
    near_layers = 12 * model.kv_elements_per_token_and_layer * model.kv_bytes * 129
    assert column(features, "kv_bytes")[0] == pytest.approx(full_layers + near_layers, rel=1e-6)


def test_only_the_first_feature_depends_on_the_clock():
    assert list(FEATURES)[CLOCK_FEATURE] == "clock_ratio"
    slow, _ = rows_at(space(), SHAPES, np.full(4, 0.2))
    fast, _ = rows_at(space(), SHAPES, np.full(4, 1.0))
    assert (np.delete(slow, CLOCK_FEATURE, axis=1) == np.delete(fast, CLOCK_FEATURE, axis=1)).all()


@given(st.lists(st.floats(0.0, 10.0), min_size=len(COEFFICIENTS), max_size=len(COEFFICIENTS)))
def test_base_is_positive_and_never_rises_with_clock(values):
    base = FittedBase(dict(zip(COEFFICIENTS, values, strict=True)) | {"flat_fixed": 0.01})
    _, terms = space().build(SHAPES)
    seconds = base.seconds(base.parts(terms), np.linspace(0.1, 1.0, 40))
    assert (seconds > 0.0).all()
    assert (np.diff(seconds, axis=1) <= 1e-12).all()


def test_base_refuses_negative_coefficients():
    with pytest.raises(PredictorsError, match="slope_fixed is -1"):
        FittedBase(dict.fromkeys(COEFFICIENTS, 0.0) | {"slope_fixed": -1.0})


@pytest.mark.parametrize(
    "row",
    [[0.0] * 7, [0.0, 0.0, 5.0, 0.0, 5.0, 0.0, 0.0], [np.nan] * 7, [0, 0, 0, 1, np.inf, 1, 0]],
)
def test_a_row_without_work_is_refused(row):
    with pytest.raises(PredictorsError, match="allowed: finite rows with work"):
        space().build(np.array([row], dtype=float))


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA L40S", "l40s"),
        ("b200", "b200"),
    ],
)
def test_driver_names_of_gpus_are_understood(name, ours):
    assert gpu_by_name(name).name == ours


@pytest.mark.parametrize("name", ["NVIDIA A100-PCIE-40GB", "NVIDIA H100 PCIe", "RTX 5090", ""])
def test_other_gpus_are_refused(name):
    with pytest.raises(PredictorsError, match="allowed: a100-sxm"):
        gpu_by_name(name)
