"""The decorators of everything that is compiled here."""

from __future__ import annotations

from pathlib import Path

from predictors import elementary
from predictors.compiling import compiler, sources_digest

_HERE = Path(__file__).parent

_DIGEST = sources_digest([_HERE, _HERE.parent, Path(elementary.__file__).parent])

#: Compiled anew when a source changes that may be in it: constants of the definitions, too. With
#: `fused`, products and sums may be rounded once.
compiled = compiler(_DIGEST)
fused = compiler(_DIGEST, fused=True)
