from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import CONFIG, Ra3, write_corpus


@pytest.fixture(scope="session")
def ra3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ra3]:
    """The `ra3` command."""
    command = Ra3(tmp_path_factory.mktemp("command"))
    yield command
    command.close()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the Python files that small runs read."""
    return write_corpus(tmp_path_factory.mktemp("source") / "code")


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """Configuration of a small run with two iterations of RA3 and of the control."""
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(CONFIG.replace("CORPUS", str(source)))
    return file


@pytest.fixture(scope="session")
def finished(ra3: Ra3, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run; its terminal output is in `output.txt` beside it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    outcome = ra3("train", config, f"run_dir={run}")
    run.with_name("output.txt").write_text(outcome.output)
    return run
