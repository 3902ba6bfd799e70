from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.samples import DATA
from throttle.engines.scrape import ENGINES, Page, WindowReader, engine_of, read_page

VLLM = [path.read_text() for path in sorted(DATA.joinpath("vllm-0.32.0").glob("metrics_*.txt"))]
SGLANG = DATA.joinpath("written", "sglang_metrics.txt").read_text()
LLAMACPP = DATA.joinpath("written", "llamacpp_metrics.txt").read_text()


def play(reader, pages):
    states = []
    for second, page in pages:
        states += [state for _, state in reader.read(page, second)]
    return states


def test_pages_tell_their_engine():
    assert [engine_of(text) for text in (*VLLM, SGLANG, LLAMACPP, "up 1\n")] == [
        *["vllm"] * len(VLLM), "sglang", "llamacpp", None,
    ]  # fmt: skip


def test_a_recorded_vllm_window_is_told_with_exact_sums():
    names = ENGINES["vllm"]
    first, *_, last = pages = [read_page(text, names) for text in VLLM]
    states = play(WindowReader(names), enumerate(pages))

    def delta(name):
        return last.values[name] - first.values.get(name, 0.0)

    assert len(states) == delta("vllm:iteration_tokens_total_count") > 10
    work = [state.scheduled for state in states]
    firsts = delta("vllm:time_to_first_token_seconds_count")
    assert sum(w.num_decode_requests for w in work) == (
        delta("vllm:generation_tokens_total") - firsts
    )
    assert sum(w.num_prefill_requests for w in work) == firsts > 0
    assert sum(w.sum_prefill_tokens for w in work) == (
        delta("vllm:prompt_tokens_total") - delta("vllm:prefix_cache_hits_total")
    )
    assert first.kv_blocks_count > 0
    assert first.kv_block_tokens > 0


def test_sglangs_documented_page_is_read_to_queue_kv_and_expert_load():
    names = ENGINES["sglang"]
    page = read_page(SGLANG, names)
    before = Page({key: value * 0.9 for key, value in page.values.items()})
    states = play(WindowReader(names), [(0.0, before), (1.0, page)])
    state = states[-1]
    assert state.queued.num_prefill_requests == 3
    assert state.kv_cache.usage_ratio == 0.25
    assert state.expert_load.balancedness_ratio == 0.8
    assert state.iteration_duration_seconds <= 0.02 + 1e-9  # its mean gap
    assert sum(each.scheduled.num_decode_requests for each in states) == 400 - 5
    assert sum(each.scheduled.sum_prefill_tokens for each in states) == 800


def test_llamacpps_documented_page_is_read_by_its_decode_calls():
    names = ENGINES["llamacpp"]
    page = read_page(LLAMACPP, names)
    empty = Page(dict.fromkeys(page.values, 0.0))
    states = play(WindowReader(names), [(0.0, empty), (10.0, page)])
    assert len(states) == 463
    assert sum(state.scheduled.num_decode_requests for state in states) == 1200
    assert sum(state.scheduled.sum_prefill_tokens for state in states) == 300


def test_an_idle_window_and_a_restarted_engine_say_nothing():
    names = ENGINES["vllm"]
    page = read_page(VLLM[-1], names)
    reader = WindowReader(names)
    assert play(reader, [(0.0, page), (1.0, page)]) == []
    assert play(reader, [(2.0, Page({}))]) == []


@given(
    iterations=st.integers(0, 600),
    firsts=st.integers(0, 40),
    decodes=st.integers(0, 2000),
    prompts=st.integers(0, 10_000),
)
def test_no_token_is_invented_or_lost(iterations, firsts, decodes, prompts):
    names = ENGINES["vllm"]
    values = {
        names.iterations: float(iterations),
        names.first_tokens: float(firsts),
        names.generated_tokens: float(firsts + decodes),
        names.prompt_tokens: float(prompts),
    }
    states = play(
        WindowReader(names), [(0.0, Page(dict.fromkeys(values, 0.0))), (1.0, Page(values))]
    )
    work = [state.scheduled for state in states]
    assert sum(each.num_decode_requests for each in work) == decodes
    assert sum(each.sum_prefill_tokens for each in work) == prompts
    assert all(each.num_prefill_requests > 0 for each in work if each.sum_prefill_tokens)
    total = math.fsum(state.iteration_duration_seconds for state in states)
    assert total == pytest.approx(1.0 if states else 0.0)
