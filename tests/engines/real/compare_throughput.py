"""What an adapter costs a real vLLM: runs with and without it by turns, as ratios.

    python -m tests.engines.real.compare_throughput [--adapter scheduler] [--rounds 2] [--pairs 12]

With `--adapter none` neither server has one: what two servers that do the same differ by.

Each round starts two servers on a tiny random Qwen3-MoE, one of them with the adapter and a daemon
to report to, and gives the same load to both by turns: 256 requests at once, which all run
together. Three figures come of each pair: tokens per second; processor time per token of every
process of the engine; and that of its loop alone, the threads that schedule and compute, for which
tokens wait. The last two bear other programs on the machine, the first does not. The engine is
pinned to one core, daemon and load to the others: with all of its work, the model's too, on one
core, whatever an adapter computes is felt. With `--spare-core` the process that sends for the
adapter has the other cores, as where the engine does not fill its host; `--free` lets the engine
have every core, `--layers` makes the model's part larger.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.engines.real.processes import GPU_UUID, Daemon, VllmServer, make_model, until
from tests.engines.real.test_vllm import ADAPTERS

RUNNING_COUNT = 256
PROMPT_TOKENS = 32
CORES = sorted(os.sched_getaffinity(0))
OTHER_CORES = set(CORES[1:]) or set(CORES)
NO_ADAPTER = "none"
#: vLLM's names of the processes whose main threads schedule and compute.
LOOPS = ("VLLM::EngineCor", "VLLM::Worker")
FIGURES = ("tokens per second", "processor time per token", "of the engine's loop alone")


def start(folder, options, *arguments, **environment):
    folder.mkdir()
    # what is started inherits it
    os.sched_setaffinity(0, set(CORES) if options.free else set(CORES[:1]))
    try:
        return VllmServer(
            folder, make_model(folder / "model", "qwen3-moe", num_hidden_layers=options.layers),
            "--max-num-seqs", RUNNING_COUNT, "--max-num-batched-tokens", 8192,
            "--kv-cache-memory-bytes", 128 * 1024**2, "--no-enable-prefix-caching",
            *arguments, VLLM_LOGGING_LEVEL="WARNING", **environment,
        )  # fmt: skip
    finally:
        os.sched_setaffinity(0, OTHER_CORES)


def processes(pid):
    """A process and all below it, as they are found."""
    below = [pid]
    for each in below:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                below += map(int, (task / "children").read_text().split())
    return below


def move_sender(server):
    """Let the process that sends for the adapter, and none else of the engine, leave its core."""
    senders = [
        each
        for each in processes(server.process.popen.pid)
        if b"throttle.engines.sender" in Path(f"/proc/{each}/cmdline").read_bytes()
    ]
    assert len(senders) == 1, f"{len(senders)} senders"
    for task in Path(f"/proc/{senders[0]}/task").iterdir():
        os.sched_setaffinity(int(task.name), OTHER_CORES)


def processor_seconds(pid):
    """User and system time of a process and all below it that lives: of all, and of the loop."""
    every = loop = 0.0
    for each in processes(pid):
        with contextlib.suppress(OSError):
            every += _seconds(Path(f"/proc/{each}/stat"))
            if Path(f"/proc/{each}/comm").read_text().startswith(LOOPS):
                loop += _seconds(Path(f"/proc/{each}/task/{each}/stat"))
    return every, loop


def _seconds(stat):
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def play(server, output_tokens, draw):
    """Give the load once; returns `FIGURES`."""
    prompts = [
        " ".join(f"w{draw.randrange(3, 512)}" for _ in range(PROMPT_TOKENS))
        for _ in range(RUNNING_COUNT)
    ]
    body = {"model": "tiny", "prompt": prompts, "max_tokens": output_tokens, "ignore_eos": True}
    request = urllib.request.Request(
        server.url + "/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    before, started = processor_seconds(server.process.popen.pid), time.monotonic()
    with urllib.request.urlopen(request, timeout=600.0) as answer:
        tokens = json.loads(answer.read())["usage"]["completion_tokens"]
    seconds = time.monotonic() - started
    assert tokens == RUNNING_COUNT * output_tokens
    after = processor_seconds(server.process.popen.pid)
    every, loop = ((last - first) / tokens for first, last in zip(before, after, strict=True))
    assert loop > 0, "no process has the name of vLLM's loops"
    return tokens / seconds, every, loop


def one_round(folder, arguments, draw):
    """Pairs on two fresh servers; yields the figures without and with."""
    folder.mkdir()
    (folder / "daemon").mkdir()
    daemon = Daemon(folder / "daemon")
    with contextlib.ExitStack() as stack:
        stack.callback(daemon.stop)
        daemon.start()
        adapted = arguments.adapter != NO_ADAPTER
        environment = {
            "THROTTLE_ADDRESS": daemon.target, "THROTTLE_ENGINE_GPUS": GPU_UUID,
            "THROTTLE_ENGINE_MODE": "act", "THROTTLE_ENGINE_TPOT_SECONDS": "0.2",
        }  # fmt: skip
        servers = {
            "without": start(folder / "without", arguments),
            "with": start(folder / "with", arguments, *ADAPTERS[arguments.adapter], **environment)
            if adapted
            else start(folder / "with", arguments),
        }
        for server in servers.values():
            stack.callback(server.stop)
        for server in servers.values():
            server.wait()
            play(server, arguments.tokens, draw)
        if adapted:
            until(daemon.engine_status, "registration", 30.0)
        if adapted and arguments.spare_core:
            move_sender(servers["with"])
        for number in range(arguments.pairs):
            order = ("without", "with") if number % 2 else ("with", "without")
            found = {name: play(servers[name], arguments.tokens, draw) for name in order}
            yield found["without"], found["with"]
        if not adapted:
            return
        # an adapter that fails is left out by the engine, and would cost nothing
        assert daemon.engine_status().states_count >= arguments.pairs * arguments.tokens
        assert "throttle adapter failed" not in servers["with"].process.text()


def balanced(ratios):
    """Geometric means of two successive pairs each, whose orders are opposite.

    A server that has just played is several per cent faster than one that has waited, so that one
    pair alone tells its order.
    """
    return [
        [math.sqrt(first * second) for first, second in zip(*two, strict=True)]
        for two in zip(ratios[::2], ratios[1::2], strict=False)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    adapters = [*ADAPTERS, NO_ADAPTER]
    parser.add_argument("--adapter", choices=adapters, default="stat_logger")
    parser.add_argument("--rounds", type=int, default=2, help="fresh servers each")
    parser.add_argument("--pairs", type=int, default=12, help="in a round, even")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    parser.add_argument("--spare-core", action="store_true", help="the sender has other cores")
    parser.add_argument("--free", action="store_true", help="do not pin the engine to one core")
    arguments = parser.parse_args()
    draw = random.Random(1)
    plain, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for without, throttled in one_round(Path(folder) / str(number), arguments, draw):
                plain.append(without)
                ratios.append([b / a for a, b in zip(without, throttled, strict=True)])
                print("   ".join(f"{ratio:.3f}" for ratio in ratios[-1]), flush=True)
    speed, every, loop = (statistics.median(column) for column in zip(*plain, strict=True))
    print(
        f"\n{arguments.adapter}, {len(ratios)} pairs, {RUNNING_COUNT} running requests, "
        f"{arguments.layers} layers{', not pinned' if arguments.free else ''}"
        f"{', the sender on another core' if arguments.spare_core else ''}; without: "
        f"{speed:.0f} tokens per second, {1e6 * every:.1f} us of processor time per token, "
        f"{1e6 * loop:.1f} us of it in the loop"
    )
    for name, column in zip(FIGURES, zip(*balanced(ratios), strict=True), strict=True):
        low, middle, high = statistics.quantiles(column, n=4)
        print(f"{name}, with to without: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {len(CORES)} cores")


if __name__ == "__main__":
    main()
