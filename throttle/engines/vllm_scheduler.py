"""vLLM's scheduler with a tap: `--scheduler-cls throttle.engines.vllm_scheduler.ThrottleScheduler`.

It schedules exactly as the class that it extends, and tells the throttling daemon of each request
as it arrives, of each step before it runs, and after. It does nothing unless `THROTTLE_ADDRESS` is
set.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

# The plain scheduler would switch asynchronous scheduling off.
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from throttle.engines.options import EngineOptions
from throttle.engines.reporter import Reporter
from throttle.engines.sender_process import connect_aside
from throttle.engines.vllm_registration import read_path, vllm_registration
from throttle.engines.vllm_schedule import SchedulerTap

#: Below vLLM's own name, so that it is seen under vLLM's logging configuration.
_log = logging.getLogger("vllm.throttle")


class _Tapped:
    """Overrides of a scheduler's methods, each of which calls the scheduler's own first."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._throttle_tap = SchedulerTap()
        self._throttle_reporter = _connect(self)

    def add_request(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        result = super().add_request(request, *arguments, **keywords)  # type: ignore[misc]
        reporter = self._throttle_reporter
        if reporter is not None:
            try:
                now = reporter.now_seconds()
                self._throttle_tap.arrive(request, now, time.time())
                if reporter.idle:  # wakes a parked GPU before the first step is even scheduled
                    self._throttle_send(self._throttle_tap.heartbeat(now), now)
            except Exception:  # noqa: BLE001 - the engine must never see an error of ours
                reporter.note_error()
        return result

    def finish_requests(self, *arguments: Any, **keywords: Any) -> Any:
        result = super().finish_requests(*arguments, **keywords)  # type: ignore[misc]
        reporter = self._throttle_reporter
        if reporter is not None:
            try:
                now = reporter.now_seconds()
                self._throttle_tap.note_ended(self.requests, now)  # type: ignore[attr-defined]
                if self._throttle_tap.idle:  # no step will tell of it
                    self._throttle_send(self._throttle_tap.heartbeat(now), now)
            except Exception:  # noqa: BLE001
                reporter.note_error()
        return result

    def schedule(self, *arguments: Any, **keywords: Any) -> Any:
        output = super().schedule(*arguments, **keywords)  # type: ignore[misc]
        reporter = self._throttle_reporter
        if reporter is not None:
            try:
                now = reporter.now_seconds()
                requests = self.requests  # type: ignore[attr-defined]
                self._throttle_send(self._throttle_tap.plan(output, requests, now), now)
            except Exception:  # noqa: BLE001
                reporter.note_error()
        return output

    def update_from_output(
        self,
        scheduler_output: Any,
        *arguments: Any,
        **keywords: Any,
    ) -> Any:
        result = super().update_from_output(  # type: ignore[misc]
            scheduler_output, *arguments, **keywords
        )
        reporter = self._throttle_reporter
        if reporter is not None:
            try:
                now = reporter.now_seconds()
                state = self._throttle_tap.complete(
                    scheduler_output,
                    self.requests,  # type: ignore[attr-defined]
                    self.running,  # type: ignore[attr-defined]
                    float(read_path(self, "kv_cache_manager.usage", 0.0)),
                    now,
                )
                self._throttle_send(state, now)
            except Exception:  # noqa: BLE001
                reporter.note_error()
        return result

    def shutdown(self, *arguments: Any, **keywords: Any) -> Any:
        if self._throttle_reporter is not None:
            self._throttle_reporter.close()
        return super().shutdown(*arguments, **keywords)  # type: ignore[misc]

    def _throttle_send(self, state: Any, now_seconds: float) -> None:
        reporter = self._throttle_reporter
        if state is not None and reporter is not None:
            reporter.send(state, idle=self._throttle_tap.idle, at_seconds=now_seconds)


class ThrottleScheduler(_Tapped, AsyncScheduler):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's default scheduler, tapped."""


class ThrottleSyncScheduler(_Tapped, Scheduler):  # type: ignore[misc]
    """The scheduler without asynchronous scheduling, tapped; for engines that switch it off."""


def _connect(scheduler: Any) -> Reporter | None:
    config = scheduler.vllm_config
    try:
        options = EngineOptions.from_environ(os.environ)
        if options is None:
            return None
        registration = vllm_registration(
            config,
            options,
            engine_index=read_path(config, "parallel_config.data_parallel_index")
            or read_path(config, "parallel_config.data_parallel_rank", 0),
            kv_blocks_count=read_path(scheduler, "kv_cache_config.num_blocks", 0),
            kv_block_tokens=read_path(scheduler, "block_size", 0),
        )
        reporter = Reporter(connect_aside(options, registration), tells_arrivals=True)
    except Exception as error:  # noqa: BLE001 - the engine serves on without throttling
        _log.error("throttle is off: %s", error)
        return None
    _log.info("throttle: %s reports to %s", registration.engine_id, options.address)
    return reporter
