"""Cleaning, filters, de-duplication, limit, split: what is kept, what is counted, what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.config.data import CorpusConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.corpus.prepare import Counts, Text, clean, count_lines, prepare, read_texts
from ra3_megatron.corpus.splits import split_of


def rows(folder: Path, texts: list[str]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def run(folder: Path, texts: list[str], **settings: Any) -> tuple[Counts, list[Text], list[Text]]:
    defaults = {"source": "jsonl", "path": rows(folder, texts), "min_lines": 1, "valid_fraction": 0.5}
    counts, _ = prepare(CorpusConfig(**{**defaults, **settings}), folder)
    assert not (folder / "all.jsonl").exists()
    return counts, list(read_texts(folder / "train.jsonl")), list(read_texts(folder / "valid.jsonl"))


def code(number: int, lines: int = 2) -> str:
    return "".join(f"x{number} = {line}\n" for line in range(lines))


@given(st.text(st.sampled_from("ab \t\n\r\f\v#"), max_size=30))
def test_clean(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    visible = [line for line in text.split("\n") if line.strip(" \t\r\f\v")]
    assert [line for line in cleaned.split("\n") if line.strip(" \t\r\f\v")] == visible
    if visible:
        assert cleaned.startswith(visible[0]) and cleaned.endswith(visible[-1] + "\n")
    else:
        assert cleaned == ""


def test_clean_keeps_indentation_trailing_spaces_and_inner_blank_lines() -> None:
    assert clean("\n  \n  x = 1  \n\n\ny = '\u2028'\t\n \n\n") == "  x = 1  \n\n\ny = '\u2028'\t\n"


def test_lines_are_counted_as_the_mid_training_text_has_them() -> None:
    text = 'a = """\n# not a comment\n"""\n# comment\n\nb = 1  # tail\n'
    assert count_lines(text, CorpusConfig(human_comments="strip")) == 4
    assert count_lines(text, CorpusConfig(human_comments="as_thoughts")) == 4
    assert count_lines(text, CorpusConfig(human_comments="keep")) == 5


def test_everything_left_out_is_counted(tmp_path: Path) -> None:
    texts = [code(n) for n in range(20)]
    texts += [code(1), "\n" + code(2) + "\n\n", "x = 1\n", code(5, 9), "# only\n# comments\n", ""]
    counts, train, valid = run(tmp_path, texts, min_lines=2, max_lines=8)
    assert counts == Counts(
        texts=26, too_few_lines=3, too_many_lines=1, duplicates=2, train=len(train), valid=len(valid)
    )
    assert len(train) + len(valid) == 20 == counts.documents
    assert {text.code for text in train + valid} == {code(n) for n in range(20)}
    assert "duplicates 2" in counts.summary() and "over_limit" not in counts.summary()


def test_documents_keep_the_order_of_the_source(tmp_path: Path) -> None:
    _, train, valid = run(tmp_path, [code(n) for n in range(30)])
    for split in (train, valid):
        numbers = [int(text.name.partition("#")[2]) for text in split]
        assert len(numbers) > 3 and numbers == sorted(numbers)


def test_the_limit_keeps_the_smallest_digests_whatever_the_order(tmp_path: Path) -> None:
    texts = [code(n) for n in range(40)]
    kept = []
    for order, name in ((texts, "a"), (texts[::-1], "b")):
        (tmp_path / name).mkdir()
        counts, train, valid = run(tmp_path / name, order, max_documents=12)
        assert counts.documents == 12 and counts.over_limit == 28
        kept.append({text.code for text in train + valid})
    assert kept[0] == kept[1]
    (tmp_path / "c").mkdir()
    assert run(tmp_path / "c", texts, max_documents=40)[0].over_limit == 0


def test_texts_that_differ_in_comments_alone_are_one_document(tmp_path: Path) -> None:
    """Mid-training reads them without, so that one could be trained on and the other held out."""
    texts = [f"# copy {copy}\n{code(n)}" for copy in range(6) for n in range(10)]
    (tmp_path / "a").mkdir()
    counts, train, valid = run(tmp_path / "a", texts)
    assert counts.duplicates == 50 and counts.documents == 10
    assert {text.code for text in train + valid} == set(texts[:10]), "the first of each stays, with its comment"
    (tmp_path / "b").mkdir()
    assert run(tmp_path / "b", texts, human_comments="keep")[0].duplicates == 0, "both texts have the comments"
    (tmp_path / "c").mkdir()
    read = run(tmp_path / "c", texts, human_comments="keep", warm_start_comments="strip")
    assert read[0].duplicates == 50


def test_a_limit_goes_by_the_whole_text(tmp_path: Path) -> None:
    """Comments included, whatever they are for."""
    texts = [f"# number {n}\n{code(n)}" for n in range(40)]
    counts, train, valid = run(tmp_path, texts, max_documents=12)
    by_digest = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert counts.over_limit == 28 and {text.code for text in train + valid} == set(by_digest[:12])


def test_functions_of_one_file_share_a_split_and_the_share_is_about_right(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(60):
        functions = (f"def f{n}():\n    return {number}\n" for n in range(5))
        (source / f"m{number}.py").write_text("".join(functions))
    config = CorpusConfig(source="folder", path=str(source), min_lines=2, valid_fraction=0.3)
    counts, files = prepare(config, tmp_path)
    splits = [{t.name.partition("::")[0] for t in read_texts(tmp_path / f"{s}.jsonl")} for s in ("train", "valid")]
    assert not splits[0] & splits[1]
    assert 8 <= len(splits[1]) <= 28
    assert [(entry.file, entry.texts) for entry in files][:2] == [("m0.py", 5), ("m1.py", 5)]
    assert len({entry.sha256 for entry in files}) == 60
    assert counts.texts == 300


def test_a_split_never_moves() -> None:
    """A change here moves documents between the splits of every existing corpus."""
    assert [split_of(f"{name}.py", 0.5) for name in "abcdef"] == [
        "train",
        "valid",
        "train",
        "valid",
        "valid",
        "train",
    ]
    assert split_of("a.py", 1e-9) == "train" and split_of("a.py", 1 - 1e-9) == "valid"


def test_empty_corpora_are_refused_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"empty after filtering \(texts 2, too_few_lines 2\)") as caught:
        run(tmp_path, [code(1), code(2)], min_lines=3)
    assert "corpus.min_lines=3" in str(caught.value)
    with pytest.raises(UserError, match=r"empty after filtering \(texts 0\)"):
        run(tmp_path, [])
    with pytest.raises(UserError, match=r"the valid split is empty \(texts 2, train 2\)"):
        run(tmp_path, [code(1), code(2)], valid_fraction=1e-9)


def test_on_text_is_called_for_each_text(tmp_path: Path) -> None:
    calls: list[int] = []
    config = CorpusConfig(source="jsonl", path=rows(tmp_path, [code(n) for n in range(20)]), valid_fraction=0.5)
    with pytest.raises(UserError):
        prepare(config, tmp_path, on_text=lambda: calls.append(1))
    assert len(calls) == 20
