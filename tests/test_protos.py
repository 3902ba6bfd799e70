"""The protocol's form, read from its descriptors, and that the committed stubs are current."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

from throttle.v1 import decision_pb2, engine_pb2, throttle_service_pb2

ROOT = Path(__file__).resolve().parent.parent
FILES = [engine_pb2.DESCRIPTOR, decision_pb2.DESCRIPTOR, throttle_service_pb2.DESCRIPTOR]
MESSAGES = [message for file in FILES for message in file.message_types_by_name.values()]
FIELDS = [field for message in MESSAGES for field in message.fields]
ENUMS = [enum for file in FILES for enum in file.enum_types_by_name.values()]

#: Blocks whose field names are those of ForwardPassMetrics, kept as its users know them.
FORWARD_PASS_METRICS = {"ScheduledRequests", "QueuedRequests"}
#: Numbers that are identifiers or order, not quantities.
UNITLESS = {"sequence_number", "request_number", "request_numbers"}
UNITS = re.compile(r"_(seconds|mhz|watts|joules|celsius|tokens|bytes|count|ratio)$")
NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_DOUBLE,
}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.full_name)
def test_numbers_are_signed_or_double_and_carry_their_unit(field):
    unsigned = {FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64}
    assert field.cpp_type not in unsigned
    assert field.cpp_type != FieldDescriptor.CPPTYPE_FLOAT
    if field.containing_type.name in FORWARD_PASS_METRICS or field.name in UNITLESS:
        return
    if field.cpp_type in NUMBERS:
        # Plural clock lists end in the unit too: candidate_clocks_mhz.
        assert UNITS.search(field.name), f"{field.full_name} names no unit"


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.full_name)
def test_enums_start_with_unspecified_and_prefix_their_values(enum):
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper()
    assert enum.values[0].name == f"{prefix}_UNSPECIFIED"
    assert enum.values[0].number == 0
    assert all(value.name.startswith(prefix + "_") for value in enum.values)


def test_every_message_field_enum_value_and_call_is_commented():
    for path in sorted((ROOT / "proto").rglob("*.proto")):
        before = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            text = line.strip()
            declares = re.match(r"(message|enum|service|rpc|oneof) |.+ = \d+;$", text)
            if declares and not text.startswith(("syntax", "package", "import", "//")):
                assert before.startswith("//"), f"{path.name}:{number}: no comment: {text}"
            before = text


def test_the_state_can_say_that_it_does_not_know():
    presence = {field.full_name for field in FIELDS if field.has_presence}
    for name in (
        "throttle.v1.IterationState.iteration_duration_seconds",
        "throttle.v1.KvCache.used_blocks_count",
        "throttle.v1.ExpertLoad.mean_active_experts_count",
        "throttle.v1.ScheduledRequests.num_decode_tokens",
        "throttle.v1.ServiceLevelObjectives.ttft_seconds",
    ):
        assert name in presence


def _generator():
    """The interpreter that has the locked generator: this one, or the environment of make proto."""
    try:
        importlib.metadata.version("grpcio-tools")
    except importlib.metadata.PackageNotFoundError:
        own = ROOT / ".venv-proto" / "bin" / "python"
        if own.exists():
            return str(own)
        if os.environ.get("CI"):
            pytest.fail("CI must run make proto-environment first")
        pytest.skip("the stub generator is not installed: make proto-environment")
    return sys.executable


def test_the_committed_stubs_are_what_the_protocol_generates(tmp_path):
    subprocess.run(
        [_generator(), ROOT / "scripts" / "generate_protos.py", "--output", tmp_path],
        check=True,
        capture_output=True,
    )
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "throttle" / "v1").iterdir()}
    committed = {
        path.name: path.read_bytes() for path in (ROOT / "throttle" / "v1").glob("*_pb2*.py*")
    }
    assert fresh.keys() == committed.keys()
    stale = [name for name, content in fresh.items() if committed[name] != content]
    assert not stale, f"run make proto: {stale}"
