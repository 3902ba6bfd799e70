"""Compiled code that is kept on disk follows the sources that it was made of."""

from __future__ import annotations

import pytest

compiling = pytest.importorskip("predictors.compiling", reason="numba is an optional extra")


def _plus_one(value):
    return value + 1


def test_a_change_of_any_source_changes_the_digest(tmp_path):
    (tmp_path / "a.py").write_text("A = 1")
    before = compiling.sources_digest([tmp_path])
    assert compiling.sources_digest([tmp_path]) == before
    (tmp_path / "a.py").write_text("A = 2")
    changed = compiling.sources_digest([tmp_path])
    (tmp_path / "b.py").write_text("")
    assert len({before, changed, compiling.sources_digest([tmp_path])}) == 3


def test_code_is_kept_for_one_digest_only():
    first = compiling.compiler("one")(_plus_one)
    assert first(1) == 2
    again, other = (compiling.compiler(digest)(_plus_one) for digest in ("one", "other digest"))
    assert again(1) == other(1) == 2
    assert sum(again.stats.cache_hits.values()) == 1
    assert first.stats.cache_path == other.stats.cache_path
    keys = {compiler._cache._index_key((), _Codegen())[-1] for compiler in (again, other)}
    assert keys == {"one", "other digest"}


class _Codegen:
    def magic_tuple(self):
        return ()
