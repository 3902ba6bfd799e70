"""When an actuator has been silent for too long."""

from __future__ import annotations

from throttle.actuation.supervisor import Silence


def first_alarm(looks, limit_seconds=2.0):
    """When the alarm is given first; looks are a time and whether there was a beat."""
    silence = Silence(limit_seconds)
    return next((now for now, beat in looks if silence.too_long(now, beat=beat)), None)


def test_a_pulse_that_stops_is_noticed_at_the_limit():
    looks = [(0.0, True), *((0.25 * count, False) for count in range(1, 40))]
    assert first_alarm(looks) == 2.25


def test_a_beat_now_and_then_is_enough():
    assert first_alarm([(0.25 * count, count % 8 == 0) for count in range(400)]) is None


def test_nothing_is_judged_before_the_first_beat():
    """Until then the process opens its driver, which may take long, and holds no lease."""
    assert first_alarm([(0.25 * count, False) for count in range(400)]) is None


def test_a_listener_that_stood_still_itself_judges_nothing_by_that_time():
    """As when a whole container is paused."""
    assert first_alarm([(0.0, True), (100.0, False), (100.25, False), (100.3, True)]) is None


def test_the_alarm_is_given_once():
    silence = Silence(1.0)
    silence.too_long(0.0, beat=True)
    alarms = [silence.too_long(0.25 * count, beat=False) for count in range(1, 100)]
    assert sum(alarms) == 1
