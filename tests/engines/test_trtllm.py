from __future__ import annotations

import json

import pytest

from tests.engines.samples import DATA
from throttle.engines.trtllm import IterationStatisticsReader

WRITTEN = json.loads(DATA.joinpath("written", "trtllm_statistics.json").read_text())


def test_documented_fields_become_the_states_own():
    (age, mixed), (_, decode), (_, legacy) = IterationStatisticsReader().read(WRITTEN)
    work, queued = mixed.scheduled, mixed.queued
    assert mixed.iteration_duration_seconds == pytest.approx(0.0205)
    assert age == pytest.approx(0.019)
    assert (work.num_prefill_requests, work.sum_prefill_tokens, work.sum_prefill_kv_tokens) == (
        1, 512, 64,
    )  # fmt: skip
    assert (work.num_decode_requests, work.sum_decode_kv_tokens) == (4, 2400)
    assert (queued.num_prefill_requests, queued.sum_prefill_tokens) == (2, 700)
    assert (queued.num_decode_requests, queued.sum_decode_kv_tokens) == (1, 300)
    assert (mixed.kv_cache.used_blocks_count, mixed.kv_cache.total_blocks_count) == (100, 1000)
    # an older version without the tokens in KV: every used block is taken as full
    assert decode.scheduled.sum_decode_kv_tokens == 101 * 32
    assert decode.queued.num_prefill_requests == 2
    # zeros that mean "not tracked"
    assert legacy.scheduled.num_decode_requests == 5


def test_an_iteration_that_was_told_before_is_not_told_again_and_gaps_are_counted():
    reader = IterationStatisticsReader()
    assert len(list(reader.read(WRITTEN[:1]))) == 1
    assert list(reader.read(WRITTEN[:1])) == []
    assert len(list(reader.read(WRITTEN[2:]))) == 1
    assert reader.missed_count == 1


def test_an_engine_that_started_anew_is_followed():
    reader = IterationStatisticsReader()
    list(reader.read(WRITTEN))
    assert len(list(reader.read([WRITTEN[0] | {"iter": 1}]))) == 1
    assert reader.missed_count == 0


def test_other_ranks_are_left_out():
    assert list(IterationStatisticsReader(rank=1).read(WRITTEN)) == []
