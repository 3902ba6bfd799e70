"""What vLLM's API server knows of a request before its engine does: an ASGI middleware.

`--middleware throttle.engines.vllm_middleware.RequestMiddleware` does two things. It passes the
headers `x-slo-ttft-ms` and `x-slo-tpot-ms` on to the scheduler class, as `vllm_xargs` of the body;
a body that gives them itself wins. And it tells the stat logger of arrivals, which then may let an
idle GPU be parked, because the next request wakes it.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, Final

from throttle.engines.request_slos import SLO_HEADERS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

_log = logging.getLogger("vllm.throttle")

#: Ends of the paths that start generation.
_GENERATION: Final = ("/completions", "/responses", "/generate")

_NAMES: Final = frozenset(name.encode() for name in SLO_HEADERS)


class RequestMiddleware:
    """Wraps vLLM's application."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._errors_count = 0

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Handle one connection; whatever fails here, the request goes on as it came."""
        if scope["type"] == "http" and scope.get("path", "").endswith(_GENERATION):
            try:
                _tell_arrival(scope)
            except Exception:  # noqa: BLE001 - the request must not fail by us
                self._note_error()
            slos = _slo_headers(scope)
            if slos:
                receive = await self._with_slos(scope, receive, slos)
        await self._app(scope, receive, send)

    async def _with_slos(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        slos: dict[str, str],
    ) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
        """Read the whole body, write the limits into it, and hand that out instead."""
        parts = []
        last: MutableMapping[str, Any] = {"more_body": True}
        while last.get("more_body"):
            last = await receive()
            if last["type"] != "http.request":  # the client went away
                break
            parts.append(last.get("body", b""))
        body = b"".join(parts)
        if last["type"] == "http.request":
            try:
                body = _add_slos(body, slos)
                scope["headers"] = [
                    (name, str(len(body)).encode() if name == b"content-length" else value)
                    for name, value in scope["headers"]
                ]
            except (ValueError, TypeError, AttributeError):
                _log.debug("no JSON object in the body: x-slo headers are left out")
        whole: MutableMapping[str, Any] = {
            "type": "http.request",
            "body": body,
            "more_body": False,
        }
        waiting = [whole] if last["type"] == "http.request" else [last]

        async def replay() -> MutableMapping[str, Any]:
            return waiting.pop() if waiting else await receive()

        return replay

    def _note_error(self) -> None:
        self._errors_count += 1
        if self._errors_count == 1:
            _log.exception("throttle's middleware failed; requests go on without it")


def _slo_headers(scope: MutableMapping[str, Any]) -> dict[str, str]:
    return {
        name.decode(): value.decode("latin-1")
        for name, value in scope.get("headers", ())
        if name in _NAMES
    }


def _add_slos(body: bytes, slos: dict[str, str]) -> bytes:
    document = json.loads(body)
    document["vllm_xargs"] = slos | (document.get("vllm_xargs") or {})
    return json.dumps(document).encode()


def _tell_arrival(scope: MutableMapping[str, Any]) -> None:
    manager = getattr(scope["app"].state.engine_client, "logger_manager", None)
    for adapter in getattr(manager, "stat_loggers", ()):
        loggers = getattr(adapter, "per_engine_stat_loggers", None) or {0: adapter}
        for logger in loggers.values():
            note_arrival = getattr(logger, "note_arrival", None)
            if note_arrival is not None:
                note_arrival()
