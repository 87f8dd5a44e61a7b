"""How a process of a layout tells the one that started it why it ended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ra3_megatron.config.errors import STOPPED, UNAVAILABLE, StoppedBySignal, Unavailable, UserError
from ra3_megatron.config.load import dump_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.verbs import processes
from ra3_megatron.verbs.processes import in_process


@pytest.mark.parametrize(
    ("said", "code", "file"),
    [
        (UserError("wrong"), 2, "error.000003"),
        (StoppedBySignal("wrong"), STOPPED, "stopped.000003"),
        (Unavailable("wrong"), UNAVAILABLE, "unavailable.000003"),
    ],
)
def test_what_a_process_says_is_left_in_a_file(
    said: Exception, code: int, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(RunConfig()))
    monkeypatch.setattr(sys, "argv", ["module", str(tmp_path / "config.yaml"), str(tmp_path), "more"])
    monkeypatch.setenv("RANK", "3")
    (tmp_path / processes._STARTER).write_text("7")
    parents: list[int] = []
    monkeypatch.setattr(processes, "end_with", parents.append)

    def fail(config: RunConfig, arguments: list[str]) -> None:
        assert arguments == ["more"]
        raise said

    assert in_process(fail) == code and parents == [7]
    assert (tmp_path / file).read_text() == "wrong"
