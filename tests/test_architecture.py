"""The folders' one direction: who may import whom, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Part -> parts of this project that it may import. A part may always import itself.
ALLOWED = {
    "predictors": set(),
    "throttle.errors": set(),
    "throttle.v1": set(),
    "throttle.control": {"predictors", "throttle.errors"},
    "throttle.testing": {"predictors"},
    "throttle.actuation": {"throttle.errors"},
    "throttle.outbox": {"throttle.v1"},
    "throttle.client": {"throttle.outbox", "throttle.v1"},
    "throttle.asyncio_client": {"throttle.client", "throttle.v1"},
    "throttle.credentials": set(),
    "throttle.engines": {
        "throttle.asyncio_client",
        "throttle.client",
        "throttle.credentials",
        "throttle.outbox",
        "throttle.v1",
    },
    "throttle.simulation": {
        "predictors",
        "throttle.control",
        "throttle.errors",
        "throttle.v1",
    },
    "throttle.daemon": {
        "predictors",
        "throttle",
        "throttle.actuation",
        "throttle.control",
        "throttle.errors",
        "throttle.v1",
    },
    "throttle.bench": {
        "predictors",
        "throttle.actuation",
        "throttle.client",
        "throttle.control",
        "throttle.daemon",
        "throttle.errors",
        "throttle.simulation",
        "throttle.v1",
    },
    "throttle.commands": {
        "predictors",
        "throttle",
        "throttle.actuation",
        "throttle.bench",
        "throttle.client",
        "throttle.control",
        "throttle.credentials",
        "throttle.daemon",
        "throttle.engines",
        "throttle.errors",
        "throttle.simulation",
        "throttle.v1",
    },
    "throttle.cli": {"throttle", "throttle.commands", "throttle.errors"},
}

#: Part -> outside packages that it must not touch.
FORBIDDEN = {
    "throttle.control": {"grpc", "google", "pynvml", "pandas", "xgboost", "time", "random"},
    "throttle.actuation": {"grpc", "google", "numpy", "pandas", "xgboost"},
    "predictors": {"grpc", "google", "pynvml"},
    "throttle.engines": {"numpy", "pandas", "xgboost", "structlog", "pynvml"},
}


def _part(module):
    parts = module.split(".")
    if parts[0] == "predictors":
        return "predictors"
    return ".".join(parts[:2]) if len(parts) > 1 else "throttle"


def _modules():
    for folder in ("throttle", "predictors"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if "_pb2" not in path.name:
                yield ".".join(relative.with_suffix("").parts).removesuffix(".__init__"), path


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module
            # `from throttle import client` names a part only through its aliases.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("module", "path"), list(_modules()), ids=str)
def test_imports_run_one_way(module, path):
    part = _part(module)
    for name in _imports(path):
        top = name.split(".")[0]
        assert top not in FORBIDDEN.get(part, set()), f"{module} imports {name}"
        if top in {"throttle", "predictors"} and part != "throttle":
            imported = _part(name)
            if imported in ALLOWED:
                allowed = ALLOWED[part] | {part}
                assert imported in allowed, f"{module} imports {name}"


def test_every_package_says_what_it_is_for_and_exports_nothing():
    for path in [*ROOT.glob("throttle/**/__init__.py"), *ROOT.glob("predictors/**/__init__.py")]:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path}: no docstring"
        rest = [node for node in tree.body[1:] if not isinstance(node, ast.Assign)]
        assert not rest, f"{path}: more than a docstring"


def test_the_plant_is_never_imported_by_the_predictors():
    for module, path in _modules():
        if module.startswith("predictors"):
            assert not any("simulation" in name for name in _imports(path))


def test_the_client_needs_nothing_but_grpc_protobuf_and_the_standard_library():
    """Every other package is made unimportable, as in an engine's environment without them."""
    code = """
import sys

# cython_runtime is grpc's own; typing_extensions is what grpcio itself requires.
allowed = {"throttle", "grpc", "google", "cython_runtime", "typing_extensions"}
allowed |= set(sys.stdlib_module_names)


class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Nothing())
import throttle.asyncio_client
import throttle.client
import throttle.credentials
import throttle.engines.vllm_registration
import throttle.engines.vllm_schedule
import throttle.engines.vllm_statistics

loaded = {name.split(".")[0] for name in sys.modules}
assert "grpc" in loaded
assert not {"numpy", "pandas", "xgboost", "structlog", "pynvml"} & loaded
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_the_daemon_starts_without_pandas_and_the_training_half():
    code = """
import sys
import throttle.daemon.assembly

loaded = {name.split(".")[0] for name in sys.modules}
assert not {"pandas", "pyarrow", "matplotlib", "xgboost", "pynvml"} & loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
