"""One-sided bounds with a stated violation rate, by split-conformal calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictors.errors import PredictorsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Clock over maximum clock at which bands begin, after the first that begins at zero.
CLOCK_BAND_EDGES: tuple[float, ...] = (0.5, 0.75)

#: Groups of iterations with a bound of their own. Where several prompts of which some have old KV
#: are computed together, sums alone do not tell which prompt looks back how far, and not every
#: engine reports query-key pairs: such iterations are less sure, and would widen the bound of all.
PHASES: tuple[str, ...] = ("decode", "prefill", "several_prefills")

#: Old KV over new tokens from which several prompts count as unsure.
OLD_KV_RATIO = 0.25


def phases_of(shapes: NDArray[np.float64]) -> NDArray[np.intp]:
    """Index in `PHASES` of each of (K, 7) shapes, (K,)."""
    requests, tokens, old = shapes[:, 0], shapes[:, 1], shapes[:, 2]
    phases = (tokens > 0.0).astype(np.intp)
    phases += (requests > 1.5) & (old > OLD_KV_RATIO * tokens) & (tokens > 0.0)
    return phases


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far above its prediction a latency may be, by phase and clock band.

    Attributes:
        violation_ratio: Share of iterations allowed to take longer than the bound.
        clock_band_edges: Inner edges of the clock bands, as clock over maximum clock, rising.
        log_margins: Phase (of `PHASES`) -> one margin per band, added to the log of the latency.
        rows_counts: Phase -> calibration rows per band. A band with too few rows for the
            violation rate takes its phase's margin, and a phase with too few the largest error
            seen in it; neither is then below the margin of all rows.
    """

    violation_ratio: float
    clock_band_edges: tuple[float, ...]
    log_margins: dict[str, tuple[float, ...]]
    rows_counts: dict[str, tuple[int, ...]]

    def factors(self, clock_ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bound over prediction: (3, C), rows as in `PHASES`."""
        bands = np.searchsorted(self.clock_band_edges, clock_ratios, side="right")
        margins = np.array([self.log_margins[phase] for phase in PHASES])
        factors: NDArray[np.float64] = np.exp(margins[:, bands])
        return factors


def conformal_quantile(scores: NDArray[np.float64], violation_ratio: float) -> float:
    """Score that a new exchangeable score exceeds with at most `violation_ratio` probability.

    The ceil((n + 1) (1 - alpha))-th smallest of n scores: Vovk et al., Algorithmic Learning in a
    Random World (2005); Lei et al. (arXiv 1604.04173), section 2.2. Infinite if n is too small.
    """
    rank = math.ceil((len(scores) + 1) * (1.0 - violation_ratio) - 1e-9)
    if rank > len(scores):
        return math.inf
    return float(np.partition(scores, rank - 1)[rank - 1])


def calibrate(
    log_errors: NDArray[np.float64],
    phases: NDArray[np.intp],
    clock_ratios: NDArray[np.float64],
    violation_ratio: float,
) -> Calibration:
    """Margins from rows that training never saw.

    Args:
        log_errors: (N,) log of measured over predicted latency.
        phases: (N,) of `phases_of`.
        clock_ratios: (N,) clock over maximum clock.
        violation_ratio: Share of iterations allowed above the bound.

    Raises:
        PredictorsError: If all rows together are too few for the violation rate.
    """
    overall = conformal_quantile(log_errors, violation_ratio)
    if math.isinf(overall):
        raise PredictorsError(
            f"calibration has {len(log_errors)} rows; a violation ratio of {violation_ratio} needs "
            f"{math.ceil(1.0 / violation_ratio - 1.0)} or more: record longer or allow more"
        )
    bands = np.searchsorted(CLOCK_BAND_EDGES, clock_ratios, side="right")
    margins, counts = {}, {}
    for index, phase in enumerate(PHASES):
        in_phase = phases == index
        phase_margin = conformal_quantile(log_errors[in_phase], violation_ratio)
        if math.isinf(phase_margin):
            phase_margin = float(log_errors[in_phase].max(initial=0.0))
        wider = max(overall, phase_margin)
        groups = [in_phase & (bands == band) for band in range(len(CLOCK_BAND_EDGES) + 1)]
        found = [conformal_quantile(log_errors[group], violation_ratio) for group in groups]
        # a bound below the prediction would be no bound to those who read the prediction
        margins[phase] = tuple(max(q if math.isfinite(q) else wider, 0.0) for q in found)
        counts[phase] = tuple(int(np.count_nonzero(group)) for group in groups)
    return Calibration(violation_ratio, CLOCK_BAND_EDGES, margins, counts)
