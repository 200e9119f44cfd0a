from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.small_artifact import build


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def built(target: Path) -> Path:
    build(target)
    return target
