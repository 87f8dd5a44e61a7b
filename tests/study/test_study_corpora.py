"""One corpus for several cells: what is linked, and that a cell which builds anew leaves the others' files alone."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from made_study import study_of

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.corpus.build import build_corpus, open_corpus
from ra3_megatron.study import corpora
from ra3_megatron.study.corpora import share_corpus
from ra3_megatron.study.plan import cells_of, resolve
from tests.run.small_run import write_corpus


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_cells_share_the_files_of_one_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = write_corpus(tmp_path / "code", files=6, functions=4)
    settings = {"corpus": {"path": str(code), "valid_fraction": 0.3}, "tokenizer.vocab_size": 320}
    arms = {"a": {}, "b": {"estep.horizon": 1}, "c": {"corpus.max_lines": 8}}
    study = study_of(tmp_path, arms=arms, settings=settings)
    configs = resolve(study, cells_of(study))
    folders = {name[0]: study.path / "cells" / name for name in configs}
    a, b, c = (configs[f"{name},seed=1"] for name in "abc")
    others = list(folders.values())
    folders["b"].mkdir(parents=True)
    assert share_corpus(folders["b"], b, others) is None  # nobody has one yet

    build_corpus(a, folders["a"] / "corpus")
    before = digests(folders["a"] / "corpus")
    assert share_corpus(folders["b"], b, others) == folders["a"]
    assert share_corpus(folders["b"], b, others) is None  # it has one now
    one, other = (folders[name] / "corpus" / "mid" / "train_ids.bin" for name in "ab")
    assert one.stat().st_ino == other.stat().st_ino
    assert open_corpus(b, folders["b"] / "corpus").manifest.counts.documents > 0
    assert share_corpus(folders["c"], c, others) is None and not folders["c"].exists()

    build_corpus(c, folders["b"] / "corpus")  # the folder is replaced, as for a cell with other settings
    assert digests(folders["a"] / "corpus") == before
    assert digests(folders["b"] / "corpus") != before

    shutil.rmtree(folders["b"] / "corpus")
    monkeypatch.setattr(corpora.os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    assert share_corpus(folders["b"], b, others) == folders["a"]
    assert digests(folders["b"] / "corpus") == before and one.stat().st_ino != other.stat().st_ino
    (folders["a"] / "corpus" / "manifest.json").write_text("{")
    shutil.rmtree(folders["b"] / "corpus")
    assert share_corpus(folders["b"], b, others) is None
