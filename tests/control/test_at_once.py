"""A decision in one compiled call is, to the last bit, the decision of the steps one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictors.predictor import load_predictor
from tests.control.scenes import make_profile
from throttle.commands.replay import read_metadata, recorded_profile
from throttle.control.compilation import compiled_steps
from throttle.control.controller import Controller
from throttle.control.forecast import Forecaster
from throttle.control.selection import OBJECTIVES, Reason
from throttle.control.settings import ControlSettings
from throttle.control.state import (
    EventKind,
    IterationState,
    KvCache,
    Phase,
    RequestEvent,
    RequestProgress,
    ScheduledRequests,
    Slos,
)
from throttle.daemon.messages import StateReader
from throttle.daemon.recording import read_states
from throttle.testing import FormulaPredictor

pytest.importorskip("numba", reason="an optional extra")
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "azure_15s.parquet"
BUNDLE = ROOT / "models" / "h200-sxm__qwen3-30b-a3b__tp1ep1"
#: Prints which functions are compiled for further kinds of arguments by a recording played.
AFTER_WARM_UP = """
import json, sys
from pathlib import Path
from predictors import compiled_features, compiled_sweep
from predictors.predictor import load_predictor
from throttle.commands.replay import read_metadata, recorded_profile, replay
from throttle.control.compiled import decision
from throttle.control.controller import Controller
from throttle.control.settings import ControlSettings
from throttle.control.warm_up import warm_up
from throttle.daemon.recording import read_states
def kinds():
    return {
        f"{module.__name__}.{name}": len(each.signatures)
        for module in (compiled_features, compiled_sweep, decision)
        for name, each in vars(module).items()
        if hasattr(each, "py_func") and each.signatures  # those called from Python
    }
path, predictor = Path(sys.argv[1]), load_predictor(Path(sys.argv[2]))
warm_up(predictor)
before = kinds()
assert "throttle.control.compiled.decision.decide" in before
profile = recorded_profile(read_metadata(path), path.name)
for _ in replay(read_states(path), profile, Controller(profile, predictor, ControlSettings())):
    pass
print(json.dumps([name for name, count in kinds().items() if count != before.get(name)]))
"""


PREDICTOR = load_predictor(BUNDLE)


class _Both:
    """Two controllers that are told the same; `decide` holds them to the same decision."""

    def __init__(self, profile, control):
        self._at_once = Controller(profile, PREDICTOR, control)
        self._stepping = Controller(profile, PREDICTOR, control, at_once=False)

    def decide(self, state, clock_mhz=1980, watts=None):
        decisions = []
        for controller in (self._at_once, self._stepping):
            controller.observe(state, clock_mhz, watts)
            decisions.append(controller.decide(state))
        at_once, stepping = decisions
        assert at_once == stepping
        return at_once


def test_a_compiled_predictor_is_asked_for_whole_decisions_and_any_other_step_by_step():
    profile, control = make_profile(), ControlSettings()
    ways = [
        Forecaster(profile, each, control, None, (0, 9), steps=compiled_steps()).decide_at_once
        for each in (PREDICTOR, FormulaPredictor())
    ]
    assert [way is None for way in ways] == [False, True]


def test_the_golden_recording_is_decided_alike():
    profile = recorded_profile(read_metadata(GOLDEN), GOLDEN.name)
    both, reader = _Both(profile, ControlSettings()), StateReader(profile)
    reasons = {
        both.decide(reader.read(each.message), each.clock_observed_mhz, 400.0 + number % 50).reason
        for number, each in enumerate(read_states(GOLDEN))
    }
    assert {Reason.CRUISE, Reason.HELD} <= reasons


_limit = st.sampled_from([0.012, 0.05, 0.4, 20.0, 20.0, 20.0])
_arrival = st.tuples(
    st.sampled_from([5, 300, 3000]),  # prompt tokens
    st.sampled_from([0, 40, 299]),  # of those, cached
    st.sampled_from([None, 3, 50]),  # output limit
    st.sampled_from([None, 20]),  # output as the engine guesses
    st.builds(Slos, *[st.one_of(st.none(), _limit)] * 4),
    st.sampled_from(["", "long"]),
)
_step = st.tuples(
    st.lists(_arrival, max_size=1),
    st.sampled_from([0.008, 0.02, 0.05, 0.3]),  # seconds that pass
    st.sampled_from([0, 4, 16, 16, 16]),  # requests that may run
    st.sampled_from([0.1] * 9 + [0.99]),  # of the KV cache
)


class _Engine:
    """Serves what arrives, first come first, whole prompts at once."""

    def __init__(self):
        self._now, self._count, self._met = 1.0, 0, 0
        self._waiting, self._running = [], {}

    def step(self, arrivals, seconds, room, used):
        self._now += seconds
        self._count += 1
        events = [self._arrive(each) for each in arrivals]
        while self._waiting and len(self._running) < room:
            number, prompt, most = self._waiting.pop(0)
            self._running[number] = [prompt, 0, most]
        prompts = [each[0] for each in self._running.values() if each[1] == 0]
        for number, each in list(self._running.items()):
            each[1] += 1
            if each[1] > each[2]:
                del self._running[number]
                events.append(RequestEvent(EventKind.FINISHED, number, generated_tokens=each[2]))
        decodes = len(self._running) - len(prompts)
        return IterationState(
            self._count,
            Phase.COMPLETED,
            self._now,
            0.9 * seconds,
            scheduled=ScheduledRequests(
                num_prefill_requests=len(prompts),
                sum_prefill_tokens=sum(prompts),
                num_decode_requests=max(decodes, 0),
                sum_decode_kv_tokens=sum(sum(each[:2]) for each in self._running.values()),
            ),
            kv_cache=KvCache(usage_ratio=used),
            progress=RequestProgress(
                list(self._running),
                [each[0] for each in self._running.values()],
                [each[1] for each in self._running.values()],
            ),
            request_events=tuple(events),
        )

    def _arrive(self, arrival):
        prompt, cached, most, guess, slos, kind = arrival
        self._met += 1
        self._waiting.append((self._met, prompt, 20 if most is None else most))
        return RequestEvent(
            EventKind.ARRIVED,
            self._met,
            prompt_tokens=prompt,
            cached_tokens=min(cached, prompt),
            max_output_tokens=most,
            predicted_output_tokens=guess,
            slos=slos,
            length_class=kind,
        )


_profile = st.builds(
    lambda limits, kv_blocks: make_profile(
        default_slos=Slos(*limits),
        kv_blocks_count=kv_blocks,
        running_requests_limit=16,
        batched_tokens_limit=512,
    ),
    st.tuples(_limit, _limit, _limit, _limit),
    st.sampled_from([400, 4000, 4000]),
)
_control = st.builds(
    ControlSettings,
    objective=st.sampled_from(OBJECTIVES),
    ceiling_clock_ratio=st.sampled_from([0.6, 1.0]),
    hurry_lost=st.booleans(),
    load_settling_seconds=st.just(0.1),
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(_step, min_size=40, max_size=60), profile=_profile, control=_control)
def test_any_engine_is_decided_alike(steps, profile, control):
    engine, both = _Engine(), _Both(profile, control)
    for each in steps:
        both.decide(engine.step(*each))


def test_after_the_warm_up_no_engine_waits_for_a_compiler():
    """In a process of its own: every other test here compiles too."""
    command = [sys.executable, "-c", AFTER_WARM_UP, GOLDEN, BUNDLE]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert json.loads(done.stdout) == []
