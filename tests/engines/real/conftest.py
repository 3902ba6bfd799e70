from __future__ import annotations

import subprocess
import sys

import pytest

from tests.engines.real.processes import ROOT, Daemon, engine_python


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """This project as a wheel."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT,
        ],
        check=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def vllm_environment(wheel):
    """An environment with vLLM and this project's base package."""
    python = engine_python("vllm")
    subprocess.run(
        [
            python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--force-reinstall", wheel,
        ],
        check=True,
    )  # fmt: skip
    return python


@pytest.fixture
def daemon(tmp_path):
    folder = tmp_path / "daemon"
    folder.mkdir()
    daemon = Daemon(folder)
    yield daemon
    daemon.stop()
