"""Trees grown on the workers of a Dask cluster, through XGBoost's own Dask interface."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from predictors.errors import PredictorsError
from predictors.fitting import serialized

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from predictors.fitting import Part

#: Rows of one chunk, at least two for each worker.
_CHUNK_ROWS_COUNT = 200_000

_CONNECT_TIMEOUT_SECONDS = 10


class DaskTrainer:
    """Grows trees on a cluster; a context manager that keeps the connection.

    Rows are cut into chunks and handed to the workers, which hold them while the trees grow. Bases
    and calibration stay in this process: they look at samples or at single columns.

    Args:
        scheduler: Address of the scheduler, such as `tcp://10.0.0.5:8786`, or a file that it wrote.
    """

    def __init__(self, scheduler: str) -> None:
        self._scheduler = scheduler
        self._client: Any = None

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            PredictorsError: Dask is not installed, or the scheduler does not answer.
        """
        distributed = _imported("distributed")
        if self._scheduler.endswith(".json") and not Path(self._scheduler).is_file():
            raise PredictorsError(  # Dask itself would wait for the file for ever
                f"Dask scheduler {self._scheduler!r} cannot be reached: there is no such file; "
                "allowed: an address such as tcp://HOST:8786, or the scheduler's .json file"
            )
        where = (
            {"scheduler_file": self._scheduler}
            if self._scheduler.endswith(".json")
            else {"address": self._scheduler}
        )
        try:
            self._client = distributed.Client(**where, timeout=_CONNECT_TIMEOUT_SECONDS)
        except (OSError, TimeoutError, ValueError) as error:
            raise PredictorsError(
                f"Dask scheduler {self._scheduler!r} cannot be reached: {error}; allowed: an "
                "address such as tcp://HOST:8786, or the scheduler's .json file"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the cluster."""
        self._client.close()

    def boost(  # noqa: PLR0917 (each is one thing that callers name)
        self,
        parameters: Mapping[str, Any],
        trees_count: int,
        early_stopping_count: int,
        train: Part,
        validation: Part | None,
        report: Callable[[float], None] | None = None,
    ) -> bytes:
        """Fit and return UBJSON; without validation rows every tree is kept."""
        xgboost_dask = _imported("xgboost.dask")
        evaluated = [(self._matrix(validation), "validation")] if validation else []
        found = xgboost_dask.train(
            self._client,
            dict(parameters),
            self._matrix(train),
            num_boost_round=trees_count,
            evals=evaluated,
            early_stopping_rounds=early_stopping_count if validation else None,
            verbose_eval=False,
        )
        if report is not None:  # the workers do not tell how far they are
            report(1.0)
        return serialized(found["booster"], stopped_early=bool(validation))

    def _matrix(self, part: Part) -> Any:  # noqa: ANN401 (XGBoost is untyped)
        arrays, xgboost_dask = _imported("dask.array"), _imported("xgboost.dask")
        workers_count = max(1, len(self._client.scheduler_info()["workers"]))
        rows = max(1, min(_CHUNK_ROWS_COUNT, -(-len(part.target) // (2 * workers_count))))
        return xgboost_dask.DaskDMatrix(
            self._client,
            arrays.from_array(part.features, chunks=(rows, part.features.shape[1])),
            arrays.from_array(part.target, chunks=rows),
            weight=arrays.from_array(part.weights, chunks=rows),
            feature_names=list(part.names),
        )


def _imported(name: str) -> Any:  # noqa: ANN401 (none of these is typed)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PredictorsError(
            f"training on a cluster needs Dask ({error}); install moe-throttle[search]"
        ) from None
