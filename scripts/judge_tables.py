"""The figures of `judge_predictors.py` as the tables of docs/predictors.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Results = Mapping[str, Mapping[str, Any]]

_LATENCY, _POWER = "latency_mape_ratio", "power_mape_ratio"


def markdown(results: Results, draws: Sequence[int]) -> str:
    """The tables of the documentation.

    Args:
        results: Plant -> judgement -> figures.
        draws: Seeds of the randomized plants, in the order of their figures.
    """
    tables = [
        _same(results),
        _clocks_and_draws(results, draws),
        _many_draws(results),
        _slowed(results),
        *(
            _left_out(results, title, key)
            for title, key in (("model", "leave_one_model_out"), ("GPU", "leave_one_gpu_out"))
            if all(key in found for found in results.values())
        ),
        _ablation(results),
        *(
            _learning_curve(found["learning_curve"])
            for found in results.values()
            if "learning_curve" in found
        ),
    ]
    return "\n".join("\n".join(table) + "\n" for table in tables)


def _table(titles: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    rule = "|" + "---|" * len(titles)
    return [f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def _same(results: Results) -> list[str]:
    titles = ("plant", "decode", "prompts", "power", "R2 (iterations/s)", "bound holds")
    rows = (
        (
            name,
            f"{same['decode'][_LATENCY]:.2%}",
            f"{same['prefill'][_LATENCY]:.2%}",
            f"{same[_POWER]:.2%}",
            f"{same['throughput_r2_ratio']:.4f}",
            f"{same['coverage_ratio']:.2%}",
        )
        for name, same in ((name, found["same"]) for name, found in results.items())
    )
    return _table(titles, rows)


def _clocks_and_draws(results: Results, draws: Sequence[int]) -> list[str]:
    drawn = [title for draw in draws for title in (f"draw {draw} before", "after")]
    titles = ("plant", "every third clock", *drawn, "regret", "saving: chosen, best")
    rows = (
        (
            name,
            f"{found['held_out_clocks'][_LATENCY]:.2%}, {found['held_out_clocks'][_POWER]:.2%}",
            *(
                f"{draw[when][_LATENCY]:.1%}, {draw[when][_POWER]:.1%}"
                for draw in found["draws"]
                for when in ("before", "after")
            ),
            f"{found['regret']['mean_energy_ratio']:.2%}",
            f"{found['regret']['saving_ratio']:.1%}, {found['regret']['best_saving_ratio']:.1%}",
        )
        for name, found in results.items()
    )
    return _table(titles, rows)


def _many_draws(results: Results) -> list[str]:
    titles = ("plant", "latency: mean, worst, within 12 %", "power: mean, worst, within 12 %")
    rows = (
        (
            name,
            *(
                f"{found['many_draws'][f'{what}_mean_ratio']:.1%}, "
                f"{found['many_draws'][f'{what}_worst_ratio']:.1%}, "
                f"{found['many_draws'][f'{what}_kept_ratio']:.0%}"
                for what in ("latency", "power")
            ),
        )
        for name, found in results.items()
    )
    return _table(titles, rows)


def _slowed(results: Results) -> list[str]:
    titles = ("plant", "bound before", "minute 1", "2", "3", "4 after slowing by 15 %")
    rows = (
        (name, *(f"{value:.2%}" for value in found["coverage"].values()))
        for name, found in results.items()
    )
    return _table(titles, rows)


def _left_out(results: Results, title: str, key: str) -> list[str]:
    titles = (f"{title} left out", "latency before", "after", "power before", "after", "bound")
    rows = (
        (
            name,
            f"{found[key]['before'][_LATENCY]:.1%}",
            f"{found[key]['after'][_LATENCY]:.1%}",
            f"{found[key]['before'][_POWER]:.1%}",
            f"{found[key]['after'][_POWER]:.1%}",
            f"{found[key]['after']['coverage_ratio']:.2%}",
        )
        for name, found in results.items()
    )
    return _table(titles, rows)


def _ablation(results: Results) -> list[str]:
    titles = ("ablation: latency (power)", *next(iter(results.values()))["ablation"])
    rows = (
        (name, *(f"{one[_LATENCY]:.2%} ({one[_POWER]:.2%})" for one in found["ablation"].values()))
        for name, found in results.items()
    )
    return _table(titles, rows)


def _learning_curve(curve: Mapping[str, Any]) -> list[str]:
    rows = (
        (
            minutes,
            f"{one[_LATENCY]:.2%}",
            f"{one['decode'][_LATENCY]:.2%}",
            f"{one['prefill'][_LATENCY]:.2%}",
            f"{one[_POWER]:.2%}",
        )
        for minutes, one in curve.items()
    )
    return _table(("minutes", "latency", "decode", "prompts", "power"), rows)
