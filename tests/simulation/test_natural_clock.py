"""The analysis against made-up samples whose physics is known; no GPU."""

from __future__ import annotations

import numpy as np
import pytest

from throttle.errors import InvalidInputError
from throttle.simulation.natural_clock import (
    KernelSamples,
    fit_natural_clocks,
    probes_agree,
)
from throttle.simulation.power import bandwidth_ratio

MAXIMUM = 1980.0
#: Name, kind, fixed us, work us and compute share of the work: from launch-bound to compute-bound.
KERNELS = (
    ("small_kernels", "fixed", 50.0, 0.0, 0.0),
    ("more_small_kernels", "fixed", 20.0, 0.0, 0.0),
    ("decode_attention", "attention", 8.0, 200.0, 0.02),
    ("copy", "memory", 4.0, 300.0, 0.0),
    ("moe/8", "moe", 25.0, 280.0, 0.05),
    ("moe/128", "moe", 25.0, 320.0, 0.25),
    ("moe/4096", "moe", 25.0, 1500.0, 0.8),
    ("gemm/4096", "gemm", 4.0, 900.0, 0.97),
)
#: Parts of the clock range that were seen, with their share of the samples.
FULL = ((345.0, 1980.0, 1.0),)
ENDS_OF_A_RAMP = ((345.0, 500.0, 0.3), (1400.0, 1980.0, 0.7))
UPPER = ((800.0, 1980.0, 1.0),)
CAPPED_ONLY = ((1500.0, 1980.0, 1.0),)


def duration(ratios, fixed, work, share, *, sensitivity, knee, exponent):
    slow = np.array([1.0 / bandwidth_ratio(x, knee, 4.0) for x in ratios.tolist()])
    blend = ((1 - share) * slow) ** exponent + (share / ratios) ** exponent
    unit = (1 - share) ** exponent + share**exponent
    return fixed * (1 - sensitivity + sensitivity / ratios) + work * (blend / unit) ** (
        1 / exponent
    )


def samples(coverage, sensitivity, knee, *, exponent=1.0, noise=0.02, count=1500, seed=1):
    generator = np.random.default_rng(seed)
    made = []
    for name, kind, fixed, work, share in KERNELS:
        clocks = np.concatenate(
            [generator.uniform(low, high, int(count * part)) for low, high, part in coverage]
        )
        seconds = duration(
            clocks / MAXIMUM,
            fixed,
            work,
            share,
            sensitivity=sensitivity,
            knee=knee,
            exponent=exponent,
        )
        seconds *= 1e-6 * generator.lognormal(0.0, noise, len(clocks))
        made.append(KernelSamples(name, kind, clocks, seconds))
    return made


def true_compute_share(name, exponent=1.0):
    _, _, fixed, work, share = next(each for each in KERNELS if each[0] == name)
    return share**exponent / (share**exponent + (1 - share) ** exponent) * work / (fixed + work)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("sensitivity", "knee"), [(0.3, 1.8), (0.5, 2.2), (0.85, 2.8)])
@pytest.mark.parametrize("coverage", [FULL, ENDS_OF_A_RAMP, UPPER])
def test_known_physics_is_recovered_under_two_percent_noise(coverage, sensitivity, knee, seed):
    fit = fit_natural_clocks(samples(coverage, sensitivity, knee, seed=seed), MAXIMUM)
    found = fit.fixed_clock_sensitivity
    assert found.identified
    assert found.value == pytest.approx(sensitivity, abs=0.03)
    assert fit.memory_knee.identified
    assert fit.memory_knee.value == pytest.approx(knee, rel=0.08)
    for each in fit.kernels:
        truth = true_compute_share(each.name)
        share = each.compute_share
        assert share.lowest - 0.06 <= truth <= share.highest + 0.06
        # Where nearly all fixed time follows the clock it looks like compute: the range says so.
        if coverage is FULL and sensitivity <= 0.5:
            assert share.identified
            assert share.value == pytest.approx(truth, abs=0.06)
        elif share.identified:
            assert share.value == pytest.approx(truth, abs=0.2)
        assert each.residual_ratio < 0.02


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.4])
def test_compute_shares_are_recovered_with_the_blend_of_the_kernel(exponent):
    made = samples(FULL, 0.5, 2.2, exponent=exponent)
    fit = fit_natural_clocks(made, MAXIMUM, roofline_exponent=exponent)
    for each in fit.kernels:
        truth = true_compute_share(each.name, exponent)
        assert each.compute_share.value == pytest.approx(truth, abs=0.06)
        assert each.fixed_share + each.memory_share + each.compute_share.value == pytest.approx(1.0)


def test_durations_at_the_highest_clock_are_recovered():
    fit = fit_natural_clocks(samples(ENDS_OF_A_RAMP, 0.5, 2.2), MAXIMUM)
    for each, (_, _, fixed, work, _) in zip(fit.kernels, KERNELS, strict=True):
        assert each.seconds == pytest.approx((fixed + work) * 1e-6, rel=0.02)


def test_clocks_above_the_knee_do_not_pretend_to_know_it():
    fit = fit_natural_clocks(samples(CAPPED_ONLY, 0.85, 2.8), MAXIMUM)
    knee = fit.memory_knee
    assert not knee.identified
    assert knee.lowest <= 2.8 <= knee.highest


def test_without_launch_bound_kernels_the_sensitivity_is_assumed_and_said_so():
    working = [each for each in samples(FULL, 0.5, 2.2) if each.kind != "fixed"]
    fit = fit_natural_clocks(working, MAXIMUM, assumed_sensitivity=0.4)
    assert fit.fixed_clock_sensitivity.value == 0.4
    assert not fit.fixed_clock_sensitivity.identified


def test_without_noise_the_answer_is_sharp():
    fit = fit_natural_clocks(samples(FULL, 0.62, 2.05, noise=1e-5), MAXIMUM)
    assert fit.fixed_clock_sensitivity.value == pytest.approx(0.62, abs=0.005)
    assert fit.memory_knee.value == pytest.approx(2.05, abs=0.02)


def test_stray_samples_do_not_move_the_fit():
    made = samples(FULL, 0.5, 2.2)
    generator = np.random.default_rng(9)
    for each in made:
        stray = generator.random(len(each.seconds)) < 0.05
        each.seconds[stray] *= generator.uniform(2.0, 20.0, stray.sum())
    fit = fit_natural_clocks(made, MAXIMUM)
    assert fit.fixed_clock_sensitivity.value == pytest.approx(0.5, abs=0.04)
    assert fit.memory_knee.value == pytest.approx(2.2, rel=0.08)


def test_probes_that_disagree_by_more_than_two_percent_are_told():
    before, after = np.array([1000.0, 1000.0, 345.0]), np.array([1019.0, 1021.0, 1980.0])
    assert probes_agree(before, after).tolist() == [True, False, False]


def test_too_little_is_refused_by_name():
    with pytest.raises(InvalidInputError, match=r"kernels is 0.*at least one"):
        fit_natural_clocks([], MAXIMUM)
    one_clock = KernelSamples("moe/8", "moe", np.full(50, 1980.0), np.full(50, 1e-4))
    with pytest.raises(InvalidInputError, match=r"moe/8: distinct clocks is 1.*4 or more"):
        fit_natural_clocks([one_clock], MAXIMUM)
    negative = KernelSamples("moe/8", "moe", np.linspace(345, 1980, 9), np.linspace(-1, 1, 9))
    with pytest.raises(InvalidInputError, match=r"moe/8: samples is -1"):
        fit_natural_clocks([negative], MAXIMUM)
