"""Cube roots and exponentials are those of the C library."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

elementary = pytest.importorskip("predictors.elementary", reason="numba is an optional extra")


@settings(deadline=None)
@given(st.lists(st.floats(1e-200, 1e200), min_size=1, max_size=40))
def test_cube_roots_are_right_to_a_few_units_in_the_last_place(drawn):
    values = np.array(drawn)
    roots = np.empty(len(values))
    elementary.cube_roots(values, np.empty(len(values), np.int64), roots, len(values))
    np.testing.assert_allclose(roots, np.cbrt(values), rtol=2e-15)


@settings(deadline=None)
@given(st.lists(st.floats(-690.0, 690.0), min_size=1, max_size=40))
def test_exponentials_are_right_to_a_few_units_in_the_last_place(drawn):
    values = np.array(drawn)
    results = np.empty(len(values))
    elementary.exponentials(values, np.empty(len(values), np.int64), results, len(values))
    np.testing.assert_allclose(results, np.exp(values), rtol=2e-15)
