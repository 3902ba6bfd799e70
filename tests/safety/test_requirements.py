"""The requirements of docs/safety.md, R1 to R15, by number."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.processes import wait_until_gone
from tests.safety.conftest import say_set
from throttle.actuation.fake_nvml.machine import Permission, WriteKind
from throttle.actuation.journal import GpuRecord
from throttle.actuation.messages import REPLY_BYTES, Ask, Reply, Request, Say, Status

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 60.0
CAP_SYS_ADMIN = 21


class Client:
    """A controller, packet by packet."""

    def __init__(self, channel):
        self.channel = channel
        self.number = 0
        self.gpu_replies = []
        self.ended = {}
        assert self.next().kind is Say.READY

    def next(self):
        packet = self.channel.recv(REPLY_BYTES + 1)
        return Reply.unpack(packet) if packet else None

    def ask(self, kind, **fields):
        """Send a request and wait for its answer; what else is said is kept."""
        self.number += 1
        self.channel.send(Request(kind, self.number, **fields).pack())
        return self.until(lambda each: each.kind is Say.ANSWER and each.number == self.number)

    def until(self, wanted):
        while True:
            reply = self.next()
            assert reply is not None, "the actuator has ended"
            if reply.kind is Say.GPU:
                self.gpu_replies.append(reply)
            elif reply.kind is Say.ENDED:
                self.ended[reply.epoch] = reply.text
            if wanted(reply):
                return reply

    def renew(self):
        self.channel.send(Request(Ask.RENEW).pack())

    def claim(self, gpus=0b11, owner="engine"):
        answer = self.ask(Ask.CLAIM, gpus=gpus, owner=owner)
        assert answer.status is Status.DONE, answer.text
        return answer.epoch

    def set(self, epoch, clock_mhz, why="test"):
        return self.ask(Ask.SET, epoch=epoch, clock_mhz=clock_mhz, why=why)


def client_of(world, **changes):
    process, channel = world.start_actuator(**changes)
    try:
        return process, Client(channel)
    except AttributeError:
        pytest.fail(process.stderr.read())


def wait_for(condition, what):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def ended(process):
    """What a process that has ended wrote to standard error."""
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    return errors


def test_r01_a_gpu_that_is_not_configured_is_never_written(nvml_world):
    process, client = client_of(nvml_world, gpus=("GPU-0",))
    answer = client.ask(Ask.CLAIM, gpus=0b10, owner="engine")
    assert answer.status is Status.INVALID
    epoch = client.claim(0b1)
    assert client.set(epoch, 600).clock_mhz == 600
    client.ask(Ask.RESET_ALL)
    client.channel.close()
    assert process.wait(DEADLINE_SECONDS) == 0
    assert {write.gpu_uuid for write in nvml_world.machine.writes()} == {"GPU-0"}


def test_r01_a_gpu_in_mig_mode_is_observed_only(nvml_world):
    nvml_world.machine.gpu("GPU-1").set_mig(enabled=True)
    process, client = client_of(nvml_world)
    answer = client.ask(Ask.CLAIM, gpus=0b11, owner="engine")
    assert answer.status is Status.FAILED
    assert "GPU-1 is in MIG mode" in answer.text
    assert client.set(client.claim(0b01), 600).clock_mhz == 600
    client.channel.close()
    assert process.wait(DEADLINE_SECONDS) == 0
    assert {write.gpu_uuid for write in nvml_world.machine.writes()} == {"GPU-0"}


def test_r02_a_gpu_has_one_owner_and_an_engine_gets_all_its_gpus_or_none(simulated_world):
    _, client = client_of(simulated_world)
    first = client.claim(0b10, "first")
    refused = client.ask(Ask.CLAIM, gpus=0b11, owner="second")
    assert (refused.status, "GPU-1 is held by 'first'" in refused.text) == (Status.CONFLICT, True)
    client.claim(0b01, "third")  # GPU-0 was not taken by the refused claim
    client.ask(Ask.RELEASE, epoch=first)
    stale = client.set(first, 600)
    assert stale.status is Status.CONFLICT


def test_r02_a_second_daemon_is_refused_with_the_holders_name(world):
    world.started_and_claimed()
    second = world.start()
    assert "throttle: GPU GPU-0 is held by the daemon of a test; stop it" in ended(second)
    assert second.returncode == 1
    assert not any(world.locks().values())


def test_r02_reset_leaves_a_gpu_alone_that_a_daemon_holds(simulated_world):
    simulated_world.started_and_set()
    result = simulated_world.throttle("reset", "--all-configured")
    assert result.returncode == 1
    assert "GPU GPU-0 is held by the daemon of a test" in result.stderr
    assert simulated_world.all_slow()


def test_r03_a_lease_that_is_not_renewed_ends_at_default_clocks(simulated_world):
    _, client = client_of(simulated_world)
    epoch = client.claim()
    client.set(epoch, 600)
    assert simulated_world.all_slow()
    client.until(lambda each: each.kind is Say.ENDED and each.epoch == epoch)
    simulated_world.default_within(DEADLINE_SECONDS)
    assert client.ended == {epoch: "expired"}
    assert client.set(epoch, 600).status is Status.CONFLICT


def test_r03_the_end_of_the_channel_ends_every_lease_at_once(simulated_world):
    process, client = client_of(simulated_world, lease_seconds=60.0)
    client.set(client.claim(), 600)
    client.channel.close()
    simulated_world.default_within(DEADLINE_SECONDS)
    assert process.wait(DEADLINE_SECONDS) == 0


def test_r04_the_intent_is_on_disk_before_the_clock_is_set(tmp_path, monkeypatch):
    happened = []
    written, synced = os.pwrite, os.fsync
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: (happened.append(json.loads(data)["state"]),
                                            written(fd, data, at))[1]
    )  # fmt: skip
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append("fsync"), synced(fd))[1])
    record = GpuRecord(tmp_path, "GPU-0", "test")
    happened.clear()
    record.intend(600)
    assert happened == ["intent", "fsync"]


@pytest.mark.parametrize("step", ["after_intent", "after_set"])
def test_r04_a_start_resets_what_any_daemon_has_left_behind(simulated_world, step):
    """Even a GPU that is not configured any more."""
    process, parts = simulated_world.started_and_claimed(step)
    os.kill(parts["supervisor"], signal.SIGSTOP)
    say_set(process)
    wait_until_gone(parts["actuator"])
    for each in (parts["supervisor"], parts["controller"]):
        os.kill(each, signal.SIGKILL)
    process.wait(DEADLINE_SECONDS)
    left = simulated_world.left_slow()
    assert left
    others = tuple({"GPU-0", "GPU-1"} - {left[0]})
    client_of(simulated_world, gpus=others)
    assert not any(simulated_world.locks().values())
    assert simulated_world.left_slow() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_r05_a_signal_ends_the_actuator_at_default_clocks(simulated_world, number):
    process, client = client_of(simulated_world, lease_seconds=60.0)
    client.set(client.claim(), 600)
    process.send_signal(number)
    assert client.until(lambda each: each.kind is Say.GOODBYE).flags == 1
    assert process.wait(DEADLINE_SECONDS) == 0
    assert not any(simulated_world.locks().values())


@pytest.mark.parametrize(
    ("asked", "set_mhz"), [(1, 510), (509, 510), (899, 885), (1000, 990), (5000, 990), (0, 0)]
)
def test_r06_clocks_are_clamped_and_snapped_down(nvml_world, asked, set_mhz):
    _, client = client_of(
        nvml_world, floor_clock_mhz=510, ceiling_clock_mhz=1000, lowering_interval_seconds=0.0
    )
    epoch = client.claim()
    client.set(epoch, 750)
    assert client.set(epoch, asked).clock_mhz == set_mhz
    assert set(nvml_world.locks().values()) == {set_mhz}
    locks = [each for each in nvml_world.machine.writes() if each.kind is WriteKind.LOCK]
    assert {each.minimum for each in locks} == {345}  # the hardware's: only a maximum is set


def test_r07_lowering_is_paced_and_raising_and_resetting_are_not(simulated_world):
    _, client = client_of(simulated_world, lowering_interval_seconds=30.0)
    epoch = client.claim()
    assert client.set(epoch, 900).status is Status.DONE
    held = client.set(epoch, 600)
    assert (held.status, held.clock_mhz) == (Status.HELD, 900)
    assert set(simulated_world.locks().values()) == {900}
    assert client.set(epoch, 1980).clock_mhz == 1980
    assert client.set(epoch, 0).clock_mhz == 0
    assert not any(simulated_world.locks().values())
    writes = simulated_world.machine.read_write_count("GPU-0")
    client.set(epoch, 0)
    assert simulated_world.machine.read_write_count("GPU-0") == writes  # nothing to change


def test_r08_a_lock_lost_to_another_agent_is_set_again_then_given_up_and_counted(nvml_world):
    _, client = client_of(nvml_world, settle_seconds=0.1, lease_seconds=60.0)
    for uuid in ("GPU-0", "GPU-1"):
        nvml_world.machine.gpu(uuid).set_load(1.0)
    client.set(client.claim(0b01), 600)
    gpu = nvml_world.machine.gpu("GPU-0")
    seen = 0

    def fight():
        nonlocal seen
        gpu.lock_as_another_agent(345, 1980)
        reply = client.until(lambda each: each.kind is Say.GPU and each.count > seen)
        seen = reply.count
        return seen

    assert [fight(), fight(), fight()] == [1, 2, 3]
    wait_for(lambda: gpu.lock_mhz is None, "the GPU is not given up")
    held = client.set(1, 600)
    assert (held.status, held.clock_mhz) == (Status.HELD, 0)


def test_r09_a_call_that_hangs_holds_up_no_other_gpu_and_is_undone_when_it_returns(nvml_world):
    _, client = client_of(nvml_world, lease_seconds=60.0, call_deadline_seconds=0.2)
    hung, other = client.claim(0b01, "hung"), client.claim(0b10, "other")
    fault = nvml_world.machine.inject("nvmlDeviceSetGpuLockedClocks", gpu_uuid="GPU-0", hang=True)
    client.channel.send(Request(Ask.SET, 1000, epoch=hung, clock_mhz=600).pack())
    client.number = 1000
    started = time.monotonic()
    assert client.set(other, 600).clock_mhz == 600
    assert time.monotonic() - started < 5.0
    client.until(lambda each: each.kind is Say.GPU and each.gpu == 0 and each.flags)
    assert "has been hanging" in client.gpu_replies[-1].text
    assert client.ended == {hung: "hung_call"}
    refused = client.ask(Ask.CLAIM, gpus=0b01, owner="again")
    assert refused.status is Status.FAILED
    assert client.set(other, 900).clock_mhz == 900
    fault.remove()
    client.until(lambda each: each.kind is Say.GPU and each.gpu == 0 and not each.flags)
    wait_for(lambda: nvml_world.locks()["GPU-0"] == 0, "the late set was not undone")
    assert client.claim(0b01, "again")


def test_r10_without_permission_gpus_are_observed_and_the_remedy_is_named(nvml_world):
    nvml_world.machine.allow_writes(Permission.NOBODY)
    process, client = client_of(nvml_world)
    refused = client.ask(Ask.CLAIM, gpus=0b01, owner="engine")
    assert refused.status is Status.FAILED
    assert "CAP_SYS_ADMIN" in refused.text
    client.channel.close()
    process.wait(DEADLINE_SECONDS)


def test_r10_a_gpu_that_is_lost_takes_its_engine_to_default_and_is_not_tried_soon(nvml_world):
    _, client = client_of(nvml_world, lease_seconds=60.0, lowering_interval_seconds=0.0)
    epoch = client.claim()
    client.set(epoch, 900)
    nvml_world.machine.gpu("GPU-0").lose()
    answer = client.set(epoch, 600)
    assert answer.status is Status.FAILED
    wait_for(lambda: nvml_world.locks()["GPU-1"] == 0, "one GPU of a group serves nobody")
    writes = len([each for each in nvml_world.machine.writes() if each.gpu_uuid == "GPU-0"])
    for _ in range(20):
        assert client.set(epoch, 600).status is Status.FAILED
    tried = [each for each in nvml_world.machine.writes() if each.gpu_uuid == "GPU-0"]
    assert len(tried) == writes


def test_r11_the_kill_switch_holds_every_gpu_at_default_clocks(simulated_world):
    _, client = client_of(simulated_world, lease_seconds=60.0, lowering_interval_seconds=0.0)
    epoch = client.claim()
    client.set(epoch, 600)
    switch = simulated_world.directory / "default-clocks"
    switch.touch()
    simulated_world.default_within(DEADLINE_SECONDS)
    held = client.set(epoch, 600)
    assert (held.status, held.clock_mhz) == (Status.HELD, 0)
    switch.unlink()
    assert client.set(epoch, 600).clock_mhz == 600


def test_r13_every_write_is_one_line_that_says_who_what_and_why(simulated_world):
    process, client = client_of(simulated_world)
    client.set(client.claim(0b01, "an-engine"), 600, "cruise")
    client.channel.close()
    lines = [json.loads(line) for line in ended(process).splitlines()]
    writes = [line for line in lines if line["event"] == "clock_written"]
    (told,) = (line for line in writes if line["to_mhz"] == 600)
    assert {name: told[name] for name in ("owner", "gpu_uuid", "from_mhz", "why", "problem")} == {
        "owner": "an-engine",
        "gpu_uuid": "GPU-0",
        "from_mhz": 0,
        "why": "cruise",
        "problem": "",
    }
    assert told["duration_seconds"] >= 0
    assert len(writes) == simulated_world.machine.read_write_count(
        "GPU-0"
    ) + simulated_world.machine.read_write_count("GPU-1")


def status_of(process):
    text = Path(f"/proc/{process}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def test_r14_the_controller_has_no_capabilities_and_the_actuator_has_one(simulated_world):
    if os.getuid() != 0:
        pytest.skip("capabilities are given up by root")
    _, parts = simulated_world.started_and_claimed()
    controller, actuator = status_of(parts["controller"]), status_of(parts["actuator"])
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(controller[name], 16) == 0, name
        assert int(actuator[name], 16) & ~(1 << CAP_SYS_ADMIN) == 0, name
    assert int(actuator["CapEff"], 16) == 1 << CAP_SYS_ADMIN
    assert controller["NoNewPrivs"] == actuator["NoNewPrivs"] == "1"


def test_r14_the_actuator_has_no_network(simulated_world):
    if os.getuid() != 0:
        pytest.skip("leaving the network takes CAP_SYS_ADMIN")
    _, parts = simulated_world.started_and_claimed()
    ours = Path("/proc/self/ns/net").readlink()
    assert Path(f"/proc/{parts['controller']}/ns/net").readlink() == ours
    assert Path(f"/proc/{parts['actuator']}/ns/net").readlink() != ours


def test_r14_a_channel_that_the_parent_has_not_made_is_refused(simulated_world):
    """A path that anybody could connect to is no channel; neither is another's socket pair."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        orders = simulated_world.orders()
        text = json.dumps(json.loads(orders.to_json()) | {
            "channel": theirs.fileno(), "parent": os.getpid(),
        })  # fmt: skip
        process = simulated_world.start_command(
            ["-I", "-m", "throttle.actuation.process", text], pass_fds=[theirs.fileno()]
        )
        assert "allowed: a Unix socket of packets" in ended(process)
    assert simulated_world.machine.read_write_count("GPU-0") == 0


#: Code of the privileged process, the driver's binding left out: what it may grow to unnoticed.
CODE_LINES_LIMIT = 1650


def modules_of(code, environment=()):
    """Modules loaded by a fresh interpreter after some code."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code + "\nimport sys; print(*sorted(sys.modules))"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **dict(environment)},
    )
    return set(done.stdout.split())


def test_r14_the_actuator_is_small_and_imports_nothing_but_the_standard_library(
    nvml_world, record_property
):
    """Its driver opened, as on a machine with NVIDIA GPUs: that is where it is privileged."""
    code = "from throttle.actuation.process import make_clock_driver; make_clock_driver('nvml')"
    loaded = modules_of(code, nvml_world.environment) - modules_of("pass")
    tops = {name.split(".")[0] for name in loaded}
    assert tops - set(sys.stdlib_module_names) == {"throttle", "pynvml"}
    ours = sorted(name for name in loaded if name.split(".")[0] == "throttle")
    assert "throttle.actuation.nvml" not in ours  # readings of power and energy
    lines = sum(code_lines(module) for module in ours)
    record_property("code_lines", lines)
    assert lines < CODE_LINES_LIMIT


def code_lines(module):
    """Lines that hold code: no blank ones, comments or docstrings."""
    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return len({
        line
        for node in ast.walk(tree)
        if hasattr(node, "lineno")
        for line in (node.lineno, node.end_lineno)
    })  # fmt: skip


def test_r15_every_requirement_has_a_test_by_its_name():
    names = set(re.findall(r"def test_(r\d\d)_", Path(__file__).read_text()))
    breaker = (ROOT / "tests/daemon/test_breaker.py").read_text()
    names |= set(re.findall(r"def test_(r12)_", breaker))
    assert names == {f"r{number:02}" for number in range(1, 16)}
