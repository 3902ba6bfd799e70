"""The life of a daemon: start, serve, drain, stop."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from throttle import __version__
from throttle.daemon.config import split_address
from throttle.daemon.credentials import tls_credentials
from throttle.daemon.recording import require_pyarrow
from throttle.daemon.sockets import claimed, private_umask, set_group
from throttle.daemon.systemd import ServiceManager
from throttle.daemon.web import serve_http
from throttle.errors import ActuationError, ConflictError
from throttle.v1 import throttle_service_pb2, throttle_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prometheus_client import CollectorRegistry

    from throttle.actuation.actuator import Actuator
    from throttle.daemon.brains import BrainFactory
    from throttle.daemon.config import DaemonConfig
    from throttle.daemon.gate import CallGate
    from throttle.daemon.reload import Reloader
    from throttle.daemon.service import ThrottleServicer
    from throttle.daemon.sessions import Sessions
    from throttle.daemon.status_page import StatusPage
    from throttle.daemon.telemetry import Telemetry

#: Calls besides the engines' streams that may run at once.
_OTHER_CALLS = 8
#: How often sessions are asked whether their control is stuck, and leases are renewed, seconds;
#: renewed at least this often within the actuator's own lease.
_WATCH_SECONDS: Final = 0.5
_RENEWALS_PER_LEASE: Final = 4
#: What stopping may take beyond the drain before the process ends itself, seconds.
_STOP_MARGIN_SECONDS: Final = 5.0

_SERVICE_NAME = throttle_service_pb2.DESCRIPTOR.services_by_name["ThrottleService"].full_name
#: Readiness: the whole process, and the service.
_READY_NAMES: Final = ("", _SERVICE_NAME)
#: Liveness: whatever the GPUs do, a restart is of no use while this answers.
_LIVE_NAME: Final = "live"

_SERVER_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # or a second daemon on the same port would share it silently
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),  # the client's pace
    ("grpc.keepalive_permit_without_calls", 1),
)


class Daemon:
    """A daemon that is put together but not started; made by `assembly.build_server`."""

    def __init__(
        self,
        *,
        config: DaemonConfig,
        actuator: Actuator,
        telemetry: Telemetry,
        sessions: Sessions,
        brain_factory: BrainFactory,
        servicer: ThrottleServicer,
        gate: CallGate,
        status_page: StatusPage,
        registry: CollectorRegistry,
        close_backend: Callable[[], None],
    ) -> None:
        self.config = config
        self.actuator = actuator
        self._telemetry = telemetry
        self.sessions = sessions
        self._brain_factory = brain_factory
        self._servicer = servicer
        self._gate = gate
        self.status_page = status_page
        self.registry = registry
        self._health = health.HealthServicer()
        self._log = structlog.get_logger()
        self._stopping = threading.Event()
        self._service_manager = ServiceManager(os.environ, time.monotonic)
        self._reload_asked = threading.Event()
        self.reloader: Reloader | None = None
        self._resources = contextlib.ExitStack()
        self._resources.callback(close_backend)
        self._resources.callback(actuator.close)
        self._problems: dict[str, str] = {}
        self._server: grpc.Server | None = None
        self.tcp_port = 0

    @property
    def target(self) -> str:
        """What a client connects to."""
        if self.config.socket is not None:
            return _unix_target(self.config.socket)
        return f"{split_address(self.config.tcp_address)[0]}:{self.tcp_port}"

    def start(self) -> None:
        """Restore default clocks, warm up, listen.

        Raises:
            ConflictError: A socket or port is taken.
            ActuationError: A GPU cannot be reset: it may be slow for ever, so nothing starts.
            ThrottleError: Something else that the configuration asks for cannot be had.
        """
        try:
            if self.config.socket is not None:
                self._resources.enter_context(claimed(self.config.socket))
            # whatever a killed daemon has left behind; only now, as no other daemon runs here
            self.actuator.reset_all()
            self._telemetry.start()
            self._resources.callback(self._telemetry.stop)
            if self.config.recordings is not None:
                require_pyarrow()
            self._warm_up()
            if self.config.metrics_address:
                address = split_address(self.config.metrics_address)
                self._resources.callback(serve_http(self.status_page.pages(), *address))
            self._server = self._listen()
        except BaseException:
            self._resources.close()
            raise
        for name in (*_READY_NAMES, _LIVE_NAME):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.status_page.ready = True
        self._service_manager.ready()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        if self.reloader is not None:
            threading.Thread(
                target=self._reload_when_due, args=(self.reloader,), name="reload", daemon=True
            ).start()
        self._log.info(
            "serving",
            version=__version__,
            target=self.target,
            tcp_port=self.tcp_port,
            gpu_uuids=self.actuator.uuids(),
        )

    def stop(self) -> bool:
        """Refuse new work, restore all clocks, end the calls, free everything.

        Returns:
            Whether every GPU is known to be at default clocks.
        """
        self._log.info("stopping")
        self._health.enter_graceful_shutdown()
        self.status_page.ready = False
        self._service_manager.stopping()
        self._stopping.set()
        self.sessions.drain()
        restored = self._reset_all()
        if self._server is not None:
            self._server.stop(self.config.drain_seconds).wait()
        self._resources.close()
        self._log.info("stopped", clocks_restored=restored)
        return restored

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Have something freed when the daemon stops."""
        self._resources.callback(callback)

    def reload_soon(self) -> None:
        """Reload at once, on the thread for it."""
        self._reload_asked.set()

    def close(self) -> None:
        """Free what a daemon holds that was never started."""
        self._resources.close()

    def _warm_up(self) -> None:
        found = False
        for name, problem in self._brain_factory.warm_up():
            found = True
            if problem:
                self._log.warning("bundle_degraded", bundle=name, problem=problem)
            else:
                self._log.info("bundle_ready", bundle=name)
        if not found:
            self._log.warning("no_bundles", directory=str(self.config.bundles))

    def _listen(self) -> grpc.Server:
        calls = self.config.engines_limit + _OTHER_CALLS
        server = grpc.server(
            ThreadPoolExecutor(calls, thread_name_prefix="call"),
            interceptors=[self._gate],
            options=(
                *_SERVER_OPTIONS,
                ("grpc.max_receive_message_length", self.config.limits.message_bytes),
            ),
            maximum_concurrent_rpcs=calls,
        )
        throttle_service_pb2_grpc.add_ThrottleServiceServicer_to_server(self._servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (_SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        if self.config.socket is not None:
            with private_umask(int(self.config.socket_mode, 8)):
                _bind(server, _unix_target(self.config.socket), "socket")
            if self.config.socket_group:
                set_group(self.config.socket, self.config.socket_group)
        if self.config.tcp_address:
            tls = self.config.tls
            credentials = None if tls.certificate is None else tls_credentials(tls)
            self.tcp_port = _bind(server, self.config.tcp_address, "tcp_address", credentials)
        server.start()
        return server

    def _watch(self) -> None:
        lease = self.config.actuation.lease_seconds
        aside = threading.Thread()
        while not self._stopping.wait(min(_WATCH_SECONDS, lease / _RENEWALS_PER_LEASE)):
            try:
                self.actuator.renew()
            except ActuationError as error:
                self._log.debug("not_renewed", error=str(error))  # readiness tells of it
            self._service_manager.alive()
            self._note_problems(self.actuator.problems())
            if not aside.is_alive():  # waits for a driver, which must not hold up the renewals
                aside = threading.Thread(
                    target=self.sessions.release_stuck, name="release", daemon=True
                )
                aside.start()

    def _reload_when_due(self, reloader: Reloader) -> None:
        """Aside from the watch: reading bundles takes longer than a lease may wait."""
        while not self._stopping.is_set():
            if self._reload_asked.wait(_WATCH_SECONDS):
                self._reload_asked.clear()
                reloader.reload()
            else:
                reloader.reload_if_changed()

    def _note_problems(self, problems: dict[str, str]) -> None:
        """Readiness follows the GPUs: down while one cannot be relied on."""
        if problems == self._problems:
            return
        self._problems = problems
        kind = health_pb2.HealthCheckResponse
        self.status_page.ready = not problems
        for name in _READY_NAMES:
            self._health.set(name, kind.NOT_SERVING if problems else kind.SERVING)
        if problems:
            self._log.error("gpus_unhealthy", problems=problems)
        else:
            self._log.info("gpus_healthy")

    def _reset_all(self) -> bool:
        try:
            self.actuator.reset_all()
        except ActuationError as error:
            self._log.error("reset_failed", error=str(error))
            return False
        return True


def serve_until_signal(daemon: Daemon) -> int:
    """Serve until SIGTERM or SIGINT; call it from the main thread before any other is started.

    Returns:
        Exit status: 0 when every GPU is back at default clocks, else 1.

    Raises:
        ThrottleError: As `Daemon.start`.
    """
    ending = {signal.SIGTERM, signal.SIGINT}
    signals = ending | {signal.SIGHUP}
    # Blocked in every thread and waited for here: a handler could run in the middle of a lock.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    daemon.start()
    # A full collection takes up to 75 ms with XGBoost's objects; they stay, so they are set aside.
    gc.collect()
    gc.freeze()
    while signal.sigwait(signals) not in ending:
        daemon.reload_soon()
    deadline = threading.Timer(
        daemon.config.drain_seconds + _STOP_MARGIN_SECONDS, os._exit, args=(1,)
    )
    deadline.daemon = True
    deadline.start()  # a driver call that hangs must not keep the process
    restored = daemon.stop()
    deadline.cancel()
    return 0 if restored else 1


def _unix_target(path: Path) -> str:
    return f"unix:{path.absolute()}"


def _bind(
    server: grpc.Server,
    address: str,
    name: str,
    credentials: grpc.ServerCredentials | None = None,
) -> int:
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError:
        raise ConflictError(
            f"{name} {address} cannot be had; it may be in use: choose another"
        ) from None
