"""A made run, built once, copied where a test changes it."""

import shutil
from pathlib import Path

import pytest
from made_run import make_run


@pytest.fixture(scope="session")
def _made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(_made_run: Path, tmp_path: Path) -> Path:
    """A finished run folder of one's own."""
    return Path(shutil.copytree(_made_run, tmp_path / "run"))
