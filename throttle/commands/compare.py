"""`throttle compare`: policies side by side on one simulated GPU, trace and set of limits."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from throttle.control.state import Slos
from throttle.errors import InvalidInputError, NotFoundError
from throttle.simulation.comparison.comparing import Equalize, Plan, compare
from throttle.simulation.comparison.execution import DaskCluster, InProcess, LocalProcesses
from throttle.simulation.comparison.runs import CHAT_SLOS, Scene
from throttle.simulation.engine import Fidelity
from throttle.simulation.policies.catalogue import POLICY_NAMES
from throttle.simulation.policies.disturbed import Outages

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from throttle.simulation.comparison.execution import Executor

_DEFAULT_POLICIES: Final = "max,best-static,throttllem,ecofreq,greenllm,aimd,mpc,throttle"
_SLO_KEYS: Final = ("ttft_seconds", "tbt_seconds", "tpot_seconds", "e2e_seconds")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "compare",
        help="compare clock policies on a simulated GPU",
        description="Play one trace under several clock policies on one simulated GPU, at shares "
        "of the load that maximum clock carries. All figures are simulated.",
        allow_abbrev=False,
    )
    scene = parser.add_argument_group("where")
    scene.add_argument("--trace", default="azure2023_conv_10min", help="shipped trace or CSV file")
    scene.add_argument("--start", type=float, default=0.0, metavar="S", help="window's start (0)")
    scene.add_argument(
        "--duration", type=float, default=float("inf"), metavar="S", help="window's length (all)"
    )
    scene.add_argument("--plant", default="h200-qwen3-30b-a3b", help="shipped plant or TOML file")
    scene.add_argument("--draw", type=int, metavar="SEED", help="randomize what is not known of it")
    scene.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter"
    )
    scene.add_argument(
        "--slo",
        type=Path,
        metavar="FILE",
        help=f"TOML or JSON with any of {', '.join(_SLO_KEYS)} (TTFT 1 s, TPOT 50 ms)",
    )
    scene.add_argument(
        "--fidelity",
        choices=[each.value for each in Fidelity],
        default=Fidelity.FULL.value,
        help="how much the engine tells (full)",
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--policies",
        default=_DEFAULT_POLICIES,
        metavar="A,B",
        help=f"of {', '.join(POLICY_NAMES)}, fixed-<MHz>",
    )
    what.add_argument("--load", default="0.6", metavar="L,L", help="shares of the goodput (0.6)")
    what.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each (1)")
    what.add_argument(
        "--bundle", default="models", metavar="DIR", help="bundle, or folder of bundles (models)"
    )
    what.add_argument(
        "--equal-attainment",
        choices=[each.value for each in Equalize],
        default=Equalize.TIGHTEN.value,
        help="run policies again, told other limits, until they attain what maximum clock does",
    )
    what.add_argument(
        "--hindsight", action="store_true", help="search the best schedule with everything known"
    )
    what.add_argument(
        "--certificate", action="store_true", help="compute a bound that no schedule undercuts"
    )
    faults = parser.add_argument_group("faults")
    faults.add_argument(
        "--predictor-ratio",
        type=float,
        default=1.0,
        metavar="R",
        help="factor on predicted durations (1)",
    )
    faults.add_argument(
        "--outage", metavar="EVERY:FOR", help="lose all states for so many seconds, so often"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="local processes (cores)"
    )
    how.add_argument("--dask", metavar="SCHEDULER", help="run on a Dask cluster instead")
    how.add_argument(
        "--cache", type=Path, default=Path("out/cache"), help="where goodput is kept (out/cache)"
    )
    how.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    how.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare; 0 when every run is done."""
    plan = read_plan(arguments)
    plan.check()
    with _executor(arguments) as executor:
        document = compare(plan, executor)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if arguments.html is not None:
        from throttle.simulation.comparison.page import write_page  # noqa: PLC0415 - matplotlib

        arguments.html.parent.mkdir(parents=True, exist_ok=True)
        arguments.html.write_text(write_page(document), encoding="utf-8")
    _print_table(document)
    return 0


def read_plan(arguments: argparse.Namespace) -> Plan:
    """What the command line asks for.

    Raises:
        InvalidInputError: A value is not allowed.
        NotFoundError: A file is missing.
    """
    if arguments.seeds < 1:
        raise InvalidInputError("--seeds", arguments.seeds, "1 or more")
    if not 0.0 < arguments.predictor_ratio < 10.0:
        raise InvalidInputError("--predictor-ratio", arguments.predictor_ratio, "above 0, below 10")
    scene = Scene(
        plant=arguments.plant,
        trace=arguments.trace,
        draw=arguments.draw,
        overrides=tuple(_override(text) for text in arguments.set),
        start_seconds=arguments.start,
        duration_seconds=arguments.duration,
        slos=CHAT_SLOS if arguments.slo is None else read_slos(arguments.slo),
        fidelity=Fidelity(arguments.fidelity),
        bundle=arguments.bundle,
        predictor_ratio=arguments.predictor_ratio,
        outages=_outages(arguments.outage),
    )
    return Plan(
        scene=scene,
        policies=tuple(name for name in arguments.policies.split(",") if name),
        loads=tuple(_number("--load", text) for text in arguments.load.split(",")),
        seeds=tuple(range(1, arguments.seeds + 1)),
        with_hindsight=arguments.hindsight,
        with_certificate=arguments.certificate,
        equalize=Equalize(arguments.equal_attainment),
        cache=arguments.cache,
    )


def read_slos(path: Path) -> Slos:
    """Limits from a TOML or JSON file.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: It does not parse, or a key or value is not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"no file of limits {str(path)!r}") from None
    try:
        table: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise InvalidInputError(str(path), str(error), "TOML, or JSON in a .json file") from None
    if not isinstance(table, dict) or not table or set(table) - set(_SLO_KEYS):
        raise InvalidInputError(f"{path}: keys", table, f"one or more of {', '.join(_SLO_KEYS)}")
    for name, value in table.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6:
            raise InvalidInputError(f"{path}: {name}", value, "seconds, above 0")
    return Slos(**{name: float(value) for name, value in table.items()})


def _executor(arguments: argparse.Namespace) -> Executor:
    if arguments.dask is not None:
        return DaskCluster(arguments.dask)
    if arguments.jobs < 1:
        raise InvalidInputError("--jobs", arguments.jobs, "1 or more")
    return LocalProcesses(arguments.jobs) if arguments.jobs > 1 else InProcess()


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InvalidInputError("--set", text, "KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value  # text without quotes


def _outages(text: str | None) -> Outages | None:
    if text is None:
        return None
    period, colon, length = text.partition(":")
    if not colon:
        raise InvalidInputError("--outage", text, "EVERY:FOR, both in seconds")
    outages = Outages(_number("--outage", period), _number("--outage", length))
    if not 0.0 < outages.outage_seconds < outages.period_seconds:
        raise InvalidInputError("--outage", text, "EVERY:FOR with 0 < FOR < EVERY")
    return outages


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidInputError(name, text, "a number") from None


def _print_table(document: Mapping[str, Any]) -> None:
    print(
        f"simulated: {document['plant']}, {document['trace']}, goodput at "
        f"{document['goodput_compression_ratio']:.3g} times the recorded rate"
    )
    print(
        f"{'load':>5} {'policy':<18} {'energy/max':>15} {'at equal':>9} {'/static':>8} "
        f"{'/hindsight':>10} {'within %':>9} {'loss pp':>8} {'changes/s':>9}"
    )
    for load, policies in document["summary"].items():
        for name, figures in policies.items():
            print(
                f"{load:>5} {name:<18} {_shown(figures['energy_ratio'], 3, wide=True):>15} "
                f"{_shown(figures['equal_attainment_energy_ratio'], 3):>9} "
                f"{_shown(figures['energy_over_best_static'], 3):>8} "
                f"{_shown(figures['energy_over_hindsight'], 3):>10} "
                f"{_shown(figures['attainment_ratio'], 2, 100.0):>9} "
                f"{_shown(figures['attainment_loss'], 2, 100.0):>8} "
                f"{_shown(figures['clock_changes_per_second'], 2):>9}"
                f"{'' if figures['comparable'] else '  not comparable'}"
            )


def _shown(
    figure: Mapping[str, Any] | None, digits: int, scale: float = 1.0, *, wide: bool = False
) -> str:
    if figure is None:
        return "-"
    text = f"{figure['mean'] * scale:.{digits}f}"
    if wide and figure["half_width"] is not None:
        text += f" +-{figure['half_width'] * scale:.{digits}f}"
    return text
