from __future__ import annotations

import pytest

from tests.control.scenes import Engine


@pytest.fixture
def engine():
    return Engine()
