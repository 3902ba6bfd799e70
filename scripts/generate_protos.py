"""Write the committed stubs in throttle/v1 from proto/throttle/v1. The only producer of them.

Generated code refuses runtimes older than its generator, so an old generator is used on purpose:
stubs of grpcio-tools 1.78 (protobuf 6.31.1) import under every later protobuf 6 and 7.

Use: make proto (installs the locked generator in an environment of its own), or
python scripts/generate_protos.py [--output DIRECTORY].
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO_DIRECTORY = ROOT / "proto"
GENERATOR_VERSION = "1.78."


def generate(output: Path) -> None:
    """Write every stub below `output`."""
    version = importlib.metadata.version("grpcio-tools")
    if not version.startswith(GENERATOR_VERSION):
        raise SystemExit(
            f"grpcio-tools is {version}; allowed: {GENERATOR_VERSION}*; use: make proto"
        )
    sources = sorted(str(p.relative_to(PROTO_DIRECTORY)) for p in PROTO_DIRECTORY.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO_DIRECTORY}"]
    command += [f"--{kind}_out={output}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    # The mypy plugins are found beside the interpreter that runs this.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    subprocess.run(  # noqa: S603 - fixed words
        [*command, *sources], check=True, cwd=PROTO_DIRECTORY, env={**os.environ, "PATH": path}
    )
    for stub in (output / "throttle" / "v1").glob("*_pb2_grpc.py*"):
        # A file without a service yields a stub without content.
        if "service" not in stub.name:
            stub.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT, help="folder that holds throttle/v1")
    arguments = parser.parse_args()
    (arguments.output / "throttle" / "v1").mkdir(parents=True, exist_ok=True)
    generate(arguments.output)
