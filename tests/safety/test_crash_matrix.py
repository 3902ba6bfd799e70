"""Whatever is killed, GPUs go back to default clocks. `make test-safety` prints the table."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.processes import kill_all, wait_until_gone
from tests.safety.conftest import say_set

#: Promised; the machine of the tests may be busy with other things, so the quick run allows more.
PROMISED_SECONDS = 1.0
ALLOWED_SECONDS = PROMISED_SECONDS if os.environ.get("TEST_SAFETY") else 10.0
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
@pytest.mark.parametrize(
    "step",
    [pytest.param(each, marks=() if each == "after_set" else pytest.mark.slow) for each in STEPS],
)
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


def test_an_actuator_that_stands_still_is_killed_and_the_gpus_return(world, record_property):
    process, parts = world.started_and_set()
    stopped = time.monotonic()
    os.kill(parts["actuator"], signal.SIGSTOP)
    # silence is allowed for the lease, and for two seconds at least
    seconds = world.default_within(ALLOWED_SECONDS + 2.5, stopped)
    record_property("default_seconds", seconds)
    assert process.wait(DEADLINE_SECONDS) != 0
    for each in parts.values():
        wait_until_gone(each)
    assert world.left_slow() == []
    assert "actuator_killed" in process.stderr.read()


def test_an_actuator_that_stands_still_while_the_daemon_stops_is_killed_too(simulated_world):
    world = simulated_world
    process, parts = world.started_and_set()
    os.kill(parts["actuator"], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    world.default_within(DEADLINE_SECONDS)
    assert process.wait(DEADLINE_SECONDS) != 0
    wait_until_gone(parts["actuator"])
    assert world.left_slow() == []


def test_as_process_1_of_a_container_it_obeys_sigterm_and_returns_the_gpus(simulated_world):
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a process namespace takes root and unshare")
    script = Path(__file__).with_name("small_daemon.py")
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, str(script)]
    process = subprocess.Popen(
        [*command, simulated_world.orders().to_json(), '""'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    simulated_world.started.append(process)
    assert process.stdout.readline() == "claimed\n"
    say_set(process)
    process.stdout.readline()
    assert simulated_world.all_slow()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)  # process 1 in there
    simulated_world.default_within(ALLOWED_SECONDS)
    assert process.wait(DEADLINE_SECONDS) == 0
