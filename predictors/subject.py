"""What a set of records is about: one model, spread in one way, on one kind of GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from predictors.analytic import NominalGpu, gpu_by_name
from predictors.architecture import ModelArchitecture, from_catalogue, from_config_json
from predictors.errors import RecordsError
from predictors.features import Parallelism

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from predictors.dataset import Records


@dataclass(frozen=True, slots=True)
class Subject:
    """What the records are about.

    Attributes:
        gpu: Nominal figures of the GPU.
        architecture: Dimensions of the model.
        parallelism: How the model is spread.
        clocks_mhz: Clocks that the GPU supports, rising.
        provenance: "measured" or "simulated".
        engine: Engine name, version, formats and limits.
    """

    gpu: NominalGpu
    architecture: ModelArchitecture
    parallelism: Parallelism
    clocks_mhz: tuple[int, ...]
    provenance: str
    engine: Mapping[str, Any]


def describe(records: Records) -> Subject:
    """What the records are about.

    Raises:
        RecordsError: If the files disagree; the message names what and the values.
    """
    described = list(records.metadata.values())

    def only(what: str, values: Iterable[Any]) -> Any:  # noqa: ANN401 (whatever is compared)
        distinct = sorted({str(value): value for value in values}.items())
        if len(distinct) != 1:
            shown = ", ".join(name for name, _ in distinct)
            raise RecordsError(f"{what} of the records is {shown}; allowed: one for all files")
        return distinct[0][1]

    def registered(key: str, default: object = "") -> list[Any]:
        return [item.registration.get(key, default) for item in described]

    gpu = gpu_by_name(only("gpu_name", (gpu_by_name(item.gpu_name).name for item in described)))
    config = str(only("model_config_json", registered("model_config_json")))
    name = str(only("model_name", registered("model_name")))
    formats = (
        str(only("weight_dtype", registered("weight_dtype"))),
        str(only("kv_dtype", registered("kv_dtype"))),
    )
    architecture = (
        from_config_json(config, name, *formats)
        if config.strip()
        else from_catalogue(name, *formats)
    )
    engine_keys = (
        "engine_name",
        "engine_version",
        "weight_dtype",
        "kv_dtype",
        "pipeline_parallel_count",
        "data_parallel_count",
        "role",
        "running_requests_limit",
        "batched_tokens_limit",
        "kv_blocks_count",
        "kv_block_tokens",
    )
    return Subject(
        gpu,
        architecture,
        Parallelism(
            int(only("tensor_parallel_count", registered("tensor_parallel_count", 1)) or 1),
            int(only("expert_parallel_count", registered("expert_parallel_count", 1)) or 1),
        ),
        tuple(only("gpu_clocks_mhz", (item.gpu_clocks_mhz for item in described))),
        str(only("provenance", (item.provenance for item in described))),
        {key: described[0].registration.get(key) for key in engine_keys},
    )
