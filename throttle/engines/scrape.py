"""Any engine's Prometheus page as states: what is left where nothing better can be had.

Counters tell how much work was done between two scrapes, not by which iterations. The window is
told as so many equal iterations, with exact sums of prompt and output tokens, so that the load that
the daemon learns is right; single slow iterations and single requests are not seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from prometheus_client.parser import text_string_to_metric_families

from throttle.v1 import engine_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.samples import Sample

#: Most iterations told of one window; scrape more often where there are more.
ITERATIONS_LIMIT: Final = 512


@dataclass(frozen=True, slots=True)
class MetricNames:
    """How one engine calls what is read; empty where it has no such metric.

    Attributes:
        running: Gauge, requests that run.
        waiting: Gauge, requests that wait.
        kv_usage_ratio: Gauge, share of the KV cache in use, 0 to 1.
        kv_tokens: Gauge, tokens in the KV cache.
        prompt_tokens: Counter, prompt tokens, cached ones included.
        cached_tokens: Counter, prompt tokens found in the prefix cache.
        generated_tokens: Counter, output tokens.
        first_tokens: Counter, requests that got their first token.
        iterations: Counter, iterations.
        gap_seconds: Counter, summed gaps between output tokens.
        gaps: Counter, number of those gaps.
        balancedness: Gauge, expert load, mean over maximum.
        cache_info: Info, whose labels tell the KV blocks and their tokens.
        cache_labels: Those two labels.
    """

    running: str
    waiting: str
    kv_usage_ratio: str = ""
    kv_tokens: str = ""
    prompt_tokens: str = ""
    cached_tokens: str = ""
    generated_tokens: str = ""
    first_tokens: str = ""
    iterations: str = ""
    gap_seconds: str = ""
    gaps: str = ""
    balancedness: str = ""
    cache_info: str = ""
    cache_labels: tuple[str, str] = ("", "")


#: By engine; names as of vLLM 0.32, SGLang 0.5.23 and llama.cpp of autumn 2026.
ENGINES: Final[Mapping[str, MetricNames]] = {
    "vllm": MetricNames(
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        kv_usage_ratio="vllm:kv_cache_usage_perc",
        prompt_tokens="vllm:prompt_tokens_total",
        cached_tokens="vllm:prefix_cache_hits_total",
        generated_tokens="vllm:generation_tokens_total",
        first_tokens="vllm:time_to_first_token_seconds_count",
        iterations="vllm:iteration_tokens_total_count",
        gap_seconds="vllm:inter_token_latency_seconds_sum",
        gaps="vllm:inter_token_latency_seconds_count",
        cache_info="vllm:cache_config_info",
        cache_labels=("num_gpu_blocks", "block_size"),
    ),
    "sglang": MetricNames(
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        kv_usage_ratio="sglang:token_usage",
        kv_tokens="sglang:kv_used_tokens",
        prompt_tokens="sglang:prompt_tokens_total",
        cached_tokens="sglang:cached_tokens_total",
        generated_tokens="sglang:generation_tokens_total",
        first_tokens="sglang:time_to_first_token_seconds_count",
        gap_seconds="sglang:inter_token_latency_seconds_sum",
        gaps="sglang:inter_token_latency_seconds_count",
        balancedness="sglang:eplb_balancedness",
        cache_info="sglang:cache_config_info",
        cache_labels=("num_pages", "page_size"),
    ),
    "llamacpp": MetricNames(
        running="llamacpp:requests_processing",
        waiting="llamacpp:requests_deferred",
        prompt_tokens="llamacpp:prompt_tokens_total",
        generated_tokens="llamacpp:tokens_predicted_total",
        iterations="llamacpp:n_decode_total",
        gap_seconds="llamacpp:tokens_predicted_seconds_total",
        gaps="llamacpp:tokens_predicted_total",
    ),
}


@dataclass(frozen=True, slots=True)
class Page:
    """What one scrape says: totals over all labels, by metric name.

    Attributes:
        values: By sample name.
        kv_blocks_count: KV blocks; 0 where the page does not say.
        kv_block_tokens: Tokens of one; 0 likewise.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    kv_blocks_count: int = 0
    kv_block_tokens: int = 0


def engine_of(text: str) -> str | None:
    """Which engine a page is from; None when it is from none that is known."""
    for engine, names in ENGINES.items():
        if names.running in text:
            return engine
    return None


def read_page(text: str, names: MetricNames) -> Page:
    """Read a page in Prometheus' text format; what is not asked for is skipped unread."""
    wanted = {
        value
        for name in MetricNames.__dataclass_fields__
        if isinstance(value := getattr(names, name), str) and value
    }
    lines = [line for line in text.splitlines() if _sample_name(line) in wanted]
    values: dict[str, float] = {}
    blocks = tokens = 0
    for sample in _samples("\n".join([*lines, ""])):
        if sample.name == names.cache_info:
            blocks += _label(sample, names.cache_labels[0])
            tokens = max(tokens, _label(sample, names.cache_labels[1]))
        elif math.isfinite(sample.value):
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return Page(values, blocks, tokens)


class WindowReader:
    """Turns scrapes into states.

    Args:
        names: The engine's metric names.
        kv_tokens_count: Tokens that the KV cache holds; 0 asks the page.
    """

    def __init__(self, names: MetricNames, kv_tokens_count: int = 0) -> None:
        self._names = names
        self._kv_tokens_count = kv_tokens_count
        self._last: Page | None = None
        self._last_seconds = 0.0
        self._running_before = 0.0

    def read(
        self, page: Page, now_seconds: float
    ) -> Iterator[tuple[float, engine_pb2.IterationState]]:
        """The states of the window that ends now, each with its engine time; none without work."""
        last, window = self._last, now_seconds - self._last_seconds
        self._last, self._last_seconds = page, now_seconds
        running, self._running_before = self._running_before, self._value(page, "running")
        if last is None or window <= 0:
            return
        deltas = {
            name: self._value(page, name) - self._value(last, name)
            for name in (
                "prompt_tokens",
                "cached_tokens",
                "generated_tokens",
                "first_tokens",
                "iterations",
                "gap_seconds",
                "gaps",
            )
        }
        if min(deltas.values()) < 0:
            return  # the engine has started anew
        mean_running = max((running + self._running_before) / 2.0, 1.0)
        yield from self._spread(page, deltas, mean_running, now_seconds, window)

    def _spread(
        self,
        page: Page,
        deltas: Mapping[str, float],
        mean_running: float,
        now_seconds: float,
        window_seconds: float,
    ) -> Iterator[tuple[float, engine_pb2.IterationState]]:
        firsts = round(deltas["first_tokens"])
        decodes = max(round(deltas["generated_tokens"]) - firsts, 0)
        prompts = max(round(deltas["prompt_tokens"] - deltas["cached_tokens"]), 0)
        if not (decodes or prompts or firsts):
            return
        count = round(deltas["iterations"]) or max(math.ceil(decodes / mean_running), firsts, 1)
        count = min(count, ITERATIONS_LIMIT)
        prefills = min(max(firsts, int(prompts > 0)), count)
        step = window_seconds / count
        duration = step
        if deltas["gaps"] > 0:
            duration = min(max(deltas["gap_seconds"] / deltas["gaps"], 1e-6), step)
        context = self._context_tokens(page) / max(decodes / count, 1.0)
        for index in range(count):
            decode = _share(decodes, count, index)
            state = engine_pb2.IterationState(
                phase=engine_pb2.ITERATION_PHASE_COMPLETED,
                iteration_duration_seconds=duration,
                timing_source=engine_pb2.TIMING_SOURCE_HOST_INTERVAL,
            )
            work = state.scheduled
            work.num_decode_requests = decode
            work.sum_decode_kv_tokens = round(context * decode)
            # prompts lie evenly in the window
            prompt = _share(prefills, count, index)
            if prompt:
                ordinal = index * prefills // count
                work.num_prefill_requests = max(_share(firsts, prefills, ordinal), 1)
                work.sum_prefill_tokens = _share(prompts, prefills, ordinal)
            self._describe(state, page)
            yield now_seconds - (count - 1 - index) * step, state

    def _describe(self, state: engine_pb2.IterationState, page: Page) -> None:
        state.queued.num_prefill_requests = max(round(self._value(page, "waiting")), 0)
        if self._names.kv_usage_ratio in page.values:
            ratio = page.values[self._names.kv_usage_ratio]
            state.kv_cache.usage_ratio = min(max(ratio, 0.0), 1.0)
        balancedness = page.values.get(self._names.balancedness)
        if balancedness is not None and 0.0 <= balancedness <= 1.0:
            state.expert_load.balancedness_ratio = balancedness

    def _context_tokens(self, page: Page) -> float:
        """Tokens in the KV cache, of all requests."""
        if self._names.kv_tokens in page.values:
            return page.values[self._names.kv_tokens]
        capacity = self._kv_tokens_count or page.kv_blocks_count * page.kv_block_tokens
        return capacity * min(max(self._value(page, "kv_usage_ratio"), 0.0), 1.0)

    def _value(self, page: Page, name: str) -> float:
        return page.values.get(getattr(self._names, name), 0.0)


def _share(total: int, parts: int, index: int) -> int:
    """Part `index` of a whole in almost equal integers."""
    return (index + 1) * total // parts - index * total // parts


def _sample_name(line: str) -> str:
    return line.partition("{")[0].partition(" ")[0]


def _samples(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        yield from family.samples


def _label(sample: Sample, name: str) -> int:
    text = sample.labels.get(name, "")
    return int(text) if text.isdecimal() else 0
