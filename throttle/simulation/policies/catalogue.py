"""Policies by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from throttle.control.settings import ControlSettings
from throttle.errors import NotFoundError
from throttle.simulation.policies.bandit import LinUcb, LinUcbKnobs
from throttle.simulation.policies.controlled import Throttle
from throttle.simulation.policies.ecofreq import EcoFreq, EcoFreqKnobs
from throttle.simulation.policies.greedy import SWITCHING_AWARE, Greedy, GreedyKnobs
from throttle.simulation.policies.greenllm import Greenllm, GreenllmKnobs
from throttle.simulation.policies.mpc import Mpc, MpcKnobs
from throttle.simulation.policies.power_cap import PowerCap, PowerCapKnobs
from throttle.simulation.policies.reactive import Aimd, AimdKnobs, Ondemand, OndemandKnobs
from throttle.simulation.policies.static import FixedClock, MaximumClock
from throttle.simulation.policies.throttllem import Throttllem, ThrottllemKnobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from throttle.simulation.policies.policy import Policy, PolicyInputs

_BUILDERS: Final[dict[str, Callable[[PolicyInputs], Policy]]] = {
    "ondemand": lambda inputs: Ondemand(inputs, OndemandKnobs()),
    "aimd": lambda inputs: Aimd(inputs, AimdKnobs()),
    "greenllm": lambda inputs: Greenllm(inputs, GreenllmKnobs()),
    "ecofreq": lambda inputs: EcoFreq(inputs, EcoFreqKnobs()),
    "throttllem": lambda inputs: Throttllem(inputs, ThrottllemKnobs()),
    "greedy": lambda inputs: Greedy("greedy", inputs, GreedyKnobs()),
    "linucb": lambda inputs: LinUcb(inputs, LinUcbKnobs()),
    "power-cap": lambda inputs: PowerCap(inputs, PowerCapKnobs()),
    "mpc": lambda inputs: Mpc(inputs, MpcKnobs()),
    "switching-aware": lambda inputs: Greedy("switching-aware", inputs, SWITCHING_AWARE),
    "throttle": lambda inputs: Throttle(inputs, ControlSettings()),
}

#: Ours with a simpler objective: what the long-run one is worth.
_ABLATIONS: Final[dict[str, Callable[[PolicyInputs], Policy]]] = {
    "throttle-lowest-clock": lambda inputs: Throttle(
        inputs, ControlSettings(objective="lowest-clock")
    ),
    "throttle-energy": lambda inputs: Throttle(inputs, ControlSettings(objective="energy")),
    "throttle-energy-above-idle": lambda inputs: Throttle(
        inputs, ControlSettings(objective="energy-above-idle")
    ),
}
ABLATION_NAMES: Final = tuple(_ABLATIONS)

#: Clocks found by playing the trace, or other traces, at many clocks; see `hindsight`.
SEARCHED: Final = ("best-static", "trained-static")
#: Every name, in the order of tables.
POLICY_NAMES: Final = ("max", *SEARCHED, *_BUILDERS)
_FIXED = "fixed-"


def is_policy_name(name: str) -> bool:
    """Whether a policy has this name; `fixed-<MHz>` is one too."""
    fixed = name.startswith(_FIXED) and name.removeprefix(_FIXED).isdigit()
    return fixed or name in POLICY_NAMES or name in _ABLATIONS


def needs_predictor(name: str) -> bool:
    """Whether the policy looks at predictions; fixed clocks do not."""
    return name != "max" and not name.startswith(_FIXED)


def fixed_policy(name: str) -> Policy:
    """`max` or `fixed-<MHz>`, which need no inputs.

    Raises:
        NotFoundError: It is neither.
    """
    if name == "max":
        return MaximumClock()
    if name.startswith(_FIXED) and is_policy_name(name):
        return FixedClock(int(name.removeprefix(_FIXED)))
    raise NotFoundError(f"no policy {name!r} with a fixed clock; there are max and fixed-<MHz>")


def make_policy(name: str, inputs: PolicyInputs) -> Policy:
    """A fresh policy for one run.

    Raises:
        NotFoundError: There is none of this name, or its clock must be searched first.
    """
    if not needs_predictor(name):
        return fixed_policy(name)
    builder = _BUILDERS.get(name) or _ABLATIONS.get(name)
    if builder is None:
        raise NotFoundError(f"no policy {name!r}; there are max, {', '.join(_BUILDERS)}")
    return builder(inputs)
