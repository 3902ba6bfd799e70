"""Takes a changed policy, access list or bundle into use without a restart, or keeps what is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from predictors.bundle import MANIFEST_FILE, load_bundle
from predictors.errors import PredictorsError
from throttle.daemon.access import read_access_list
from throttle.daemon.brains import ControllerFactory
from throttle.errors import ThrottleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from throttle.control.state import EngineProfile
    from throttle.daemon.access import CallerLookup
    from throttle.daemon.brains import BrainFactory, EngineBrain, GpuModel
    from throttle.daemon.config import DaemonConfig
    from throttle.daemon.metrics import DaemonMetrics
    from throttle.daemon.sessions import Sessions

#: What may change while the daemon runs; everything else needs a restart.
_RELOADABLE: Final = frozenset({"access", "bundles", "control"})


class ReplaceableFactory:
    """A brain factory that can be replaced by another; brains that are made stay as they are."""

    def __init__(self, factory: BrainFactory) -> None:
        self.current = factory

    def build(self, profile: EngineProfile, gpu: GpuModel | None) -> EngineBrain:
        """As the factory in use does."""
        return self.current.build(profile, gpu)

    def warm_up(self) -> Iterator[tuple[str, str]]:
        """As the factory in use does."""
        return self.current.warm_up()


class Reloader:
    """Reloads on request, and when a file has changed. One thread at a time."""

    def __init__(
        self,
        *,
        config: DaemonConfig,
        read_config: Callable[[], DaemonConfig],
        config_file: Path | None,
        factory: ReplaceableFactory,
        identify: CallerLookup,
        sessions: Sessions,
        metrics: DaemonMetrics,
        log: FilteringBoundLogger,
    ) -> None:
        """Reload nothing yet.

        Args:
            config: What is in force.
            read_config: Reads flags, environment and file again.
            config_file: The file, which is watched; None without one.
            factory: Where the new policy goes.
            identify: Where the new access list goes.
            sessions: Their engines register again after a change.
            metrics: Counts, and keeps the last problem.
            log: Logger.
        """
        self._config = config
        self._read_config = read_config
        self._config_file = config_file
        self._factory = factory
        self._identify = identify
        self._sessions = sessions
        self._metrics = metrics
        self._log = log
        self._seen = self._settled = self._snapshot()

    def reload_if_changed(self) -> None:
        """Reload once a changed file has stayed as it is since the last call; called now and then.

        A file that is being written when this is called is left to the next call.
        """
        now = self._snapshot()
        quiet, self._seen = now == self._seen, now
        if quiet and now != self._settled:
            self.reload()

    def reload(self) -> bool:
        """Take everything that has changed into use, or nothing.

        Returns:
            Whether it could be used. If not, what was before stays in force; that is counted,
            logged and shown.
        """
        self._seen = self._settled = self._snapshot()
        try:
            config = self._read_config()
            self._require_reloadable(config)
            access_list = None if config.access is None else read_access_list(config.access)
            for manifest in sorted(config.bundles.glob(f"*/{MANIFEST_FILE}")):
                load_bundle(manifest.parent)
        except (ThrottleError, PredictorsError) as error:
            self._metrics.reload_problem = str(error)
            self._metrics.reload_refused.set(1)
            self._metrics.reloads.labels("refused").inc()
            self._log.error("reload_refused", problem=str(error))
            return False
        factory = ControllerFactory(config.bundles, config.control)
        for name, problem in factory.warm_up():
            self._log.info("bundle_reloaded", bundle=name, problem=problem)
        self._factory.current = factory
        self._identify.access_list = access_list
        self._config = config
        self._metrics.reload_problem = ""
        self._metrics.reload_refused.set(0)
        self._metrics.reloads.labels("applied").inc()
        self._log.info("reloaded")
        # Engines register again, with every live request, and are judged by what is new.
        self._sessions.restart("the service has reloaded; register again")
        return True

    def _require_reloadable(self, config: DaemonConfig) -> None:
        changed = [
            field.name
            for field in dataclasses.fields(config)
            if field.name not in _RELOADABLE
            and getattr(config, field.name) != getattr(self._config, field.name)
        ]
        if changed:
            raise ThrottleError(
                f"{', '.join(changed)} changed, which needs a restart; allowed: "
                f"{', '.join(sorted(_RELOADABLE))}"
            )

    def _snapshot(self) -> tuple[tuple[str, int, int], ...]:
        paths = [path for path in (self._config_file, self._config.access) if path is not None]
        paths += sorted(self._config.bundles.glob(f"*/{MANIFEST_FILE}"))
        return tuple(_trace(path) for path in paths)


def _trace(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError:
        return str(path), -1, -1
    return str(path), status.st_mtime_ns, status.st_size
