"""The simulated truth: what one iteration costs on one kind of GPU at one clock."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from predictors.architecture import from_catalogue
from throttle.errors import InvalidInputError
from throttle.simulation.drawing import draw_parameters
from throttle.simulation.operators import LOW_BIT, Demand, IterationWork, Operators
from throttle.simulation.parameters import load_plant_parameters, parameters_for
from throttle.simulation.power import ClockTerms, clock_terms, scaled_power

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

    from predictors.architecture import ModelArchitecture
    from throttle.simulation.parameters import PlantParameters


@dataclass(frozen=True, slots=True)
class Shares:
    """What an iteration's time was spent on; the four ratios sum to 1."""

    compute: float
    memory: float
    fixed: float
    communication: float


@dataclass(frozen=True, slots=True)
class IterationCost:
    """Cost of one iteration; simulated.

    Attributes:
        latency_seconds: From one step's end to the next one's, host gap included.
        power_watts: Mean power of one GPU of the engine.
        effective_clock_mhz: SM clock that ran: the asked one, or less under the power cap.
        active_experts: Experts of one layer that at least one token selects.
        shares: What the time was spent on.
    """

    latency_seconds: float
    power_watts: float
    effective_clock_mhz: int
    active_experts: float
    shares: Shares

    @property
    def energy_joules(self) -> float:
        """Energy of one GPU."""
        return self.latency_seconds * self.power_watts


class Plant:
    """One GPU kind with one model and parallelism.

    Deterministic: noise and chip-to-chip spread are drawn by `SimulatedGpu` and `draw_chip`.

    Args:
        parameters: The plant's figures.

    Raises:
        InvalidInputError: The GPU has no figures for the model's formats or parallelism.
        ArchitectureError: The catalogue does not know the model.
    """

    def __init__(self, parameters: PlantParameters) -> None:
        self.parameters = parameters
        model = parameters.model
        self.architecture: ModelArchitecture = from_catalogue(
            model.name, model.weight_dtype, model.kv_dtype
        )
        self._operators = Operators(parameters, self.architecture)
        self.clocks_mhz: tuple[int, ...] = parameters.gpu.clocks.clocks_mhz()
        self._prepare_clocks()

    def _prepare_clocks(self) -> None:
        """Everything that follows from the parameters and not from the operators."""
        parameters, gpu = self.parameters, self.parameters.gpu
        self._limit = gpu.power.limit_watts
        self._static = gpu.power.static_watts
        self._bandwidth = gpu.memory.bandwidth_bytes_per_second
        self._idle_gap = 1.0 - gpu.power.gap_activity_ratio
        low_bit = self.architecture.weight_dtype in LOW_BIT
        busy_ratio = gpu.power.dequantization_ratio if low_bit else 1.0
        sensitivity = parameters.behavior.fixed_clock_sensitivity_ratio
        exponents = self._operators.exponents
        self._inverse_exponents = tuple(1.0 / p for p in exponents)
        self._terms = tuple(
            clock_terms(gpu, clock, sensitivity, exponents, busy_ratio) for clock in self.clocks_mhz
        )

    @classmethod
    def load(cls, name: str, overrides: Mapping[str, object] | None = None) -> Plant:
        """A shipped plant by name, or one from a `.toml` file; see `load_plant_parameters`."""
        return cls(load_plant_parameters(name, overrides))

    def draw_chip(self, generator: random.Random) -> Plant:
        """The same plant on another chip: its power differs by a drawn factor."""
        spread = self.parameters.behavior.chip_power_spread_ratio
        ratio = 1.0 + max(-2.0, min(2.0, generator.gauss(0.0, 1.0))) * spread
        chip = copy.copy(self)  # the operators, which are costly to prepare, are shared
        chip.parameters = replace(self.parameters, gpu=scaled_power(self.parameters.gpu, ratio))
        chip._prepare_clocks()  # noqa: SLF001 - of the same class
        return chip

    @property
    def maximum_clock_mhz(self) -> int:
        """The clock that a GPU runs at by default."""
        return self.clocks_mhz[-1]

    @property
    def gpus_count(self) -> int:
        """GPUs of one engine; each draws the same power."""
        return self.parameters.parallelism.gpus_count

    @property
    def kv_blocks_count(self) -> int:
        """KV blocks that fit beside the weights, over all replicas of the attention.

        Raises:
            InvalidInputError: The weights leave no room.
        """
        engine, memory = self.parameters.engine, self.parameters.gpu.memory
        usable = memory.capacity_bytes * engine.memory_utilization_ratio - engine.activation_bytes
        free = usable - self._operators.weight_bytes
        blocks = int(free // (self._operators.kv_bytes_per_token * engine.kv_block_tokens))
        if blocks < 1:
            raise InvalidInputError(
                "model.name", self.architecture.name, f"a model whose weights fit {usable:.3g} B"
            )
        return blocks * self._operators.replicas_count

    def snap_mhz(self, clock_mhz: int) -> int:
        """The highest supported clock that does not exceed this one, or the lowest there is."""
        return self.clocks_mhz[self._index(clock_mhz)]

    def idle_power_watts(self, clock_mhz: int) -> float:
        """Power of one GPU that holds a context and has no work."""
        return self._terms[self._index(clock_mhz)].idle_watts

    def active_experts(self, tokens: int) -> float:
        """Experts of one layer that at least one of so many tokens selects."""
        return self._operators.active_experts(tokens)

    def iteration(self, work: IterationWork, clock_mhz: int) -> IterationCost:
        """Cost of this work at this clock.

        Args:
            work: At least one token of work.
            clock_mhz: Clock asked for; snapped down to a supported one.

        Raises:
            InvalidInputError: There is no work.
        """
        if not work.decode_requests_count and not work.prefill_chunks:
            raise InvalidInputError("work", work, "at least one token")
        demand = self._operators.demand(work)
        index = self._index(clock_mhz)
        latency, power = self._evaluate(demand, self._terms[index])
        if power > self._limit:
            index = self._capped(demand, index)
            latency, power = self._evaluate(demand, self._terms[index])
        terms = self._terms[index]
        return IterationCost(
            latency,
            power,
            terms.clock_mhz,
            demand.active_experts,
            self._shares(demand, terms, latency),
        )

    def _index(self, clock_mhz: int) -> int:
        grid = self.parameters.gpu.clocks
        index = (clock_mhz - grid.minimum_mhz) // grid.step_mhz
        return max(0, min(index, len(self.clocks_mhz) - 1))

    def _evaluate(self, demand: Demand, terms: ClockTerms) -> tuple[float, float]:
        """Latency in seconds and power in watts, the cap left out."""
        memory_powers, compute_powers = terms.memory_powers, terms.compute_powers
        inverse = self._inverse_exponents
        resident = (
            demand.memory * terms.memory_factor
            + demand.compute * terms.compute_factor
            + demand.scaled_fixed * terms.fixed_factor
            + demand.communication
        )
        for memory, compute, kind in demand.blended:
            resident += (memory * memory_powers[kind] + compute * compute_powers[kind]) ** inverse[
                kind
            ]
        latency = resident + demand.gap
        power = (
            self._static
            + (
                terms.memory_watts * demand.traffic_bytes / self._bandwidth
                + terms.tensor_watts * demand.tensor_seconds
                + terms.busy_watts * (latency - self._idle_gap * demand.gap)
            )
            / latency
        )
        return latency, power

    def _capped(self, demand: Demand, above: int) -> int:
        """Index of the highest clock below `above` whose power keeps the limit, or 0.

        Power rises with clock, so the search interpolates between a clock that keeps the limit and
        one that does not, and halves the interval where that does not help.
        """
        low, high = -1, above
        guess = above * 17 // 20  # power is about cubic in clock near the cap
        while high - low > 1:
            if not low < guess < high:
                guess = (low + high) // 2
            _, power = self._evaluate(demand, self._terms[guess])
            excess = self._limit / power
            if excess >= 1.0:
                low = guess
            else:
                high = guess
            # Near the cap one grid step changes power by about 1 %.
            step = int((excess - 1.0) * 100.0)
            guess += step or (1 if excess >= 1.0 else -1)
        return max(low, 0)

    def _shares(self, demand: Demand, terms: ClockTerms, latency: float) -> Shares:
        memory = demand.memory * terms.memory_factor
        compute = demand.compute * terms.compute_factor
        for raised_memory, raised_compute, kind in demand.blended:
            m = raised_memory * terms.memory_powers[kind]
            c = raised_compute * terms.compute_powers[kind]
            blend = (m + c) ** self._inverse_exponents[kind]
            share = m / (m + c)
            memory += blend * share
            compute += blend * (1.0 - share)
        fixed = latency - memory - compute - demand.communication
        return Shares(
            compute / latency, memory / latency, fixed / latency, demand.communication / latency
        )


def plant_for(  # noqa: PLR0917 - each is one thing that a user names
    gpu: str,
    model: str,
    weight_dtype: str = "",
    kv_dtype: str = "",
    tensor_parallel_count: int = 1,
    expert_parallel_count: int = 1,
    overrides: Mapping[str, object] | None = None,
) -> Plant:
    """A plant of any GPU and model, without a file of its own.

    Args:
        gpu: One of `throttle.simulation.parameters.gpu_names()`.
        model: One of `predictors.architecture.catalogue()`.
        weight_dtype: bf16, fp8, fp8_block or mxfp4; empty means the published format.
        kv_dtype: Format of the KV cache; empty means bf16.
        tensor_parallel_count: GPUs that share each attention layer.
        expert_parallel_count: GPUs over which experts are spread.
        overrides: Dotted keys and their values, as for `load_plant_parameters`.

    Raises:
        NotFoundError: There is no such GPU.
        InvalidInputError: The GPU has no figures for the format or the parallelism.
        ArchitectureError: The catalogue does not know the model or the format.
    """
    return Plant(
        parameters_for(
            gpu,
            model,
            weight_dtype,
            kv_dtype,
            tensor_parallel_count,
            expert_parallel_count,
            overrides,
        )
    )


def draw_plant(name: str, seed: int, overrides: Mapping[str, object] | None = None) -> Plant:
    """A randomized plant around a shipped one or one from a `.toml` file.

    Args:
        name: As for `load_plant_parameters`.
        seed: The same seed draws the same plant.
        overrides: Applied before the draw; a drawn figure replaces an overridden one.
    """
    return Plant(draw_parameters(load_plant_parameters(name, overrides), seed))
