"""Compiled steps give what their definitions give, and the decisions are the same."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.scenes import make_live, make_profile, make_row
from throttle.commands.replay import read_metadata, recorded_profile, replay
from throttle.control import scoreboard
from throttle.control.arrivals import OfferedLoad
from throttle.control.compilation import compiled_steps
from throttle.control.controller import Controller
from throttle.control.cruise import CarryingLimits, Interruptions, equilibrium_shapes, settle
from throttle.control.feedback import PredictionFeedback
from throttle.control.lateness import EndingShares, Newcomers, PromptDelay, expect_lateness
from throttle.control.lengths import LengthBeliefs, RequestLengths
from throttle.control.projection import Successors, project
from throttle.control.prompt_work import PromptWork, measure
from throttle.control.scoreboard import Column
from throttle.control.settings import ControlSettings
from throttle.control.slack import Guards, measure_slack
from throttle.daemon.recording import read_states
from throttle.testing import FormulaPredictor

pytest.importorskip("numba", reason="an optional extra")
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "azure_15s.parquet"
#: Prints which functions are compiled for further kinds of arguments by a recording played.
AFTER_WARM_UP = """
import json, sys
from pathlib import Path
from throttle.commands.replay import read_metadata, recorded_profile, replay
from throttle.control.compiled import cruise, lateness, projection, prompt_work, scoreboard, slack
from throttle.control.controller import Controller
from throttle.control.settings import ControlSettings
from throttle.control.warm_up import warm_up
from throttle.daemon.recording import read_states
from throttle.testing import FormulaPredictor
def kinds():
    return {
        f"{module.__name__}.{name}": len(each.signatures)
        for module in (cruise, lateness, projection, prompt_work, scoreboard, slack)
        for name, each in vars(module).items()
        if hasattr(each, "py_func") and each.signatures  # those called from Python
    }
path, predictor = Path(sys.argv[1]), FormulaPredictor()
warm_up(predictor)
before = kinds()
profile = recorded_profile(read_metadata(path), path.name)
for _ in replay(read_states(path), profile, Controller(profile, predictor, ControlSettings())):
    pass
print(json.dumps([name for name, count in kinds().items() if count != before.get(name)]))
"""
PREDICTOR = FormulaPredictor()
CLOCKS = len(PREDICTOR.clocks_mhz)
PROFILE = make_profile(kv_blocks_count=400, running_requests_limit=10, batched_tokens_limit=300)
CLASSES = ("", "long")
WINDOWS = np.geomspace(0.02, 8.0, 8)
QUIETLY = settings(max_examples=60, deadline=None)

_limits = st.sampled_from([0.01, 0.03, 0.2, 5.0, math.inf])
_row = st.builds(
    lambda prompt, computed, generated, kind, most, guess, limits: {
        "prompt": prompt,
        "computed": prompt if generated else min(computed, prompt - 1),
        "generated": generated,
        "kind": kind,
        "most": generated + most,
        "guess": guess,
        "limits": limits,
    },
    st.integers(1, 900),
    st.integers(0, 900),
    st.one_of(st.just(0), st.integers(1, 400)),
    st.integers(0, 1),
    st.sampled_from([1.0, 7.0, 300.0, math.inf]),
    st.sampled_from([math.nan, 3.0, 150.0]),
    st.tuples(_limits, _limits, _limits, _limits),
)


def _rows(drawn, *, waiting):
    rows = []
    for number, each in enumerate(drawn, start=100 * waiting + 1):
        names = ("ttft", "tbt", "tpot", "e2e")
        generated = 0 if waiting else each["generated"]
        row = make_row(
            number,
            prompt=each["prompt"],
            computed=each["computed"] if not waiting else 0,
            generated=generated,
            arrival=4.0,
            first_token=4.5,
            **dict(zip(names, each["limits"], strict=True)),
        )
        row[Column.LENGTH_CLASS] = each["kind"]
        row[Column.MAX_OUTPUT] = each["most"]
        row[Column.PREDICTED_OUTPUT] = each["guess"]
        rows.append(row)
    return rows


def _beliefs():
    beliefs = LengthBeliefs()
    for tokens in (3, 40, 41, 90, 300):
        beliefs.add("long", tokens, censored=tokens == 90)
        beliefs.add("", tokens // 3 + 1, censored=False)
    return beliefs


def _lengths(rows, generated=0.0):
    return RequestLengths(
        CLASSES,
        rows[:, Column.LENGTH_CLASS],
        np.maximum(rows[:, Column.GENERATED], generated),
        rows[:, Column.MAX_OUTPUT],
        rows[:, Column.PREDICTED_OUTPUT],
    )


BELIEFS = _beliefs()
TABLE = BELIEFS.table(CLASSES)


def _horizon(running, waiting, successors=None):
    live = make_live(_rows(running, waiting=False), _rows(waiting, waiting=True))
    return live, project(
        live,
        BELIEFS.planned_tokens(_lengths(live.running)),
        BELIEFS.planned_tokens(_lengths(live.waiting)),
        PROFILE,
        successors,
    )


def _interruptions(steepness):
    batches = np.array([1.0, 2.0, 8.0, 64.0])
    falling = np.linspace(2.0, 1.0, CLOCKS)
    ratios = 1.0 + steepness * np.outer([0.1, 0.2, 0.3, 0.5], falling)
    return Interruptions(batches, ratios, 1e-4 * ratios)


_running = st.lists(_row, min_size=0, max_size=10)
_waiting = st.lists(_row, min_size=0, max_size=14)


@QUIETLY
@given(running=_running, waiting=_waiting, successors=st.booleans())
def test_the_projection_is_that_of_the_definition(running, waiting, successors):
    joining = Successors(BELIEFS.everyone, 12.5, 700.0) if successors else None
    live, expected = _horizon(running, waiting, joining)
    found = compiled_steps().project(live, TABLE, PROFILE, joining)
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "first_tokens":
            np.testing.assert_array_equal(ours.segments, theirs.segments)
            ours, theirs = ours.iterations, theirs.iterations
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, err_msg=field.name)


@QUIETLY
@given(running=_running, waiting=_waiting, known=st.booleans(), steepness=st.floats(0.0, 3.0))
def test_the_least_slack_is_that_of_the_definition(running, waiting, known, steepness):
    _, horizon = _horizon(running, waiting)
    if horizon.empty:
        return
    latency = PREDICTOR.predict(horizon.shapes).latency_seconds
    between = _interruptions(steepness) if known else None
    stretch = None
    if between is not None:
        stretch = between.stretch_ratio(horizon.shapes[:, 3])
        stretch[: horizon.prefill_segments_count] = 1.0
    arguments = (horizon, latency, 1.1 * latency, 5.0, Guards())
    expected = measure_slack(*arguments, stretch_ratio=stretch)
    found = compiled_steps().measure_slack(*arguments, between)
    np.testing.assert_allclose(found.least(), expected.least(), rtol=1e-9, atol=1e-12)
    assert found.lost_requests_count == expected.lost_requests_count
    assert set(found.slos) == set(expected.slos)


@QUIETLY
@given(
    running=_running,
    waiting=_waiting,
    work=st.booleans(),
    coming=st.booleans(),
    rate=st.floats(0.1, 30.0),
)
def test_the_lateness_is_that_of_the_definition(running, waiting, work, coming, rate):
    _, horizon = _horizon(running, waiting)
    if horizon.empty:
        return
    latency = PREDICTOR.predict(horizon.shapes).latency_seconds
    between = _interruptions(rate)
    seen = PromptWork(
        np.log(WINDOWS),
        1.0 - np.exp(-rate * WINDOWS),
        np.log(300.0 * np.maximum(rate * WINDOWS, 1.0)),
        np.log(400.0**2 * np.maximum(rate * WINDOWS, 1.0)),
    )
    newcomers = Newcomers(BELIEFS.everyone, 0.05, rate) if coming else None
    ends = np.cumsum(horizon.iterations)
    after = np.maximum(ends - horizon.iterations_at(horizon.first_tokens)[:, None], 0.0)
    before = np.broadcast_to(ends, (len(horizon.decodes), len(ends)))
    common = {"now_seconds": 5.0, "newcomers": newcomers, "clocks": (10, CLOCKS - 1)}
    expected = expect_lateness(
        horizon,
        latency,
        1.1 * latency,
        ending=EndingShares(
            BELIEFS.ending_shares(_lengths(horizon.decodes), before),
            BELIEFS.ending_shares(_lengths(horizon.prompts, 1.0), after),
        ),
        delay=PromptDelay(
            seen if work else None, between.prompt_token_seconds(horizon.shapes[:, 3])
        ),
        **common,
    )
    found = compiled_steps().expect_lateness(
        horizon,
        latency,
        1.1 * latency,
        lengths=TABLE,
        interruptions=between,
        work=seen if work else None,
        **common,
    )
    assert (found is None) == (expected is None)
    if expected is None:
        return
    np.testing.assert_allclose(found.excess_ratio, expected.excess_ratio, rtol=1e-7, atol=1e-12)
    # of two answers that are equally far behind, either may be named
    if found.request_number == expected.request_number:
        np.testing.assert_allclose(
            found.request_slack_seconds, expected.request_slack_seconds, rtol=1e-9, atol=1e-12
        )


@QUIETLY
@given(running=st.lists(_row, min_size=1, max_size=10), observed=st.floats(0.5, 2.0))
def test_the_correction_is_that_of_the_definition(running, observed):
    _, horizon = _horizon(running, [])
    if horizon.empty:
        return
    prediction = PREDICTOR.predict(horizon.shapes)
    feedback = PredictionFeedback(0.01)
    for mixed in (False, True):
        feedback.learn(0.01 * observed, 0.01, 0.011, mixed=mixed)
    feedback.learn_power(200.0 * observed, 200.0, 2.0)
    latency, upper, joules, seconds = compiled_steps().correct(prediction, horizon, feedback)
    expected, bound = feedback.correct(prediction, horizon.shapes[:, 1] > 0)
    np.testing.assert_allclose(latency, expected, rtol=1e-12)
    np.testing.assert_allclose(upper, bound, rtol=1e-12)
    np.testing.assert_allclose(seconds, horizon.iterations @ expected, rtol=1e-12)
    energy = horizon.iterations @ (expected * prediction.power_watts) * feedback.power_ratio
    np.testing.assert_allclose(joules, energy, rtol=1e-12)


@QUIETLY
@given(
    running=st.lists(_row, min_size=1, max_size=10),
    steps=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), min_size=10, max_size=10),
    now=st.sampled_from([math.nan, 6.0]),
)
def test_rows_advance_as_in_the_definition(running, steps, now):
    rows = np.array(_rows(running, waiting=False))
    order = np.arange(len(rows))[::-1].copy()
    computed, generated = (np.array(each[: len(rows)]) for each in zip(*steps, strict=True))
    expected, found = rows.copy(), rows.copy()
    scoreboard.advance(expected, order, computed, generated, now, 3.0)
    compiled_steps().advance(found, order, computed, generated, now, 3.0)
    np.testing.assert_array_equal(found, expected)


def test_after_the_warm_up_no_engine_waits_for_a_compiler():
    """In a process of its own: every other test here compiles too."""
    command = [sys.executable, "-c", AFTER_WARM_UP, GOLDEN]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert json.loads(done.stdout) == []


def test_compiled_and_defined_steps_decide_alike_on_the_golden_recording():
    profile = recorded_profile(read_metadata(GOLDEN), GOLDEN.name)
    decisions = [
        [
            (number, decision.target_clock_mhz, decision.reason.name.lower())
            for number, decision in replay(
                read_states(GOLDEN),
                profile,
                Controller(profile, PREDICTOR, ControlSettings(), compiled=compiled),
            )
        ]
        for compiled in (True, False)
    ]
    assert decisions[0] == decisions[1]
    golden = json.loads(GOLDEN.with_suffix(".json").read_text())
    assert [list(each) for each in decisions[0]] == golden


@QUIETLY
@given(
    tokens_per_second=st.floats(0.1, 20_000.0),
    prompts_per_second=st.floats(0.0, 40.0),
    limit=st.sampled_from([8, 64, 512]),
)
def test_the_balance_is_that_of_the_definition(tokens_per_second, prompts_per_second, limit):
    load = OfferedLoad(
        600.0 * prompts_per_second, prompts_per_second, 1.2, 0.0, tokens_per_second, 700.0
    )
    limits = CarryingLimits(float(limit), 1e6, 0.05, 1.0)
    prediction = PREDICTOR.predict(equilibrium_shapes(load, limits))
    idle = PREDICTOR.idle_power_watts
    expected = settle(load, limits, prediction, idle)
    found = settle(load, limits, prediction, idle, balanced=compiled_steps().balance)
    for field in ("power_watts", "batch_requests", "busy_ratio", "tpot_seconds"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=1e-9)


@QUIETLY
@given(
    gaps=st.lists(st.floats(0.0, 3.0), min_size=2, max_size=80),
    tokens=st.lists(st.floats(1.0, 9000.0), min_size=80, max_size=80),
    begins=st.lists(st.floats(0.0, 60.0), max_size=80),
    known=st.floats(0.0, 80.0),
)
def test_the_measured_work_is_that_of_the_definition(gaps, tokens, begins, known):
    starts = np.cumsum(gaps)
    before = np.concatenate([[0.0], np.cumsum(tokens[: len(gaps)])])
    arguments = (starts, before, np.sort(begins), np.linspace(1.0, 3.0, len(begins)), known)
    np.testing.assert_allclose(
        compiled_steps().measure_work(*arguments), measure(*arguments), rtol=1e-7, atol=1e-9
    )
