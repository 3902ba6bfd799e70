"""What kernels timed at the clocks that a GPU takes by itself say about its physics.

One kernel at clock ratio x takes, by the plant's own equations (docs/plant.md),

    t(x) = F g(x) + W [((1 - c) / b(x))^p + (c / x)^p]^(1/p),    g(x) = (1 - G) + G / x,

with b(x) the bandwidth ratio of `throttle.simulation.power`. G, the share of fixed time that
follows the clock, and rb, the knee of b, belong to the GPU; fixed time F, work W and the compute
share c belong to the kernel. G comes from launch-bound kernels, which have no work; rb from all
others together, each with its own F, W and c. A clock range that says nothing about a figure gives
a wide interval, not a wrong value: `Estimate.identified` tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from throttle.errors import InvalidInputError
from throttle.simulation.power import bandwidth_ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

#: Kind of a kernel that is all launch cost.
FIXED = "fixed"
_BIN_RATIO = 0.01  # clocks within 1 % of the maximum count as one
_LEAST_BINS = 4
_SENSITIVITIES = np.linspace(0.0, 1.0, 201)
_KNEES = np.linspace(1.0, 4.0, 121)
_SHARES = np.linspace(0.0, 1.0, 101)
_NARROW_SHARE = 0.2  # a compute share is identified when its range is no wider
_TWO_SIGMA = 4.0  # rise of the scaled sum of squares at two standard errors


@dataclass(frozen=True, slots=True)
class KernelSamples:
    """One kernel's durations with the clock that each really had.

    Attributes:
        name: Its name.
        kind: `FIXED` where it is launch-bound; any other word where it works.
        clocks_mhz: Clocks, shape (n,).
        seconds: Durations, shape (n,).
    """

    name: str
    kind: str
    clocks_mhz: Array
    seconds: Array


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the range within two standard errors.

    Attributes:
        value: The best value.
        lowest: Lower end of its range.
        highest: Upper end.
        identified: Whether the data bound it on both sides (a compute share: within 0.2).
    """

    value: float
    lowest: float
    highest: float
    identified: bool


@dataclass(frozen=True, slots=True)
class KernelFit:
    """One kernel's own figures; the shares are of its time at the maximum clock and sum to 1.

    Attributes:
        name: Its name.
        kind: Its kind.
        samples_count: Durations that went in.
        lowest_clock_mhz: Lowest clock among them.
        highest_clock_mhz: Highest clock among them.
        seconds: Duration at the maximum clock.
        fixed_share: Fixed time.
        memory_share: Memory time.
        compute_share: Compute time.
        residual_ratio: Root mean square of the relative residuals.
    """

    name: str
    kind: str
    samples_count: int
    lowest_clock_mhz: float
    highest_clock_mhz: float
    seconds: float
    fixed_share: float
    memory_share: float
    compute_share: Estimate
    residual_ratio: float


@dataclass(frozen=True, slots=True)
class NaturalClockFit:
    """What all kernels together say.

    Attributes:
        fixed_clock_sensitivity: G; not identified, and the value given, without launch-bound
            kernels.
        memory_knee: rb.
        kernels: Each kernel's own figures.
    """

    fixed_clock_sensitivity: Estimate
    memory_knee: Estimate
    kernels: tuple[KernelFit, ...]


@dataclass(frozen=True, slots=True)
class _Binned:
    """Medians of the durations at nearly equal clocks; all arrays of shape (n,)."""

    samples: KernelSamples
    ratios: Array
    seconds: Array
    weights: Array  # samples behind each median


def fit_natural_clocks(
    kernels: Sequence[KernelSamples],
    maximum_clock_mhz: float,
    *,
    knee_sharpness: float = 4.0,
    roofline_exponent: float = 1.0,
    assumed_sensitivity: float = 0.5,
) -> NaturalClockFit:
    """Fit G, rb and every kernel's shares.

    Args:
        kernels: Samples of each kernel, probes that disagree already left out.
        maximum_clock_mhz: The GPU's highest clock.
        knee_sharpness: Sharpness m of the memory knee; not fitted.
        roofline_exponent: Exponent p with which memory and compute time blend; not fitted.
        assumed_sensitivity: G where no launch-bound kernel was measured.

    Raises:
        InvalidInputError: There are no kernels, or one has too few clocks or values that are not
            above 0.
    """
    if not kernels:
        raise InvalidInputError("kernels", 0, "samples of at least one kernel")
    binned = [_binned(each, maximum_clock_mhz) for each in kernels]
    idle = [each for each in binned if each.samples.kind == FIXED]
    working = [each for each in binned if each.samples.kind != FIXED]
    sensitivity = _fit_sensitivity(idle, assumed_sensitivity)
    model = _Model(sensitivity.value, knee_sharpness, roofline_exponent)
    knee = _fit_knee(working, model)
    fits = tuple(_fit_kernel(each, model, knee.value) for each in binned)
    return NaturalClockFit(sensitivity, knee, fits)


def probes_agree(
    before_mhz: Array, after_mhz: Array, tolerance_ratio: float = 0.02
) -> NDArray[np.bool_]:
    """Where two probes around a kernel saw one clock, shape (n,)."""
    return np.abs(before_mhz - after_mhz) <= tolerance_ratio * np.maximum(before_mhz, after_mhz)


def _binned(samples: KernelSamples, maximum_mhz: float) -> _Binned:
    clocks, seconds = samples.clocks_mhz, samples.seconds
    if not (np.isfinite(clocks).all() and np.isfinite(seconds).all() and len(clocks)):
        raise InvalidInputError(f"{samples.name}: samples", len(clocks), "finite values")
    if clocks.min() <= 0 or seconds.min() <= 0:
        raise InvalidInputError(
            f"{samples.name}: samples",
            float(min(clocks.min(), seconds.min())),
            "clocks and seconds > 0",
        )
    ratios = clocks / maximum_mhz
    bins = np.round(ratios / _BIN_RATIO).astype(np.int64)
    kept, inverse, counts = np.unique(bins, return_inverse=True, return_counts=True)
    if len(kept) < _LEAST_BINS:
        raise InvalidInputError(
            f"{samples.name}: distinct clocks", len(kept), f"{_LEAST_BINS} or more, 1 % apart"
        )
    centers = np.array([np.median(ratios[inverse == index]) for index in range(len(kept))])
    # Within a bin duration follows the clock too: medians of both keep pairs together.
    medians = np.array([np.median(seconds[inverse == index]) for index in range(len(kept))])
    return _Binned(samples, centers, medians, counts.astype(np.float64))


class _Model:
    """Columns of the equation for given G, m and p."""

    def __init__(self, sensitivity: float, sharpness: float, exponent: float) -> None:
        self.sensitivity = sensitivity
        self.sharpness = sharpness
        self.exponent = exponent

    def fixed(self, ratios: Array) -> Array:
        """g(x), shape (n,)."""
        return (1.0 - self.sensitivity) + self.sensitivity / ratios

    def work(self, ratios: Array, knee: float) -> Array:
        """The blend for every compute share of the grid, over its own value at x = 1.

        Returns:
            Shape (shares, n).
        """
        slow = np.array([1.0 / bandwidth_ratio(x, knee, self.sharpness) for x in ratios.tolist()])
        p, shares = self.exponent, _SHARES[:, None]
        blend = ((1.0 - shares) * slow) ** p + (shares / ratios) ** p
        unit = (1.0 - shares) ** p + shares**p
        return np.asarray((blend / unit) ** (1.0 / p))


@dataclass(frozen=True, slots=True)
class _Solutions:
    """Best non-negative fixed time and work for each compute share, and the squares left.

    All arrays of shape (shares,).
    """

    fixed: Array
    work: Array
    squares: Array


def _solve(binned: _Binned, model: _Model, knee: float) -> _Solutions:
    """Weighted least squares of relative residuals, non-negative, for every compute share.

    With two columns the best non-negative pair is the free solution where it is non-negative, and
    else the better of the two single columns.
    """
    scale = np.sqrt(binned.weights) / binned.seconds
    target = np.sqrt(binned.weights)
    fixed = model.fixed(binned.ratios) * scale  # (n,)
    work = model.work(binned.ratios, knee) * scale  # (shares, n)
    ff, fy = float(fixed @ fixed), float(fixed @ target)
    ww, wy, fw = (work * work).sum(axis=1), work @ target, work @ fixed
    total = float(target @ target)
    determinant = ff * ww - fw * fw
    safe = np.where(determinant > 1e-12 * ff * ww, determinant, np.inf)
    a, b = (fy * ww - wy * fw) / safe, (ff * wy - fy * fw) / safe
    nothing = np.zeros_like(a)
    free = np.where((a >= 0) & (b >= 0) & (a + b > 0), total - a * fy - b * wy, np.inf)
    squares = np.array([free, total - wy * wy / ww, np.full_like(a, total - fy * fy / ff)])
    best = squares.argmin(axis=0)
    return _Solutions(
        fixed=np.choose(best, [a, nothing, nothing + fy / ff]),
        work=np.choose(best, [b, wy / ww, nothing]),
        squares=squares.min(axis=0),
    )


def _fit_sensitivity(idle: Sequence[_Binned], assumed: float) -> Estimate:
    """G over all launch-bound kernels, each with its own fixed time."""
    if not idle:
        return Estimate(assumed, 0.0, 1.0, identified=False)
    squares = np.zeros(len(_SENSITIVITIES))
    for each in idle:
        scale = np.sqrt(each.weights) / each.seconds
        shape = (1.0 - _SENSITIVITIES[:, None]) + _SENSITIVITIES[:, None] / each.ratios
        columns, target = shape * scale, np.sqrt(each.weights)
        overlap = columns @ target
        squares += float(target @ target) - overlap**2 / (columns**2).sum(axis=1)
    return _profile(_SENSITIVITIES, squares, _freedom(idle, 1))


def _fit_knee(working: Sequence[_Binned], model: _Model) -> Estimate:
    """The memory knee over all working kernels, each with its own fixed time, work and share."""
    lowest, highest = float(_KNEES[0]), float(_KNEES[-1])
    if not working:
        return Estimate(highest, lowest, highest, identified=False)
    squares = np.array(
        [
            sum(float(_solve(each, model, knee).squares.min()) for each in working)
            for knee in _KNEES.tolist()
        ]
    )
    return _profile(_KNEES, squares, _freedom(working, 3))


def _freedom(binned: Sequence[_Binned], parameters_per_kernel: int) -> int:
    points = sum(len(each.ratios) for each in binned)
    return max(points - parameters_per_kernel * len(binned) - 1, 1)


def _profile(grid: Array, squares: Array, freedom: int) -> Estimate:
    """The least squares on a grid, refined by a parabola, and the range of two sigma around it."""
    best = int(np.argmin(squares))
    variance = max(float(squares[best]) / freedom, 1e-12)
    inside = np.flatnonzero(squares <= squares[best] + _TWO_SIGMA * variance)
    lowest, highest = float(grid[inside[0]]), float(grid[inside[-1]])
    value = float(grid[best])
    if 0 < best < len(grid) - 1:
        left, middle, right = squares[best - 1], squares[best], squares[best + 1]
        curvature = left - 2.0 * middle + right
        if curvature > 0:
            value += 0.5 * float((left - right) / curvature) * float(grid[1] - grid[0])
    step = float(grid[1] - grid[0])
    bounded = bool(inside[0] > 0 and inside[-1] < len(grid) - 1)
    return Estimate(value, min(lowest, value) - step, max(highest, value) + step, bounded)


def _fit_kernel(binned: _Binned, model: _Model, knee: float) -> KernelFit:
    samples = binned.samples
    if samples.kind == FIXED:
        column, weights = model.fixed(binned.ratios) / binned.seconds, binned.weights
        fixed = float((column * weights).sum() / (column * column * weights).sum())
        work, predicted = 0.0, fixed * model.fixed(binned.ratios)
        compute = Estimate(0.0, 0.0, 0.0, identified=True)
    else:
        solutions = _solve(binned, model, knee)
        index = int(np.argmin(solutions.squares))
        fixed, work = float(solutions.fixed[index]), float(solutions.work[index])
        predicted = fixed * model.fixed(binned.ratios)
        predicted += work * model.work(binned.ratios, knee)[index]
        compute = _compute_share(solutions, index, model.exponent, _freedom([binned], 3))
    residuals = predicted / binned.seconds - 1.0
    return KernelFit(
        name=samples.name,
        kind=samples.kind,
        samples_count=len(samples.clocks_mhz),
        lowest_clock_mhz=float(samples.clocks_mhz.min()),
        highest_clock_mhz=float(samples.clocks_mhz.max()),
        seconds=fixed + work,
        fixed_share=fixed / (fixed + work),
        memory_share=work / (fixed + work) - compute.value,
        compute_share=compute,
        residual_ratio=float(np.sqrt(np.average(residuals**2, weights=binned.weights))),
    )


def _compute_share(solutions: _Solutions, best: int, exponent: float, freedom: int) -> Estimate:
    """Compute time over all time at the maximum clock, and its range within two sigma."""
    p, total = exponent, solutions.fixed + solutions.work
    of_work = _SHARES**p / (_SHARES**p + (1.0 - _SHARES) ** p)
    shares = of_work * solutions.work / total
    variance = max(float(solutions.squares[best]) / freedom, 1e-12)
    near = shares[solutions.squares <= solutions.squares[best] + _TWO_SIGMA * variance]
    lowest, highest = float(near.min()), float(near.max())
    return Estimate(float(shares[best]), lowest, highest, highest - lowest <= _NARROW_SHARE)
