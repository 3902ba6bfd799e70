"""Real processes: a daemon on a simulated GPU, and an engine on this machine's CPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest

from throttle.actuation.simulated import SimulatedGpu, SimulatedGpuFile
from throttle.v1 import throttle_service_pb2, throttle_service_pb2_grpc

ROOT = Path(__file__).resolve().parents[3]
GPU_UUID = "GPU-simulated-0"
START_SECONDS = 420.0  # a busy machine with two cores starts vLLM slowly
STOP_SECONDS = 60.0


def engine_python(engine):
    """The interpreter of an engine's environment; skips where it could not be made."""
    python = ROOT / f".venv-{engine}" / "bin" / "python"
    if not (ROOT / f".stamp-{engine}").exists() or not python.exists():
        pytest.skip(
            f"no environment with {engine}: scripts/engine_environments.sh {engine} makes one and "
            "needs its packages from an index"
        )
    return python


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def http_text(url, timeout=10.0):
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read().decode()


def until(condition, what, seconds=START_SECONDS, processes=()):
    """Wait for a condition of the outer world, not longer than a bound."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found is not None and found is not False:
            return found
        for process in processes:
            if process.poll() is not None:
                pytest.fail(f"{what}: process {process.args} ended with {process.returncode}")
        time.sleep(0.1)
    pytest.fail(f"{what}: not within {seconds} s")


def answers(url):
    try:
        http_text(url, timeout=2.0)
    except (urllib.error.URLError, OSError):
        return False
    return True


class Process:
    """A child in a group of its own, with its output in a file."""

    def __init__(self, command, log, **environment):
        self.log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                list(map(str, command)),
                stdout=output,
                stderr=output,
                cwd=log.parent,
                env=os.environ | environment,
                start_new_session=True,
            )

    def text(self):
        return self.log.read_text("utf-8", "replace")

    def stop(self, number=signal.SIGTERM):
        if self.popen.poll() is None:
            self.popen.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)  # and every child of the engine
        self.popen.wait(STOP_SECONDS)


class Daemon:
    """`throttle serve` on one simulated GPU; may be killed and started again."""

    def __init__(self, folder):
        self.folder = folder
        self.target = f"unix:{folder}/throttle.sock"
        self.recordings = folder / "recordings"
        clocks = tuple(range(345, 1981, 15))
        gpu = SimulatedGpu(GPU_UUID, "h200-sxm", clocks)
        SimulatedGpuFile.create(folder / "gpus", [gpu]).close()
        self.metrics_port = free_port()
        self.process = None

    def start(self):
        self.process = Process(
            [
                sys.executable, "-m", "throttle.cli", "serve",
                "--socket", self.folder / "throttle.sock",
                "--simulated-gpus", self.folder / "gpus",
                "--bundles", ROOT / "models",
                "--recordings", self.recordings,
                "--metrics-address", f"127.0.0.1:{self.metrics_port}",
            ],
            self.folder / "daemon.log",
        )  # fmt: skip
        until(
            lambda: answers(f"http://127.0.0.1:{self.metrics_port}/readyz"),
            "daemon",
            processes=[self.process.popen],
        )
        return self

    def kill(self):
        self.process.popen.kill()
        self.process.popen.wait(STOP_SECONDS)

    def stop(self):
        if self.process is not None:
            self.process.stop()

    def engine_status(self):
        """What the daemon knows of its only engine; None while there is none."""
        with grpc.insecure_channel(
            self.target, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            status = throttle_service_pb2_grpc.ThrottleServiceStub(channel).GetStatus(
                throttle_service_pb2.GetStatusRequest(), timeout=10.0
            )
        return status.engines[0] if status.engines else None

    def metrics(self):
        return sums(http_text(f"http://127.0.0.1:{self.metrics_port}/metrics"))


def sums(exposition):
    """Prometheus' text as totals over all labels."""
    totals = {}
    for line in exposition.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


_MODELS = {
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": 128,
        "num_local_experts": 8,
        "sliding_window": None,
    },
}
_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(folder, name, **sizes):
    """A tiny MoE model: its shape and a tokenizer of 512 words; the engine draws its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_SIZES | _MODELS[name] | sizes))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 512)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "chat_template": "{{ messages[0]['content'] }}",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

#: `vllm bench serve` by its module: the command asks for a distribution called "vllm".
_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


class VllmServer:
    """vLLM's OpenAI server on a tiny model."""

    def __init__(self, folder, model, *arguments, **environment):
        self.python = engine_python("vllm")
        self.folder = folder
        self.model = model
        self.adapter = ""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._benches = []
        self.process = Process(
            [
                self.python, "-m", "vllm.entrypoints.openai.api_server",
                "--model", model, "--served-model-name", "tiny", "--load-format", "dummy",
                "--enforce-eager", "--kv-cache-memory-bytes", 32 * 1024**2,
                "--max-model-len", 1024, "--max-num-seqs", 16, "--max-num-batched-tokens", 256,
                "--host", "127.0.0.1", "--port", self.port, *arguments,
            ],
            folder / "server.log",
            **_QUIET, **environment,
        )  # fmt: skip

    def wait(self):
        until(lambda: answers(self.url + "/health"), "vLLM", processes=[self.process.popen])
        return self

    def metrics(self):
        return sums(http_text(self.url + "/metrics"))

    def bench(self, *arguments, prompts=200, rate=20, output_tokens=24, folder=None):
        """Start `vllm bench serve` with random prompts of 40 to 360 tokens."""
        result = self.folder / f"bench-{len(self._benches)}.json"
        script = self.folder / "bench.py"
        script.write_text(_BENCH)
        process = Process(
            [
                self.python, script, "--backend", "openai", "--base-url", self.url,
                "--model", "tiny", "--tokenizer", self.model, "--dataset-name", "random",
                "--random-input-len", 200, "--random-range-ratio", 0.8,
                "--random-output-len", output_tokens, "--num-prompts", prompts,
                "--request-rate", rate, "--seed", 1, "--ignore-eos", "--disable-tqdm",
                "--save-result", "--result-filename", result, *arguments,
            ],
            self.folder / "bench.log",
            **_QUIET,
        )  # fmt: skip
        self._benches.append(process)
        return Bench(process, result)

    def complete(self, prompt, tokens, **headers):
        """Ask for one completion; returns its usage."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        request = urllib.request.Request(
            self.url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **headers},
        )
        with urllib.request.urlopen(request, timeout=60.0) as answer:
            return json.loads(answer.read())["usage"]

    def iterations_count(self):
        """Iterations run, by vLLM's own log: one line for each."""
        return self.process.text().count(": Iteration(") or None

    def stop(self):
        for process in [*self._benches, self.process]:
            process.stop()


class Bench:
    """A load test under way."""

    def __init__(self, process, result):
        self.process = process
        self.result = result

    @property
    def running(self):
        return self.process.popen.poll() is None

    def finish(self, seconds=240.0):
        """Wait for the end; returns what the tool measured."""
        try:
            status = self.process.popen.wait(seconds)
        finally:
            self.process.stop()
        assert status == 0, self.process.text()[-2000:]
        return json.loads(self.result.read_text())
