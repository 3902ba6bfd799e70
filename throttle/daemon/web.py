"""The HTTP port: metrics, status page, probes. Reads only, from a fixed list of paths."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

from throttle.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Most requests at once; more are closed unanswered.
REQUESTS_LIMIT: Final = 16
#: Longest time for one request, whatever its sender does, seconds.
REQUEST_SECONDS: Final = 5.0

_HEADERS: Final = (
    (
        "Content-Security-Policy",
        (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)


@dataclass(frozen=True, slots=True)
class Page:
    """An answer.

    Attributes:
        content_type: Its media type.
        body: Its bytes.
        status: Its status.
    """

    content_type: str
    body: bytes
    status: HTTPStatus = HTTPStatus.OK


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "throttle", ""

    def setup(self) -> None:
        self.request.settimeout(self.server.request_seconds)
        super().setup()

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Requests are not logged: probes and scrapes would fill the log."""

    def _answer(self, *, with_body: bool) -> None:
        make = self.server.pages.get(self.path.partition("?")[0])
        if make is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        page = make(self.headers.get("Accept", ""))
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        if with_body:
            self.wfile.write(page.body)

    def end_headers(self) -> None:
        for name, value in _HEADERS:
            self.send_header(name, value)
        super().end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 4 * REQUESTS_LIMIT

    def __init__(
        self,
        address: tuple[str, int],
        pages: Mapping[str, Callable[[str], Page]],
        request_seconds: float,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.pages = pages
        self.request_seconds = request_seconds
        self._open: dict[socket.socket, float] = {}
        self._open_lock = threading.Lock()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        with self._open_lock:
            full = len(self._open) >= REQUESTS_LIMIT
            if not full:
                self._open[request] = time.monotonic()
        if full:
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """End what has taken too long: a byte now and then would pass every socket timeout."""
        now = time.monotonic()
        with self._open_lock:
            late = [
                each for each, since in self._open.items() if now - since > self.request_seconds
            ]
        for request in late:
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its client has gone meanwhile

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 - as the base
        with self._open_lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """A client that goes away is no error of ours."""


def serve_http(
    pages: Mapping[str, Callable[[str], Page]],
    host: str,
    port: int,
    request_seconds: float = REQUEST_SECONDS,
) -> Callable[[], None]:
    """Answer GET and HEAD.

    Args:
        pages: By path; each is made anew from the request's Accept header.
        host: Address to listen on.
        port: Port.
        request_seconds: Longest time for one request.

    Returns:
        What stops it.

    Raises:
        ConflictError: The address cannot be had.
    """
    try:
        server = _Server((host, port), pages, request_seconds)
    except OSError as error:
        raise ConflictError(
            f"metrics_address {host}:{port} cannot be had: {error.strerror}; choose another"
        ) from None
    thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
