"""Profiles, requests and states that the tests of the brain share."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from throttle.control.scoreboard import Column, LiveRequests
from throttle.control.state import (
    EngineProfile,
    EventKind,
    IterationState,
    KvCache,
    Mode,
    Phase,
    QueuedRequests,
    RequestEvent,
    RequestProgress,
    Role,
    ScheduledRequests,
    Slos,
)


def make_profile(**changes):
    profile = EngineProfile(
        engine_id="engine",
        engine_name="test",
        engine_version="1",
        model_name="qwen3-30b-a3b",
        model_config_json="",
        weight_dtype="bf16",
        kv_dtype="bf16",
        tensor_parallel_count=1,
        pipeline_parallel_count=1,
        data_parallel_count=1,
        expert_parallel_count=1,
        gpu_uuids=("GPU-0",),
        role=Role.MIXED,
        running_requests_limit=64,
        batched_tokens_limit=2048,
        kv_blocks_count=10_000,
        kv_block_tokens=16,
        default_slos=Slos(ttft_seconds=1.0, tpot_seconds=0.05),
        mode=Mode.ACT,
        lease_seconds=5.0,
    )
    return dataclasses.replace(profile, **changes)


def make_row(number=1, *, prompt=100, computed=None, generated=0, arrival=0.0, **limits):
    row = np.full(len(Column), np.nan)
    row[Column.NUMBER] = number
    row[Column.ARRIVAL] = arrival
    row[Column.PROMPT] = row[Column.TARGET] = prompt
    row[Column.COMPUTED] = prompt if computed is None else computed
    row[Column.GENERATED] = generated
    row[Column.MAX_OUTPUT] = math.inf
    row[Column.LENGTH_CLASS] = 0
    if generated:
        row[Column.FIRST_TOKEN] = limits.pop("first_token", arrival)
        row[Column.FIRST_GENERATED] = 1
    for column in (Column.TTFT, Column.TBT, Column.TPOT, Column.E2E):
        row[column] = limits.get(column.name.lower(), math.inf)
    return row


def make_live(running=(), waiting=()):
    def stack(rows):
        return np.array(rows) if rows else np.empty((0, len(Column)))

    return LiveRequests(stack(list(running)), stack(list(waiting)))


class Engine:
    """Builds the states of an engine whose requests a test moves by hand."""

    def __init__(self):
        self.now = 0.0
        self.sequence = 0
        self.running = {}
        self.events = []

    def arrive(self, number, prompt=100, age=0.0, **fields):
        event = RequestEvent(
            EventKind.ARRIVED, number, age_seconds=age, prompt_tokens=prompt, **fields
        )
        self.events.append(event)

    def end(self, number, kind=EventKind.FINISHED):
        _, generated = self.running.pop(number)
        self.events.append(RequestEvent(kind, number, generated_tokens=generated))

    def preempt(self, number):
        _, generated = self.running.pop(number)
        self.events.append(RequestEvent(EventKind.PREEMPTED, number, generated_tokens=generated))

    def state(self, phase=Phase.COMPLETED, *, seconds=0.01, queued=0, progress=True, kv=None):
        self.sequence += 1
        self.now += seconds
        decodes = {n: g for n, (_, g) in self.running.items() if g > 0}
        context = sum(c + g for c, g in self.running.values())
        chunks = len(self.running) - len(decodes)
        state = IterationState(
            sequence_number=self.sequence,
            phase=phase,
            engine_time_seconds=self.now,
            iteration_duration_seconds=seconds if phase is Phase.COMPLETED else None,
            scheduled=ScheduledRequests(
                num_prefill_requests=chunks,
                sum_prefill_tokens=100 * chunks,
                num_decode_requests=len(decodes),
                sum_decode_kv_tokens=context,
            ),
            queued=QueuedRequests(num_prefill_requests=queued),
            kv_cache=kv or KvCache(),
            progress=RequestProgress(
                list(self.running),
                [c for c, _ in self.running.values()],
                [g for _, g in self.running.values()],
            )
            if progress
            else None,
            request_events=tuple(self.events),
        )
        self.events = []
        return state
