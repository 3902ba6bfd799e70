"""A request's own latency limits, as the ecosystem's gateways write them.

The Gateway API Inference Extension and llm-d use the headers `x-slo-ttft-ms` and `x-slo-tpot-ms`.
Headers end at the API server; inside an engine the same names travel with the sampling parameters,
which in vLLM's HTTP API are the body's `vllm_xargs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from throttle.v1 import engine_pb2

#: Header -> field of `ServiceLevelObjectives`.
SLO_HEADERS: Final = {
    "x-slo-ttft-ms": "ttft_seconds",
    "x-slo-tpot-ms": "tpot_seconds",
    "x-slo-tbt-ms": "tbt_seconds",
    "x-slo-e2e-ms": "e2e_seconds",
}


def read_slos(values: Mapping[str, object], slos: engine_pb2.ServiceLevelObjectives) -> None:
    """Write the limits among `values` into `slos`; what is no positive number is left out."""
    for header, field in SLO_HEADERS.items():
        value = values.get(header)
        if value is None:
            continue
        try:
            milliseconds = float(str(value))
        except ValueError:
            continue
        if 0.0 < milliseconds < float("inf"):
            setattr(slos, field, milliseconds / 1e3)
