"""How the daemon logs: one line per clock change at info, one per decision at debug."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Literal

import structlog

from throttle.daemon.credentials import redact

if TYPE_CHECKING:
    from typing import TextIO

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]


def configure_logs(level: LogLevel, format_name: LogFormat, stream: TextIO | None = None) -> None:
    """Set structlog up, once, by the command line.

    Args:
        level: Least level written.
        format_name: console, json, or auto: console on a terminal, else json.
        stream: Where to write; standard error when None.
    """
    output = sys.stderr if stream is None else stream
    console = format_name == "console" or (format_name == "auto" and output.isatty())
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # tracebacks become text or data first: what an error says is redacted like all else
    if console:
        processors += [
            structlog.processors.format_exc_info,
            redact,
            structlog.dev.ConsoleRenderer(colors=output.isatty()),
        ]
    else:
        processors += [
            structlog.processors.dict_tracebacks,
            redact,
            structlog.processors.JSONRenderer(),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(output),
        cache_logger_on_first_use=True,
    )
