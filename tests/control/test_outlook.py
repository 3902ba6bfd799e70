"""What is settled once a second is settled piece by piece, and is what it would be at once."""

from __future__ import annotations

import numpy as np
import pytest

from tests.control.scenes import make_profile
from throttle.control.cruise import equilibrium_shapes, growth_limit_ratio, refund_watts, settle
from throttle.control.lengths import LengthCurve
from throttle.control.outlook import Outlook
from throttle.control.settings import ControlSettings
from throttle.control.state import IterationState, Phase, ScheduledRequests, Slos
from throttle.testing import FormulaPredictor

PREDICTOR = FormulaPredictor()
CLOCKS = len(PREDICTOR.clocks_mhz)
LENGTHS = LengthCurve()


def _nobody():
    return np.empty(0)


class _Engine:
    """An outlook fed with one state after the other, all alike but for their time."""

    def __init__(self, iteration_seconds):
        profile = make_profile(default_slos=Slos(ttft_seconds=1.0, tpot_seconds=0.1))
        idle = PREDICTOR.idle_power_watts
        self.outlook = Outlook(profile, ControlSettings(), idle, CLOCKS - 1)
        self._seconds = iteration_seconds
        self._count = 0
        self.now = 0.0

    def pause(self, seconds):
        self.now += seconds

    def decide(self):
        """One decision; returns how many shapes rode on it."""
        self.observe()
        return self.forecast()

    def observe(self):
        self._count += 1
        self.now += self._seconds
        prompts = self._count % 5 == 0
        self.outlook.add(
            IterationState(
                self._count,
                Phase.COMPLETED,
                self.now,
                self._seconds,
                scheduled=ScheduledRequests(
                    num_prefill_requests=int(prompts),
                    sum_prefill_tokens=700 * prompts,
                    num_decode_requests=12,
                    sum_decode_kv_tokens=9000,
                ),
            )
        )

    def ask(self):
        """One decision that fails before it has predicted; returns what it was to predict."""
        self.observe()
        return self.outlook.due_shapes(self.now, LENGTHS, _nobody)

    def forecast(self):
        shapes = self.outlook.due_shapes(self.now, LENGTHS, _nobody)
        if shapes is None:
            return 0
        self.outlook.settle(PREDICTOR.predict(shapes))
        return len(shapes)

    def settle(self):
        """Decide until there is a new equilibrium; returns the shapes that rode on each."""
        before, counts = self.outlook.equilibrium, []
        while self.outlook.equilibrium is before:
            counts.append(self.decide())
        return counts


def test_the_first_is_settled_at_once_and_those_after_it_piece_by_piece():
    engine = _Engine(0.01)
    first = engine.settle()
    assert first[-1] > 8
    assert not any(first[:-1])
    second = engine.settle()
    assert sum(second) == first[-1]
    assert max(second) <= 8
    assert engine.outlook.interruptions is not None


def test_what_comes_out_piece_by_piece_is_the_equilibrium_of_its_load():
    engine = _Engine(0.01)
    engine.settle()
    engine.settle()
    outlook = engine.outlook
    load, limits = outlook.load, outlook.limits
    prediction = PREDICTOR.predict(equilibrium_shapes(load, limits))
    resting = np.full(CLOCKS, outlook.least_resting_watts)
    expected = settle(load, limits, prediction, resting)
    np.testing.assert_array_equal(outlook.equilibrium.power_watts, expected.power_watts)
    refund = refund_watts(load, limits, prediction, expected, resting)
    assert outlook.refund_watts == refund
    growth = growth_limit_ratio(load, limits, prediction.latency_seconds[:, -1])
    assert outlook.load_headroom_ratio == growth - 1.0


def test_it_is_settled_once_a_second():
    engine = _Engine(0.01)
    engine.settle()
    begun = engine.now
    for _ in range(5):
        engine.settle()
    assert engine.now - begun == pytest.approx(5.0, abs=0.3)


def test_where_decisions_come_seldom_everything_is_settled_at_once():
    engine = _Engine(0.4)
    engine.settle()
    for _ in range(3):
        counts = engine.settle()
        assert counts[-1] > 8
        assert not any(counts[:-1])


def test_a_pause_in_the_middle_begins_it_anew_with_the_load_after_it():
    engine = _Engine(0.01)
    engine.settle()
    while not engine.decide():
        pass
    engine.pause(10.0)
    before = engine.outlook.load
    assert engine.decide() > 8
    assert engine.outlook.load is not before


def test_asking_twice_at_one_moment_goes_on_once():
    engine = _Engine(0.01)
    engine.settle()
    while not engine.decide():
        pass
    assert engine.forecast() == 0


def test_shapes_whose_prediction_failed_are_asked_for_again():
    engine = _Engine(0.01)
    engine.settle()
    while (wanted := engine.ask()) is None:
        pass
    again = engine.ask()
    np.testing.assert_array_equal(again, wanted)


def test_a_prediction_that_nobody_asked_for_is_refused():
    with pytest.raises(RuntimeError, match="nothing is due"):
        _Engine(0.01).outlook.settle(PREDICTOR.predict(np.ones((1, 7))))
