"""Whatever is killed, GPUs go back to default clocks. `make test-safety` prints the table."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.integration.processes import kill_all, wait_until_gone
from tests.safety.conftest import say_set

#: Promised; the machine of the tests may be busy with other things, so the quick run allows more.
PROMISED_SECONDS = 1.0
ALLOWED_SECONDS = PROMISED_SECONDS if os.environ.get("THROTTLE_TEST_SAFETY") else 10.0
DEADLINE_SECONDS = 60.0

STEPS = ("before_intent", "after_intent", "after_set", "before_mark", "after_mark")


@pytest.mark.parametrize("part", ["controller", "actuator", "supervisor"])
def test_killing_one_process_returns_the_gpus(world, record_property, part):
    process, parts = world.started_and_set()
    killed = time.monotonic()
    os.kill(parts[part], signal.SIGKILL)
    record_property("default_seconds", world.default_within(ALLOWED_SECONDS, killed))
    process.wait(DEADLINE_SECONDS)
    assert process.returncode != 0
    for each in parts.values():
        wait_until_gone(each)
    assert world.left_slow() == []


@pytest.mark.parametrize("step", STEPS)
def test_the_actuator_dies_at_a_step_of_its_journal(world, record_property, step):
    process, parts = world.started_and_claimed(step)
    asked = time.monotonic()
    say_set(process)
    wait_until_gone(parts["actuator"])
    record_property("default_seconds", world.default_within(ALLOWED_SECONDS, asked))
    assert process.wait(DEADLINE_SECONDS) != 0
    assert not any(world.locks().values())
    assert world.left_slow() == []


@pytest.mark.parametrize("way", ["next_start", "reset"])
@pytest.mark.parametrize("step", STEPS)
def test_all_die_with_the_actuator_at_a_step_of_its_journal(world, record_property, step, way):
    process, parts = world.started_and_claimed(step)
    os.kill(parts["supervisor"], signal.SIGSTOP)  # or it would have the GPUs reset
    say_set(process)
    wait_until_gone(parts["actuator"])
    kill_all([parts["supervisor"], parts["controller"]])
    process.wait(DEADLINE_SECONDS)
    slowed = step not in {"before_intent", "after_intent"}
    assert any(world.locks().values()) is slowed  # a lock outlives them all, as on a real driver
    assert bool(world.left_slow()) is (step != "before_intent")
    started = time.monotonic()
    if way == "reset":
        result = world.throttle("reset")
        assert result.returncode == 0, result.stderr
    else:
        world.started_and_claimed()
    assert not any(world.locks().values())
    record_property("default_seconds", time.monotonic() - started)


def test_all_three_die_at_once_and_the_next_start_returns_the_gpus(world, record_property):
    process, parts = world.started_and_set()
    kill_all(parts.values())
    process.wait(DEADLINE_SECONDS)
    assert world.all_slow()
    assert world.left_slow() == ["GPU-0", "GPU-1"]
    started = time.monotonic()
    world.started_and_claimed()
    assert not any(world.locks().values())
    record_property("default_seconds", time.monotonic() - started)


def test_all_three_die_at_once_and_reset_returns_the_gpus_without_a_daemon(world, record_property):
    process, parts = world.started_and_set()
    kill_all(parts.values())
    process.wait(DEADLINE_SECONDS)
    started = time.monotonic()
    result = world.throttle("reset", "--all-configured")
    record_property("default_seconds", time.monotonic() - started)
    assert (result.returncode, result.stdout) == (
        0, "GPU-0: default clocks\nGPU-1: default clocks\n",
    ), result.stderr  # fmt: skip
    assert not any(world.locks().values())


def test_a_terminated_daemon_returns_the_gpus_and_ends_with_0(world, record_property):
    process, _ = world.started_and_set()
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    record_property("default_seconds", world.default_within(ALLOWED_SECONDS, asked))
    assert process.wait(DEADLINE_SECONDS) == 0, process.stderr.read()
    assert world.left_slow() == []


def test_a_terminated_actuator_returns_the_gpus_and_takes_the_daemon_down(world, record_property):
    process, parts = world.started_and_set()
    asked = time.monotonic()
    os.kill(parts["actuator"], signal.SIGTERM)
    record_property("default_seconds", world.default_within(ALLOWED_SECONDS, asked))
    assert process.wait(DEADLINE_SECONDS) != 0


def test_a_controller_that_stands_still_loses_its_lease(world, record_property):
    process, parts = world.started_and_set()
    stopped = time.monotonic()
    os.kill(parts["controller"], signal.SIGSTOP)
    # the lease of these tests is one second
    seconds = world.default_within(ALLOWED_SECONDS + 1.0, stopped)
    record_property("default_seconds", seconds)
    os.kill(parts["controller"], signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_SECONDS) == 0
