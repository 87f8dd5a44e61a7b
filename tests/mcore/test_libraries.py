"""Transformer Engine is pointed to the cuDNN that torch has loaded."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from ra3_megatron.mcore import libraries
from ra3_megatron.mcore.hardware import has_compiler
from ra3_megatron.mcore.libraries import cudnn_version, loaded_from, share_cudnn

MAPS = """\
7f00-7f01 r--p 00000000 08:01 12 /usr/lib/libc.so.6
7f02-7f03 r--p 00000000 08:01 13 {folder}/libcudnn_graph.so.9
7f04-7f05 r-xp 00000000 08:01 14 {folder}/libcudnn.so.9
7f06-7f07 rw-p 00000000 00:00 0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "nvidia" / "cudnn" / "lib"
    found.mkdir(parents=True)
    for name in ("libcudnn.so.9", "libcudnn_graph.so.9", "libcudnn_ops.so.9", "other.so.1"):
        (found / name).touch()
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(libraries, "_maps", lambda: MAPS.format(folder=found).splitlines())
    return found


def test_the_one_that_is_loaded_is_named_and_loaded_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded.append(Path(path).name))
    environment: dict[str, str] = {}
    assert share_cudnn(environment) == folder
    assert environment == {"CUDNN_HOME": str(folder)}
    assert loaded == ["libcudnn.so.9", "libcudnn_graph.so.9", "libcudnn_ops.so.9"]


@pytest.mark.parametrize(("named", "stays"), [("{parent}", True), ("{folder}", True), ("/usr", False)])
def test_another_one_cannot_be_used(folder: Path, monkeypatch: pytest.MonkeyPatch, named: str, stays: bool) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda path: None)
    before = named.format(parent=folder.parent, folder=folder)
    environment = {"CUDNN_HOME": before}
    share_cudnn(environment)
    assert environment["CUDNN_HOME"] == (before if stays else str(folder))


def test_where_torch_has_loaded_none_nothing_happens() -> None:
    environment: dict[str, str] = {}
    assert loaded_from(["7f00-7f01 r--p 00000000 08:01 12 /usr/lib/libc.so.6"]) is None
    assert share_cudnn(environment) is None and not environment  # torch for CPUs


def test_behind_another_one_it_is_too_late(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError(
            "cuDNN version incompatibility: PyTorch was compiled against 9.19. PyTorch already comes with"
        )

    monkeypatch.setattr(torch.backends.cudnn, "version", refuse)
    environment: dict[str, str] = {}
    assert share_cudnn(environment) is None and not environment


def test_the_version_or_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cudnn_version() == (None, "this torch has none")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert cudnn_version() == ("9.19.0", "")

    def refuse() -> None:
        raise RuntimeError(
            "cuDNN version incompatibility: PyTorch was compiled against 9.19. PyTorch already comes with"
        )

    monkeypatch.setattr(torch.backends.cudnn, "version", refuse)
    assert cudnn_version() == (None, "cuDNN version incompatibility: PyTorch was compiled against 9.19")


@pytest.mark.parametrize(
    ("commands", "named", "headers", "works"),
    [
        (("gcc",), None, True, True),
        (("clang",), None, True, True),
        (("gcc",), None, False, False),
        (("cc",), None, True, False),
        (("gcc",), "nowhere/icc", True, False),
        (("icc",), "icc", True, True),
    ],
)
def test_a_compiler_is_one_that_triton_can_use(
    commands: tuple[str, ...],
    named: str | None,
    headers: bool,
    works: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes CC, gcc or clang, and includes Python.h, which Debian and others have in a package of its own."""
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr("shutil.which", lambda command: f"/usr/bin/{command}" if command in commands else None)
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.delenv("CC", raising=False)
    if named is not None:
        monkeypatch.setenv("CC", named)
    assert has_compiler.__wrapped__() is works
