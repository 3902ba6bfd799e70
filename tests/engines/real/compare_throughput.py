"""What an adapter costs a real vLLM: runs with and without it by turns, as ratios.

    python -m tests.engines.real.compare_throughput [--adapter scheduler] [--rounds 2] [--pairs 12]

Each round starts two servers on a tiny random Qwen3-MoE, one of them with the adapter and a daemon
to report to, and gives the same load to both by turns: 256 requests at once, which all run
together. Two figures come of each pair: tokens per second, and processor time per token of every
process of the engine. The engine is pinned to one core, daemon and load to the others: with all of
its work, the model's too, on one core, whatever an adapter computes is felt. `--free` lets the
engine have every core, `--layers` makes the model's part larger.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
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


def processor_seconds(pid):
    """User and system time of a process and of everything below it that lives."""
    ticks, below = 0, [pid]
    for each in below:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            for task in Path(f"/proc/{each}/task").iterdir():
                below += map(int, (task / "children").read_text().split())
    return ticks / os.sysconf("SC_CLK_TCK")


def play(server, output_tokens, draw):
    """Give the load once; returns tokens per second and processor seconds per token."""
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
    return tokens / seconds, (processor_seconds(server.process.popen.pid) - before) / tokens


def one_round(folder, arguments, draw):
    """Pairs on two fresh servers; yields ratios of both figures, and the figures without."""
    folder.mkdir()
    (folder / "daemon").mkdir()
    daemon = Daemon(folder / "daemon")
    with contextlib.ExitStack() as stack:
        stack.callback(daemon.stop)
        daemon.start()
        servers = {
            "without": start(folder / "without", arguments),
            "with": start(
                folder / "with", arguments, *ADAPTERS[arguments.adapter],
                THROTTLE_ADDRESS=daemon.target, THROTTLE_ENGINE_GPUS=GPU_UUID,
                THROTTLE_ENGINE_MODE="act", THROTTLE_ENGINE_TPOT_SECONDS="0.2",
            ),
        }  # fmt: skip
        for server in servers.values():
            stack.callback(server.stop)
        for server in servers.values():
            server.wait()
            play(server, arguments.tokens, draw)
        until(daemon.engine_status, "registration", 30.0)
        for number in range(arguments.pairs):
            order = ("without", "with") if number % 2 else ("with", "without")
            found = {name: play(servers[name], arguments.tokens, draw) for name in order}
            without, throttled = found["without"], found["with"]
            yield throttled[0] / without[0], throttled[1] / without[1], without
        # an adapter that fails is left out by the engine, and would cost nothing
        assert daemon.engine_status().states_count >= arguments.pairs * arguments.tokens
        assert "throttle adapter failed" not in servers["with"].process.text()


def quartiles(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", choices=ADAPTERS, default="stat_logger")
    parser.add_argument("--rounds", type=int, default=2, help="fresh servers each")
    parser.add_argument("--pairs", type=int, default=12, help="in a round")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    parser.add_argument("--free", action="store_true", help="do not pin the engine to one core")
    arguments = parser.parse_args()
    draw = random.Random(1)
    speeds, costs, plain = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for speed, cost, without in one_round(Path(folder) / str(number), arguments, draw):
                speeds.append(speed)
                costs.append(cost)
                plain.append(without)
                print(f"tokens per second {speed:.3f}, processor time per token {cost:.3f}")
                sys.stdout.flush()
    print(
        f"\n{arguments.adapter}, {len(speeds)} pairs, {RUNNING_COUNT} running requests, "
        f"{arguments.layers} layers{', not pinned' if arguments.free else ''}; without: "
        f"{statistics.median(speed for speed, _ in plain):.0f} tokens per second, "
        f"{1e6 * statistics.median(cost for _, cost in plain):.0f} us of processor per token"
    )
    print(f"tokens per second, with to without: {quartiles(speeds)}")
    print(f"processor time per token, with to without: {quartiles(costs)}")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {len(CORES)} cores")


if __name__ == "__main__":
    main()
