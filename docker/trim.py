"""Removes the parts of SciPy that XGBoost never loads: it needs sparse matrices, and brings all.

Run in the image's environment while it is built; tests/container predicts with the result.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import scipy
import xgboost  # noqa: F401 - loads what it needs

loaded = {name.split(".")[1] for name in sys.modules if name.startswith("scipy.")}
for folder in Path(scipy.__file__).parent.iterdir():
    if folder.is_dir() and folder.name not in loaded:
        shutil.rmtree(folder)
