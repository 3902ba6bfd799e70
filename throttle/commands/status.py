"""`throttle status`: ask a daemon what it is doing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from google.protobuf import json_format

from throttle.commands.asking import add_target, daemon_channel
from throttle.v1 import (
    decision_pb2,
    engine_pb2,
    throttle_service_pb2,
    throttle_service_pb2_grpc,
)

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("status", help="ask a daemon what it is doing")
    add_target(parser)
    parser.add_argument(
        "--json", action="store_true", help="print GetStatusResponse as JSON, every field present"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the status."""
    with daemon_channel(arguments) as channel:
        status = throttle_service_pb2_grpc.ThrottleServiceStub(channel).GetStatus(
            throttle_service_pb2.GetStatusRequest(), timeout=arguments.timeout_seconds
        )
    if arguments.json:
        document = json_format.MessageToDict(
            status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        print(json.dumps(document, indent=2, sort_keys=True))
        return 0
    print(f"throttle {status.version}, up {status.uptime_seconds:.0f} s")
    for gpu in status.gpus:
        print(_gpu_line(gpu))
    for engine in status.engines:
        print(_engine_line(engine))
    if not status.engines:
        print("no engine is connected")
    return 0


def _gpu_line(gpu: throttle_service_pb2.GpuStatus) -> str:
    target = f"{gpu.target_clock_mhz} MHz" if gpu.target_clock_mhz else "default"
    line = f"gpu {gpu.gpu_uuid}: target {target}, "
    if gpu.reading_problem:
        line += f"not readable ({gpu.reading_problem})"
    else:
        line += f"runs at {gpu.observed_clock_mhz} MHz, {gpu.power_watts:.0f} W"
        if gpu.HasField("temperature_celsius"):
            line += f", {gpu.temperature_celsius:.0f} C"
        if gpu.clock_event_reasons:
            line += f" ({', '.join(gpu.clock_event_reasons)})"
    state = throttle_service_pb2.ClockState.Name(gpu.clock_state).removeprefix("CLOCK_STATE_")
    line += f", clock {'unknown' if state == 'UNSPECIFIED' else state.lower()}"
    if gpu.problem:
        line += f", cannot be relied on ({gpu.problem})"
    return f"{line}, {'held by ' + gpu.engine_id if gpu.engine_id else 'free'}"


def _engine_line(engine: throttle_service_pb2.EngineStatus) -> str:
    mode = engine_pb2.ControlMode.Name(engine.mode).removeprefix("CONTROL_MODE_").lower()
    line = (
        f"engine {engine.engine_id}: {mode}, bundle {engine.bundle or 'none'}, "
        f"{engine.states_count} states, {engine.clock_changes_count} clock changes"
    )
    if engine.state_age_seconds >= 0:
        line += f", last state {engine.state_age_seconds:.1f} s ago"
    energy = engine.energy
    if energy.requests_joules or energy.idle_joules:
        line += f", {energy.requests_joules:.0f} J for requests, {energy.idle_joules:.0f} J idle"
    if engine.HasField("last_decision"):
        decision = engine.last_decision
        reason = decision_pb2.DecisionReason.Name(decision.reason)
        line += (
            f", last decision {decision.target_clock_mhz or 'default'} "
            f"({reason.removeprefix('DECISION_REASON_').lower()})"
        )
        if default := decision.default_long_run_power_watts:
            saving = 1.0 - decision.long_run_power_watts / default
            line += f", predicted to save {saving:.0%} of {default:.0f} W"
    return line
