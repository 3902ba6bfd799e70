"""A chart of one iteration over clock: latency, power and energy, the cheapest clock marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from throttle.errors import InvalidInputError
from throttle.simulation.charts import COLORS, LIMIT_COLOR, STYLE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from throttle.simulation.plant import IterationCost

SUFFIXES = (".svg", ".png")
_BLUE, _ORANGE, _GREEN = COLORS[1], COLORS[2], COLORS[3]
_NOTE_SIZE = 9.0


def check_suffix(path: Path) -> None:
    """Refuse a file that is neither SVG nor PNG.

    Raises:
        InvalidInputError: Names the file and the suffixes.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidInputError("--plot", str(path), f"a file that ends in {' or '.join(SUFFIXES)}")


def draw_clock_chart(  # noqa: PLR0917 - two texts at the end
    path: Path,
    clocks_mhz: Sequence[int],
    costs: Sequence[IterationCost],
    power_limit_watts: float,
    title: str,
    subtitle: str,
) -> None:
    """Draw latency, power and energy of one iteration over the clock asked for.

    Args:
        path: SVG or PNG, by suffix.
        clocks_mhz: Clocks asked for, rising.
        costs: The iteration's cost at each of them.
        power_limit_watts: Drawn where power comes near it.
        title: Which model on which GPU; the chart adds that it is simulated.
        subtitle: What the iteration holds.

    Raises:
        InvalidInputError: The suffix is neither.
    """
    check_suffix(path)
    panels = (
        ("latency (ms)", [cost.latency_seconds * 1e3 for cost in costs], _BLUE),
        ("power (W per GPU)", [cost.power_watts for cost in costs], _ORANGE),
        ("energy (J per GPU)", [cost.energy_joules for cost in costs], _GREEN),
    )
    with mpl.rc_context({**STYLE, "svg.hashsalt": "clocks"}):
        figure = Figure(figsize=(7.2, 7.4), layout="constrained")
        axes = figure.subplots(3, 1, sharex=True)
        for axis, (label, values, color) in zip(axes, panels, strict=True):
            axis.plot(clocks_mhz, values, color=color, linewidth=2.0)
            axis.set_ylabel(label)
            axis.set_ylim(0.0, max(values) * 1.12)
            axis.margins(x=0.02)
        _mark_limit(axes[1], power_limit_watts, max(panels[1][1]))
        _mark_cap(axes, clocks_mhz, costs)
        _mark_cheapest(axes[2], clocks_mhz, panels[2][1])
        axes[-1].set_xlabel("SM clock asked for (MHz)")
        figure.suptitle(f"{title} (simulated)\n{subtitle}", x=0.02, ha="left", fontsize=11)
        figure.align_ylabels(axes)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def _mark_limit(axis: Axes, limit_watts: float, highest_watts: float) -> None:
    if highest_watts < 0.85 * limit_watts:
        return
    axis.set_ylim(0.0, limit_watts * 1.12)
    axis.axhline(limit_watts, color=LIMIT_COLOR, linewidth=1.1, linestyle=(0, (4, 3)))
    axis.annotate(
        f"power limit {limit_watts:g} W",
        (0.01, limit_watts),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        color=LIMIT_COLOR,
        fontsize=_NOTE_SIZE,
    )


def _mark_cap(
    axes: Sequence[Axes], clocks_mhz: Sequence[int], costs: Sequence[IterationCost]
) -> None:
    """Shade the clocks that the power limit does not let the GPU reach."""
    capped = [
        clock
        for clock, cost in zip(clocks_mhz, costs, strict=True)
        if cost.effective_clock_mhz < clock
    ]
    if not capped:
        return
    for axis in axes:
        axis.axvspan(capped[0], clocks_mhz[-1], color="#9ca3af", alpha=0.22, linewidth=0)
    runs_at = costs[-1].effective_clock_mhz
    axes[0].annotate(
        f"power limit binds: runs at {runs_at} MHz",
        (clocks_mhz[-1], 0.96),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=_NOTE_SIZE,
    )


def _mark_cheapest(axis: Axes, clocks_mhz: Sequence[int], joules: Sequence[float]) -> None:
    least = min(range(len(joules)), key=joules.__getitem__)
    share = joules[least] / joules[-1]
    axis.plot(clocks_mhz[least], joules[least], "o", color=_GREEN, markersize=6, clip_on=False)
    right = clocks_mhz[least] > (clocks_mhz[0] + clocks_mhz[-1]) / 2
    axis.annotate(
        f"least at {clocks_mhz[least]} MHz: {share:.0%} of that at {clocks_mhz[-1]} MHz",
        (clocks_mhz[least], joules[least]),
        xytext=(8 if not right else -8, -16),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=_NOTE_SIZE,
    )
