"""Record what a real vLLM gives its stat loggers and its scheduler, for tests/data.

Run with the interpreter of an environment that holds vLLM and this project's base package:

    .venv-vllm/bin/python scripts/record_vllm_samples.py MODEL OUT

MODEL is a folder with a config.json (weights are drawn); OUT gets stat_logger.jsonl and
scheduler.jsonl, one call per line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

OUT_VARIABLE = "SAMPLES_OUT"


def _write(name: str, **entry: object) -> None:
    with (Path(os.environ[OUT_VARIABLE]) / name).open("a") as file:
        file.write(json.dumps(entry | {"seconds": time.monotonic()}, default=str) + "\n")


class RecordingStatLogger(StatLoggerBase):  # type: ignore[misc]
    """Writes each call of `record`."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:  # noqa: ANN401
        pass

    def log_engine_initialized(self) -> None:
        """Nothing."""

    def record(self, scheduler_stats: Any, iteration_stats: Any, **_: Any) -> None:  # noqa: ANN401
        """Write one step."""
        iteration = None
        if iteration_stats is not None:
            iteration = dict(vars(iteration_stats))
            iteration["num_prompt_tokens"] = iteration_stats.num_prompt_tokens
            iteration["prompt_token_stats"] = vars(iteration_stats.prompt_token_stats)
            iteration["finished_requests"] = [
                dataclasses.asdict(each) for each in iteration_stats.finished_requests
            ]
        scheduler = None if scheduler_stats is None else dataclasses.asdict(scheduler_stats)
        _write("stat_logger.jsonl", scheduler=scheduler, iteration=iteration)


class RecordingScheduler(AsyncScheduler):  # type: ignore[misc]
    """Writes each call that `throttle.engines.vllm_scheduler` taps."""

    def add_request(self, request: Any) -> None:  # noqa: ANN401
        """Write an arrival."""
        super().add_request(request)
        extra = request.sampling_params.extra_args
        described = _request(request) | {"max_tokens": request.max_tokens, "extra_args": extra}
        _write("scheduler.jsonl", call="add_request", request=described, wall=time.time())

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:  # noqa: ANN401
        """Write an end from outside."""
        ended = super().finish_requests(request_ids, finished_status)
        _write("scheduler.jsonl", call="finish_requests", ended=[_request(each) for each in ended])
        return ended

    def schedule(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401
        """Write a plan."""
        output = super().schedule(*arguments, **keywords)
        cached = output.scheduled_cached_reqs
        _write(
            "scheduler.jsonl",
            call="schedule",
            output={
                "num_scheduled_tokens": output.num_scheduled_tokens,
                "scheduled_new_reqs": [
                    {"req_id": new.req_id, "num_computed_tokens": new.num_computed_tokens}
                    for new in output.scheduled_new_reqs
                ],
                "scheduled_cached_reqs": {
                    "req_ids": cached.req_ids,
                    "num_computed_tokens": cached.num_computed_tokens,
                    "num_output_tokens": cached.num_output_tokens,
                    "resumed_req_ids": sorted(cached.resumed_req_ids),
                },
                "preempted_req_ids": sorted(output.preempted_req_ids or ()),
                "scheduled_spec_decode_tokens": output.scheduled_spec_decode_tokens,
            },
        )
        return output

    def update_from_output(self, scheduler_output: Any, *arguments: Any) -> Any:  # noqa: ANN401
        """Write what a step left behind."""
        before = {name: self.requests.get(name) for name in scheduler_output.num_scheduled_tokens}
        result = super().update_from_output(scheduler_output, *arguments)
        _write(
            "scheduler.jsonl",
            call="update_from_output",
            running=[_request(each) for each in self.running],
            requests=list(self.requests),
            ended=[
                _request(each)
                for name, each in before.items()
                if each and name not in self.requests
            ],
            kv_usage=self.kv_cache_manager.usage,
        )
        return result


def _request(request: Any) -> dict[str, object]:  # noqa: ANN401
    return {
        "request_id": request.request_id,
        "arrival_time": request.arrival_time,
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_computed_tokens": request.num_computed_tokens,
        "num_output_tokens": request.num_output_tokens,
        "status": str(request.status),
    }


async def _serve(model: str) -> None:
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            kv_cache_memory_bytes=640 * 1024,  # little, so that requests are preempted
            block_size=32,
            max_model_len=600,
            max_num_seqs=8,
            max_num_batched_tokens=128,
            scheduler_cls=RecordingScheduler,
            enable_logging_iteration_details=True,
            enable_mfu_metrics=True,
        ),
        stat_loggers=[RecordingStatLogger],
    )

    async def ask(number: int) -> None:
        await asyncio.sleep(0.02 * number)
        prompt = [3 + (7 * number + index) % 500 for index in range(40 + 37 * number % 360)]
        parameters = SamplingParams(
            max_tokens=8 + 5 * number % 40,
            ignore_eos=True,
            detokenize=False,
            extra_args={"x-slo-ttft-ms": "500"} if number == 3 else None,
        )
        seen = 0
        async for _ in engine.generate({"prompt_token_ids": prompt}, parameters, f"r{number}"):
            seen += 1
            if number == 5 and seen == 3:
                return  # the client goes away

    await asyncio.gather(*(ask(number) for number in range(16)))
    await asyncio.sleep(0.5)
    engine.shutdown()


if __name__ == "__main__":
    os.environ[OUT_VARIABLE] = str(Path(sys.argv[2]).resolve())
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    asyncio.run(_serve(sys.argv[1]))
