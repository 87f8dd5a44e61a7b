"""Atomic writes and errors of reading."""

import os
from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.run_folder import RunFolder, read_json, require_run, write_json, write_text


def test_failed_write_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_text_is_written_byte_for_byte_with_ordinary_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_text(path, "ä\r\n\n")
    plain = tmp_path / "plain"
    plain.touch()
    assert path.read_bytes() == b"\xc3\xa4\r\n\n"
    assert path.stat().st_mode == plain.stat().st_mode


def test_json_refuses_what_it_cannot_express(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_unreadable_json_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"y\.json: cannot be read"):
        read_json(tmp_path / "y.json")
    (tmp_path / "z.json").write_text('{"elbo": -Infinity, "code_ce": NaN}')
    with pytest.raises(UserError, match=r"z\.json: not valid JSON \(-Infinity is no number of JSON\)$"):
        read_json(tmp_path / "z.json")


def test_only_a_folder_with_a_configuration_is_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        require_run(tmp_path / "missing")
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        require_run(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert require_run(str(tmp_path)) == RunFolder(tmp_path)
