"""`throttle release`: return GPUs to default clocks now."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from throttle.commands.asking import add_target, daemon_channel
from throttle.v1 import throttle_service_pb2, throttle_service_pb2_grpc

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "release",
        help="return GPUs to default clocks now",
        description="Give the GPUs of one engine, or of all, back to default clocks. They are not "
        "throttled again until their engine registers anew.",
    )
    parser.add_argument("engine_id", nargs="?", default="", help="default: every engine")
    add_target(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Release, and print the GPUs that were held."""
    with daemon_channel(arguments) as channel:
        answer = throttle_service_pb2_grpc.ThrottleServiceStub(channel).ReleaseControl(
            throttle_service_pb2.ReleaseControlRequest(engine_id=arguments.engine_id),
            timeout=arguments.timeout_seconds,
        )
    if not answer.released_gpu_uuids:
        print("no GPU was held", file=sys.stderr)
    for uuid in answer.released_gpu_uuids:
        print(uuid)
    return 0
