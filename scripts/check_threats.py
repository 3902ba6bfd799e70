"""Removes each defence of tests/operations/threats.toml in a copy of the tree; its test must fail.

Use: check_threats.py [THREAT...]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "operations" / "threats.toml"
#: pytest's exit status when tests ran and some failed; every other one proves nothing.
TESTS_FAILED = 1
_COPIED = ("docker", "docs", "models", "predictors", "proto", "scripts", "tests", "throttle")


def main(names: list[str]) -> int:
    """Check the named threats, or all; 0 if each test fails without its defence."""
    threats = tomllib.loads(LIST.read_text("utf-8"))
    unproven = []
    for name in names or threats:
        with tempfile.TemporaryDirectory() as folder:
            proven = _fails_without(threats[name], Path(folder))
        print(f"{'ok       ' if proven else 'UNPROVEN '} {name}", flush=True)
        if not proven:
            unproven.append(name)
    return 1 if unproven else 0


def _fails_without(threat: dict[str, str], folder: Path) -> bool:
    for name in _COPIED:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    source = folder / threat["file"]
    text = source.read_text("utf-8")
    if text.count(threat["defence"]) != 1:
        print(f"  {threat['file']} has its defence {text.count(threat['defence'])} times, not once")
        return False
    source.write_text(text.replace(threat["defence"], threat["without"]), "utf-8")
    result = subprocess.run(  # noqa: S603 - our own tests
        [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "300", threat["test"]],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != TESTS_FAILED:
        print(result.stdout[-2000:], result.stderr[-1000:])
    return result.returncode == TESTS_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
