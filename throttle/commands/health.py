"""`throttle health`: ask a daemon whether it serves; for container health checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpc_health.v1 import health_pb2, health_pb2_grpc

from throttle.commands.asking import add_target, daemon_channel
from throttle.v1 import throttle_service_pb2

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "health", help="ask a daemon whether it serves", description="Exit 0 if it serves, else 1."
    )
    add_target(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the health; 0 when the service is serving."""
    service = throttle_service_pb2.DESCRIPTOR.services_by_name["ThrottleService"].full_name
    with daemon_channel(arguments) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=service), timeout=arguments.timeout_seconds
        )
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1
