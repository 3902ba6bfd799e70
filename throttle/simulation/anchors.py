"""Published figures of whole iterations, and what the plant says to them.

Iterations at default clocks: ML.ENERGY v3 (vLLM; median inter-token latency, mean watts per GPU).
Across clocks: published sweeps of other GPUs, each with that GPU's own figures. No public data
pairs MoE on data-center GPUs with clocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from throttle.simulation.operators import IterationWork
from throttle.simulation.plant import Plant, plant_for

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Prompts of chat traffic and their answers: assumed. Qwen3-235B on 8 GPUs has answers as long as
#: its KV memory allows at batch 228.
_PROMPT_TOKENS = 350
_ANSWER_TOKENS = 700
_LONG_ANSWER_TOKENS = 1500
_GPT_OSS_SKEW = 0.8
_ITERATION_TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class Setting:
    """A GPU with a model, as `plant_for` takes them."""

    gpu: str
    model: str
    weight_dtype: str
    tensor_parallel_count: int = 1
    expert_parallel_count: int = 1
    overrides: tuple[tuple[str, float], ...] = ()

    def plant(self) -> Plant:
        """Its plant."""
        return _plant(self)


@cache
def _plant(setting: Setting) -> Plant:
    return plant_for(
        setting.gpu,
        setting.model,
        setting.weight_dtype,
        "bf16",
        setting.tensor_parallel_count,
        setting.expert_parallel_count,
        dict(setting.overrides),
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """One published figure beside the simulated one.

    Attributes:
        subject: What runs.
        quantity: What is compared.
        published: The published figure.
        simulated: The plant's.
        error: Relative for times and watts; in percentage points, as a ratio, for changes.
        tolerance: Largest error that this project allows itself.
        status: `measured`, `published` or `second-hand`.
    """

    subject: str
    quantity: str
    published: float
    simulated: float
    error: float
    tolerance: float
    status: str

    @property
    def is_kept(self) -> bool:
        """Whether the error is within the tolerance."""
        return abs(self.error) <= self.tolerance


@dataclass(frozen=True, slots=True)
class SteadyState:
    """Decode at one batch size with the prompts that keep it full.

    Attributes:
        median_seconds: Median time between tokens.
        mean_watts: Of one GPU.
        joules_per_token: Of all GPUs.
    """

    median_seconds: float
    mean_watts: float
    joules_per_token: float


def steady_state(plant: Plant, batch: int, prompt_tokens: int, answer_tokens: int) -> SteadyState:
    """Steps at default clocks where each finished request is replaced by a new prompt.

    Prompts arrive at random, `batch / answer` per step; the mean context is the prompt and half the
    answer. Steps with a prompt are as many as steps without by the Poisson distribution.
    """
    clock = plant.maximum_clock_mhz
    context = batch * (prompt_tokens + answer_tokens // 2)
    rate = batch / answer_tokens
    share = 1.0 - math.exp(-rate)
    prompts = rate / share  # of a step that has any
    count = max(1, round(prompts))
    chunk = round(prompt_tokens * prompts / count)
    plain = plant.iteration(IterationWork((), batch, context), clock)
    mixed = plant.iteration(IterationWork(((chunk, 0),) * count, batch, context), clock)
    seconds = (1.0 - share) * plain.latency_seconds + share * mixed.latency_seconds
    joules = (1.0 - share) * plain.energy_joules + share * mixed.energy_joules
    median = plain if share < 0.5 else mixed
    return SteadyState(median.latency_seconds, joules / seconds, plant.gpus_count * joules / batch)


@dataclass(frozen=True, slots=True)
class _Iteration:
    setting: Setting
    batch: int
    watts: float
    milliseconds: float | None = None
    answer_tokens: int = _ANSWER_TOKENS


_QWEN_30B = Setting("h100-sxm", "qwen3-30b-a3b", "bf16")
_GPT_OSS = Setting(
    "h100-sxm",
    "gpt-oss-120b",
    "mxfp4",
    overrides=(("behavior.routing_skew_exponent", _GPT_OSS_SKEW),),
)
_QWEN_235B = Setting("h100-sxm", "qwen3-235b-a22b", "bf16", 8, 8)
_LLAMA = Setting("h100-sxm", "llama-3.1-8b", "bf16")
_DEEPSEEK = Setting("b200", "deepseek-v3", "fp8_block", 8, 8)
_ITERATIONS = (
    _Iteration(_QWEN_30B, 8, 399, 12.9),
    _Iteration(_QWEN_30B, 16, 439, 17.6),
    _Iteration(_QWEN_30B, 32, 468, 22.6),
    _Iteration(_QWEN_30B, 64, 480, 28.9),
    _Iteration(_GPT_OSS, 8, 550, 9.9),
    _Iteration(_GPT_OSS, 64, 688, 24.2),
    _Iteration(_QWEN_235B, 8, 354, 20.2, _LONG_ANSWER_TOKENS),
    _Iteration(_QWEN_235B, 228, 505, 55.5, _LONG_ANSWER_TOKENS),
    _Iteration(_LLAMA, 8, 486),
    _Iteration(_LLAMA, 256, 690),
    _Iteration(_DEEPSEEK, 8, 535),
    _Iteration(_DEEPSEEK, 127, 891),
)


def iteration_comparisons() -> Iterator[Comparison]:
    """ML.ENERGY v3: median inter-token latency and watts per GPU at default clocks."""
    for anchor in _ITERATIONS:
        setting = anchor.setting
        found = steady_state(setting.plant(), anchor.batch, _PROMPT_TOKENS, anchor.answer_tokens)
        gpus = max(setting.tensor_parallel_count, setting.expert_parallel_count)
        name = (
            f"{setting.gpu} x{gpus}, {setting.model} {setting.weight_dtype}, batch {anchor.batch}"
        )
        if anchor.milliseconds is not None:
            yield _relative(
                name, "median ms between tokens", anchor.milliseconds, found.median_seconds * 1e3,
                _ITERATION_TOLERANCE,
            )  # fmt: skip
        yield _relative(name, "W per GPU", anchor.watts, found.mean_watts, _ITERATION_TOLERANCE)


def _relative(
    subject: str, quantity: str, published: float, simulated: float, tolerance: float
) -> Comparison:
    error = simulated / published - 1.0
    return Comparison(subject, quantity, published, simulated, error, tolerance, "measured")


@dataclass(frozen=True, slots=True)
class _Change:
    """Change of throughput and of energy per token at a clock against the default clock."""

    subject: str
    setting: Setting
    work: IterationWork
    status: str
    speed: dict[int, float] = field(default_factory=dict)
    energy: dict[int, float] = field(default_factory=dict)
    tolerance: float = 0.05


def _decode(batch: int, context: int = 700) -> IterationWork:
    return IterationWork((), batch, batch * context)


_CHANGES = (
    _Change(
        "RTX 5090, Qwen3-30B-A3B 4-bit, decode of 12",
        Setting(
            "rtx-5090", "qwen3-30b-a3b", "int4",
            overrides=(("behavior.fixed_clock_sensitivity_ratio", 1.0),),
        ),
        _decode(12),
        "second-hand",
        {2400: -0.118, 2100: -0.205, 1800: -0.311, 1500: -0.406},
        {2400: -0.149, 2100: -0.193, 1800: -0.227, 1500: -0.227},
    ),
    # Published for Llama2-13B, which the catalogue does not hold.
    _Change(
        "A100, Llama-3.1-8B for Llama2-13B (throttLL'eM), decode of 32",
        Setting("a100-sxm", "llama-3.1-8b", "bf16"),
        _decode(32),
        "second-hand",
        {1050: -0.0625},
        {1050: 1 / 1.374 - 1},
        0.08,
    ),
    # Published: "up to 32 % at small loss".
    _Change(
        "H200, Qwen3-30B-A3B, decode of 64 (arXiv 2605.11999)",
        Setting("h200-sxm", "qwen3-30b-a3b", "bf16"),
        _decode(64),
        "published",
        {},
        {1200: -0.32},
        0.08,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Curve:
    """Time and power at some clocks over those at the default clock."""

    subject: str
    work: IterationWork
    seconds: tuple[float, ...]
    watts: tuple[float, ...]


_L20 = Setting(
    "l20", "llama-3.1-8b", "bf16", overrides=(("behavior.fixed_clock_sensitivity_ratio", 0.1),)
)
_L20_CLOCKS_MHZ = (900, 1200, 1500, 1800, 2100)
_L20_TOLERANCE = 0.10
_L20_CURVES = (
    _Curve(
        "prefill of 2048", IterationWork(((2048, 0),)),
        (2.58, 1.96, 1.58, 1.33, 1.16), (0.47, 0.56, 0.64, 0.72, 0.78),
    ),
    _Curve("decode of 1", _decode(1, 500), (1.08,), ()),
    _Curve(
        "decode of 16", _decode(16, 500),
        (1.16, 1.07, 1.04, 1.03, 1.01), (0.65, 0.71, 0.76, 0.80, 0.84),
    ),
    _Curve(
        "decode of 128", _decode(128, 500),
        (1.73, 1.34, 1.14, 1.03, 1.01), (0.58, 0.66, 0.73, 0.78, 0.82),
    ),
    _Curve(
        "decode of 256", _decode(256, 500),
        (2.13, 1.65, 1.38, 1.21, 1.10), (0.55, 0.63, 0.70, 0.76, 0.83),
    ),
)  # fmt: skip


def clock_comparisons() -> Iterator[Comparison]:
    """Published effects of the clock, each on its own GPU.

    L20: 8 GPUs with Qwen2.5-7B under vLLM 0.10.1 (fits to a public sweep), with Llama-3.1-8B here.
    """
    for change in _CHANGES:
        plant = change.setting.plant()
        full = plant.iteration(change.work, plant.maximum_clock_mhz)
        for quantity, values in (("throughput", change.speed), ("J per token", change.energy)):
            for clock, published in values.items():
                slow = plant.iteration(change.work, clock)
                ratio = (
                    full.latency_seconds / slow.latency_seconds
                    if quantity == "throughput"
                    else slow.energy_joules / full.energy_joules
                )
                yield Comparison(
                    change.subject, f"{quantity} at {clock} MHz", published, ratio - 1.0,
                    ratio - 1.0 - published, change.tolerance, change.status,
                )  # fmt: skip
    plant = _L20.plant()
    for curve in _L20_CURVES:
        full = plant.iteration(curve.work, plant.maximum_clock_mhz)
        name = f"L20, Llama-3.1-8B for Qwen2.5-7B, {curve.subject}"
        for quantity, ratios in (("time", curve.seconds), ("power", curve.watts)):
            for clock, published in zip(_L20_CLOCKS_MHZ, ratios, strict=False):
                slow = plant.iteration(curve.work, clock)
                ratio = (
                    slow.latency_seconds / full.latency_seconds
                    if quantity == "time"
                    else slow.power_watts / full.power_watts
                )
                yield _relative(
                    name, f"{quantity} at {clock} MHz over default", published, ratio,
                    _L20_TOLERANCE,
                )  # fmt: skip
