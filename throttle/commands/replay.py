"""`throttle replay`: run the controller again over a recorded stream, decision by decision."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from predictors.dataset import METADATA_KEY, RecordsMetadata
from throttle.control.settings import ControlSettings
from throttle.control.state import EngineProfile, Mode, Role, Slos
from throttle.daemon.brains import ControllerFactory, GpuModel
from throttle.daemon.config import DaemonConfig
from throttle.daemon.layers import ConfigurationError, build, file_layer
from throttle.daemon.messages import StateReader
from throttle.daemon.recording import RecordedState, read_states
from throttle.errors import InvalidInputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from throttle.control.selection import Decision
    from throttle.daemon.brains import Brain


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "replay",
        help="run the controller again over a recorded stream",
        description="Feed a recorded stream to a fresh controller, at the recorded times, and "
        "print what it decides. The same recording, bundle and version give the same bytes.",
        allow_abbrev=False,
    )
    parser.add_argument("recording", type=Path, help="Parquet file that `throttle serve` wrote")
    parser.add_argument(
        "--bundle",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="bundle, or folder of bundles (models); a generic one is bound to the recorded engine",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file of `throttle serve`, of which [control] counts; defaults without it",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every decision")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Replay; 0 when every state is decided."""
    path: Path = arguments.recording
    metadata = read_metadata(path)
    profile = recorded_profile(metadata, str(path))
    settings = ControlSettings() if arguments.config is None else read_control(arguments.config)
    gpu = GpuModel(metadata.gpu_name, metadata.gpu_clocks_mhz)
    made = ControllerFactory(arguments.bundle, settings).build(profile, gpu)
    states = list(read_states(path))
    started = time.perf_counter()
    decisions = [decision_document(*each) for each in replay(states, profile, made.brain)]
    seconds = time.perf_counter() - started
    digest = decisions_digest(decisions)
    document = {
        "recording": path.name,
        "bundle": made.bundle,
        "control": asdict(settings),
        "provenance": metadata.provenance,
        "digest": digest,
        "decisions": decisions,
    }
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=0, sort_keys=True)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    _print(decisions, states, digest, seconds)
    return 0


def read_metadata(path: Path) -> RecordsMetadata:
    """What a recording says about its run.

    Raises:
        InvalidInputError: The file is no recording.
        NotFoundError: There is no such file.
    """
    import pyarrow as pa  # noqa: PLC0415 - an extra
    import pyarrow.parquet as pq  # noqa: PLC0415

    next(read_states(path), None)  # the common refusals
    try:
        found = (pq.read_schema(path).metadata or {}).get(METADATA_KEY)
    except (OSError, pa.ArrowException) as error:
        raise InvalidInputError(str(path), str(error), "a Parquet file of records") from None
    if found is None:
        raise InvalidInputError(str(path), "without metadata", "a file of `throttle serve`")
    return RecordsMetadata.from_json(found.decode(), str(path))


def read_control(path: Path) -> ControlSettings:
    """The [control] section of a configuration file; the rest need only be settings that exist.

    Raises:
        ConfigurationError: Lists everything that is wrong.
    """
    config, found = build(DaemonConfig, [file_layer(path)])
    problems = [text for _, text in found]
    if config is not None and not problems:
        problems += [f"control.{problem}" for problem in config.control.problems()]
    if problems or config is None:
        raise ConfigurationError(problems)
    return config.control


def recorded_profile(metadata: RecordsMetadata, source: str) -> EngineProfile:
    """The engine that was recorded.

    Raises:
        InvalidInputError: The registration lacks something.
    """
    fields = dict(metadata.registration)
    try:
        fields["role"] = Role[fields["role"].upper()]
        fields["mode"] = Mode[fields["mode"].upper()]
        fields["gpu_uuids"] = tuple(fields["gpu_uuids"])
        fields["default_slos"] = Slos(**fields["default_slos"])
        return EngineProfile(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"{source}: registration", str(error), "the fields of a registration"
        ) from None


def replay(
    states: Iterable[RecordedState], profile: EngineProfile, controller: Brain
) -> Iterator[tuple[int, Decision]]:
    """Decide after every recorded state; yields its sequence number and the decision.

    Args:
        states: In order.
        profile: The engine.
        controller: A fresh one for this engine.

    Raises:
        InvalidInputError: A state is not allowed.
    """
    reader = StateReader(profile)
    for recorded in states:
        state = reader.read(recorded.message)
        controller.observe(state, recorded.clock_observed_mhz)
        yield state.sequence_number, controller.decide(state)


def decision_document(sequence_number: int, decision: Decision) -> dict[str, Any]:
    """One decision for JSON; numbers keep every digit."""
    binding = decision.binding
    return {
        "sequence_number": sequence_number,
        "target_clock_mhz": decision.target_clock_mhz,
        "reason": decision.reason.name.lower(),
        "binding": None
        if binding is None
        else [binding.slo.name.lower(), binding.request_number, binding.slack_seconds],
        "predicted_iteration_seconds": decision.predicted_iteration_seconds,
        "predicted_power_watts": decision.predicted_power_watts,
        "cruise_clock_mhz": decision.cruise_clock_mhz,
        "lost_requests_count": decision.lost_requests_count,
    }


def decisions_digest(decisions: Iterable[dict[str, Any]]) -> str:
    """SHA-256 of all decisions, one JSON line each."""
    digest = hashlib.sha256()
    for decision in decisions:
        digest.update(json.dumps(decision, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _print(
    decisions: list[dict[str, Any]], states: list[RecordedState], digest: str, seconds: float
) -> None:
    reasons = collections.Counter(each["reason"] for each in decisions)
    clocks = [each["target_clock_mhz"] for each in decisions]
    changes = sum(one != other for one, other in itertools.pairwise(clocks))
    # What the GPUs had been told as a state came is the decision on the state before.
    recorded = [each.clock_target_mhz for each in states[1:]]
    same = sum(one == other for one, other in zip(clocks, recorded, strict=False))
    print(f"{len(decisions)} decisions in {seconds:.1f} s, {changes} changes of clock")
    print("reasons: " + ", ".join(f"{name} {count}" for name, count in reasons.most_common()))
    if recorded:
        print(f"{same} of {len(recorded)} as recorded")
    print(f"digest {digest}")
    if not decisions:
        print("throttle: the recording is empty", file=sys.stderr)
