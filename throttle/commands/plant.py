"""`throttle plant`: what one iteration costs on the simulated GPU, at one clock or at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from throttle.commands import plant_calibrate
from throttle.errors import InvalidInputError
from throttle.simulation.drawing import draw_parameters
from throttle.simulation.operators import IterationWork
from throttle.simulation.parameters import gpu_names
from throttle.simulation.plant import Plant, plant_for

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from throttle.simulation.plant import IterationCost

_DEFAULT_DECODE_REQUESTS = 16
#: Options that describe a GPU and a model; a plant's file says them itself.
_OF_GPU_AND_MODEL = ("gpu", "model", "weight_dtype", "kv_dtype", "tp", "ep")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "plant",
        help="what one iteration costs on the simulated GPU",
        description="Latency, power and energy of one iteration on a simulated GPU. Watts and "
        "joules are those of one GPU of the engine. All figures are simulated; docs/plant.md says "
        "how far to trust them.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("GPU and model")
    what.add_argument("--gpu", metavar="G", help=", ".join(gpu_names()))
    what.add_argument("--model", metavar="M", help="such as qwen3-30b-a3b")
    what.add_argument("--weight-dtype", metavar="D", help="bf16, fp8, fp8_block or mxfp4")
    what.add_argument("--kv-dtype", metavar="D", help="bf16 or fp8")
    what.add_argument("--tp", type=int, metavar="N", help="GPUs that share each layer (1)")
    what.add_argument("--ep", type=int, metavar="N", help="of them, GPUs that spread experts (1)")
    what.add_argument("--plant", metavar="NAME|FILE", help="a shipped plant or TOML file instead")
    what.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter"
    )
    what.add_argument("--draw", type=int, metavar="SEED", help="randomize what is not known")
    work = parser.add_argument_group("the iteration")
    work.add_argument(
        "--decode-requests",
        type=int,
        metavar="B",
        help=f"requests that generate ({_DEFAULT_DECODE_REQUESTS}, or 0 with --prefill-tokens)",
    )
    work.add_argument(
        "--context", type=int, default=1024, metavar="C", help="tokens of each in KV (1024)"
    )
    work.add_argument(
        "--prefill-tokens", type=int, default=0, metavar="P", help="one prompt of so many tokens"
    )
    work.add_argument("--clock", type=int, metavar="MHZ", help="SM clock asked for (the highest)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--sweep", action="store_true", help="print every clock")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw all clocks: .svg or .png")
    parser.set_defaults(run=run)
    plant_calibrate.add_parser(parser.add_subparsers(title="commands", metavar="COMMAND"))


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for."""
    work = _work(arguments)
    plant = _plant(arguments, _tokens(work))
    clock = _clock(arguments.clock, plant)
    if arguments.plot is not None:
        _plot(arguments.plot, plant, work)
    clocks = plant.clocks_mhz if arguments.sweep else (clock,)
    costs = [(each, plant.iteration(work, each)) for each in clocks]
    if arguments.json:
        figures = [_figures(*pair) for pair in costs]
        rest = {"clocks": figures} if arguments.sweep else figures[0]
        print(json.dumps({**_description(plant, arguments, work), **rest}, indent=2))
        return 0
    print(f"{_title(plant)} (simulated): {_subtitle(work)}")
    if not _weights_fit(plant):
        print("note: the weights do not fit the memory of these GPUs")
    if arguments.sweep:
        _print_sweep(costs)
    else:
        _print_one(*costs[0])
    return 0


# -- what was asked for ------------------------------------------------------------------------


def _work(arguments: argparse.Namespace) -> IterationWork:
    decodes, prompt = arguments.decode_requests, arguments.prefill_tokens
    if decodes is None:
        decodes = 0 if prompt else _DEFAULT_DECODE_REQUESTS
    given = {
        "--decode-requests": decodes,
        "--context": arguments.context,
        "--prefill-tokens": prompt,
    }
    for option, value in given.items():
        if not 0 <= value < 2**31:
            raise InvalidInputError(option, value, "a whole number, 0 or above")
    if decodes + prompt == 0:
        raise InvalidInputError("--decode-requests", 0, "1 or more, or --prefill-tokens 1 or more")
    return IterationWork(
        prefill_chunks=((prompt, 0),) if prompt else (),
        decode_requests_count=decodes,
        decode_context_tokens=decodes * arguments.context,
    )


def _tokens(work: IterationWork) -> int:
    return work.decode_requests_count + sum(tokens for tokens, _ in work.prefill_chunks)


def _plant(arguments: argparse.Namespace, tokens: int) -> Plant:
    overrides = dict(_override(text) for text in arguments.set)
    if arguments.plant is not None:
        for name in _OF_GPU_AND_MODEL:
            value = getattr(arguments, name)
            if value is not None:
                raise InvalidInputError(
                    f"--{name.replace('_', '-')}", value, "no value beside --plant; use --set"
                )
        plant = Plant.load(arguments.plant, overrides)
    else:
        if arguments.gpu is None:
            raise InvalidInputError("--gpu", "", f"{', '.join(gpu_names())} (or name a --plant)")
        if arguments.model is None:
            raise InvalidInputError("--model", "", _models())
        for option, count in (("--tp", arguments.tp), ("--ep", arguments.ep)):
            if count is not None and count < 1:
                raise InvalidInputError(option, count, "1 or more GPUs")
        plant = plant_for(
            arguments.gpu,
            arguments.model,
            arguments.weight_dtype or "",
            arguments.kv_dtype or "",
            1 if arguments.tp is None else arguments.tp,
            1 if arguments.ep is None else arguments.ep,
            overrides,
        )
    if arguments.draw is not None:
        plant = Plant(draw_parameters(plant.parameters, arguments.draw))
    return _with_room(plant, tokens)


def _with_room(plant: Plant, tokens: int) -> Plant:
    """The same plant, with an engine that computes so many tokens at once."""
    parameters = plant.parameters
    if tokens <= parameters.engine.batched_tokens_limit:
        return plant
    engine = replace(parameters.engine, batched_tokens_limit=tokens)
    return Plant(replace(parameters, engine=engine))


def _models() -> str:
    from predictors.architecture import catalogue  # noqa: PLC0415 - only for the message

    return ", ".join(catalogue())


def _override(text: str) -> tuple[str, object]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InvalidInputError(
            "--set", text, "KEY=VALUE, such as behavior.routing_skew_exponent=0.3"
        )
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


def _clock(asked_mhz: int | None, plant: Plant) -> int:
    if asked_mhz is None:
        return plant.maximum_clock_mhz
    lowest, highest = plant.clocks_mhz[0], plant.clocks_mhz[-1]
    if not lowest <= asked_mhz <= highest:
        raise InvalidInputError(
            "--clock", asked_mhz, f"{lowest} to {highest} MHz on {plant.parameters.gpu.name}"
        )
    return plant.snap_mhz(asked_mhz)


# -- what comes out ----------------------------------------------------------------------------


def _description(
    plant: Plant, arguments: argparse.Namespace, work: IterationWork
) -> dict[str, object]:
    parameters, model = plant.parameters, plant.architecture
    return {
        "simulated": True,
        "plant": parameters.name,
        "gpu": parameters.gpu.name,
        "model": model.name,
        "weight_dtype": model.weight_dtype,
        "kv_dtype": model.kv_dtype,
        "tensor_parallel_count": parameters.parallelism.tensor_parallel_count,
        "expert_parallel_count": parameters.parallelism.expert_parallel_count,
        "gpus_count": plant.gpus_count,
        "draw_seed": arguments.draw,
        "weights_fit": _weights_fit(plant),
        "decode_requests_count": work.decode_requests_count,
        "decode_context_tokens": work.decode_context_tokens,
        "prefill_tokens": sum(tokens for tokens, _ in work.prefill_chunks),
    }


def _weights_fit(plant: Plant) -> bool:
    try:
        return plant.kv_blocks_count > 0
    except InvalidInputError:
        return False


def _figures(clock_mhz: int, cost: IterationCost) -> dict[str, object]:
    return {
        "clock_mhz": clock_mhz,
        "effective_clock_mhz": cost.effective_clock_mhz,
        "latency_seconds": cost.latency_seconds,
        "power_watts": cost.power_watts,
        "energy_joules": cost.energy_joules,
        "active_experts": cost.active_experts,
        "shares": _shares(cost),
    }


def _title(plant: Plant) -> str:
    model, gpu = plant.architecture, plant.parameters.gpu.marketing_name
    gpus = f"{plant.gpus_count} x {gpu}" if plant.gpus_count > 1 else gpu
    return f"{model.name} {model.weight_dtype} on {gpus}"


def _subtitle(work: IterationWork) -> str:
    parts = [f"prompt of {tokens} tokens" for tokens, _ in work.prefill_chunks]
    decodes = work.decode_requests_count
    if decodes:
        parts.append(f"{decodes} generating at {work.decode_context_tokens // decodes} tokens")
    return ", ".join(parts)


def _plot(path: Path, plant: Plant, work: IterationWork) -> None:
    from throttle.simulation.clock_chart import draw_clock_chart  # noqa: PLC0415 - matplotlib

    costs = [plant.iteration(work, clock) for clock in plant.clocks_mhz]
    limit = plant.parameters.gpu.power.limit_watts
    draw_clock_chart(path, plant.clocks_mhz, costs, limit, _title(plant), _subtitle(work))


def _print_one(clock_mhz: int, cost: IterationCost) -> None:
    capped = f", capped from {clock_mhz}" if cost.effective_clock_mhz < clock_mhz else ""
    rows = [
        ("clock", f"{cost.effective_clock_mhz}", f"MHz{capped}"),
        ("latency", f"{cost.latency_seconds * 1e3:.3f}", "ms"),
        ("power", f"{cost.power_watts:.1f}", "W per GPU"),
        ("energy", f"{cost.energy_joules:.4g}", "J per GPU"),
        ("active experts", f"{cost.active_experts:.1f}", "of a layer"),
    ]
    rows += [
        (f"share of {name}", f"{share:.1%}", "of the time") for name, share in _shares(cost).items()
    ]
    for name, value, unit in rows:
        print(f"  {name:<22} {value:>9} {unit}")


def _print_sweep(costs: Sequence[tuple[int, IterationCost]]) -> None:
    print("   MHz  effective  latency ms  watts per GPU  joules per GPU")
    least, _ = min(costs, key=lambda pair: pair[1].energy_joules)
    for clock, cost in costs:
        note = "  least energy" if clock == least else ""
        print(
            f"{clock:>6}  {cost.effective_clock_mhz:>9}  {cost.latency_seconds * 1e3:>10.3f}  "
            f"{cost.power_watts:>13.1f}  {cost.energy_joules:>14.4g}{note}"
        )


def _shares(cost: IterationCost) -> dict[str, float]:
    names = ("compute", "memory", "fixed", "communication")
    return {name: getattr(cost.shares, name) for name in names}
