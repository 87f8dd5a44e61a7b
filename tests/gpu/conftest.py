"""What the tests of the suite work with. The suite itself runs without pytest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.evidence import Evidence
from tests.gpu.part import setting_of
from tests.gpu.setting import Setting


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return setting_of(True, tmp_path, tmp_path)


@pytest.fixture
def evidence(tmp_path: Path) -> Evidence:
    return Evidence(tmp_path / "part.json", "kernels", "a title", small=True)
