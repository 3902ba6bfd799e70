"""The /metrics of a real vLLM, scraped while `vllm bench serve` loads it."""

from __future__ import annotations

import sys

import pyarrow.parquet
import pytest

from tests.engines.real.processes import GPU_UUID, Process, VllmServer, make_model, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]


def test_scraped_states_hold_the_servers_own_counts(tmp_path, vllm_environment, daemon):
    daemon.start()
    model = make_model(tmp_path / "model", "qwen3-moe")
    server = VllmServer(tmp_path, model)
    bridge = None
    try:
        server.wait()
        before = server.metrics()
        bridge = Process(
            [
                sys.executable, "-m", "throttle.cli", "bridge", "scrape",
                "--url", server.url + "/metrics", "--target", daemon.target,
                "--engine-id", "scraped", "--gpus", GPU_UUID, "--mode", "act",
                "--config-json", model / "config.json", "--tpot-seconds", 0.2,
            ],
            tmp_path / "bridge.log",
        )  # fmt: skip
        until(daemon.engine_status, "registration", 30.0, [bridge.popen])
        measured = server.bench(prompts=200).finish()
        assert (measured["completed"], measured["failed"]) == (200, 0)
        after = server.metrics()

        def delta(name):
            return after[name] - before.get(name, 0.0)

        ran = delta("vllm:iteration_tokens_total_count")
        status = until(lambda: _with_states(daemon, ran), "every window", 30.0)
        assert status.states_count == ran
        bridge.stop()
        files = until(lambda: list(daemon.recordings.glob("*.parquet")) or None, "recording", 30.0)
        records = pyarrow.parquet.read_table(files[0]).to_pandas()
        firsts = delta("vllm:time_to_first_token_seconds_count")
        assert records.num_decode_requests.sum() == delta("vllm:generation_tokens_total") - firsts
        assert records.num_prefill_requests.sum() == firsts == 200
        assert records.sum_prefill_tokens.sum() == delta("vllm:prompt_tokens_total") - delta(
            "vllm:prefix_cache_hits_total"
        )
        assert "0 dropped" in bridge.text()
        print(
            f"{ran:.0f} iterations run, {status.states_count} received; {firsts:.0f} requests, "
            f"{records.sum_prefill_tokens.sum():.0f} prompt tokens computed, "
            f"{delta('vllm:generation_tokens_total'):.0f} output tokens on both sides"
        )
    finally:
        if bridge is not None:
            bridge.stop()
        server.stop()


def _with_states(daemon, count):
    status = daemon.engine_status()
    return status if status is not None and status.states_count >= count else None
