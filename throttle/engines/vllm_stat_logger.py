"""The vLLM plugin that needs no code: entry point `vllm.stat_logger_plugins`.

vLLM imports it in the process of its API server and calls it after each step. It does nothing
unless `THROTTLE_ADDRESS` is set.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from throttle.engines.options import EngineOptions
from throttle.engines.reporter import Reporter
from throttle.engines.sender_process import connect_aside
from throttle.engines.vllm_registration import read_path, vllm_registration
from throttle.engines.vllm_statistics import StatisticsReader

#: Below vLLM's own name, so that it is seen under vLLM's logging configuration.
_log = logging.getLogger("vllm.throttle")


class ThrottleStatLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM has no type information here
    """Sends a state to the throttling daemon after each step of one engine core."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._vllm_config = vllm_config
        self._engine_index = engine_index
        self._reporter: Reporter | None = None
        self._options: EngineOptions | None = None
        try:
            self._options = EngineOptions.from_environ(os.environ)
        except ValueError as error:
            _log.error("throttle is off: %s", error)
        why = self._why_not()
        if self._options is not None and why:
            _log.warning("throttle's stat logger is off: %s", why)
            self._options = None
        # asynchronous scheduling overlaps steps: the host waits for a part of each only
        overlapped = bool(read_path(vllm_config, "scheduler_config.async_scheduling", default=True))
        self._reader = StatisticsReader(trust_elapsed=not overlapped)

    def log_engine_initialized(self) -> None:
        """Register; only now does vLLM know its KV blocks."""
        if self._options is None or self._reporter is not None:
            return
        try:
            registration = vllm_registration(
                self._vllm_config, self._options, engine_index=self._engine_index
            )
            sink = connect_aside(self._options, registration)
            self._reporter = Reporter(sink, tells_arrivals=False)
        except Exception as error:  # noqa: BLE001 - the engine serves on without throttling
            _log.error("throttle is off: %s", error)
            return
        _log.info("throttle: %s reports to %s", registration.engine_id, self._options.address)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,  # noqa: ARG002 - vLLM's signature
        engine_idx: int = 0,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Take one step's statistics; runs on vLLM's asyncio loop."""
        reporter = self._reporter
        if reporter is None:
            return
        try:
            read = self._reader.read(scheduler_stats, iteration_stats, reporter.now_seconds())
            if read is not None:
                state, idle = read
                reporter.send(state, idle=idle)
        except Exception:  # noqa: BLE001 - an error here would end vLLM's output loop
            reporter.note_error()

    def note_arrival(self) -> None:
        """A request has come that the engine has not seen yet: wake a parked GPU."""
        reporter = self._reporter
        if reporter is None:
            return
        try:
            reporter.tell_arrivals()
            if reporter.idle:
                reporter.send(self._reader.arrival(), idle=False)
        except Exception:  # noqa: BLE001 - as above
            reporter.note_error()

    def _why_not(self) -> str:
        scheduler = read_path(self._vllm_config, "scheduler_config.scheduler_cls", "")
        if "throttle.engines" in str(scheduler):
            return "the scheduler class reports instead"
        if read_path(self._vllm_config, "parallel_config._api_process_count", 1) > 1:
            return (
                "with several API servers each sees a part of the statistics only; use "
                "--scheduler-cls throttle.engines.vllm_scheduler.ThrottleScheduler"
            )
        return ""
