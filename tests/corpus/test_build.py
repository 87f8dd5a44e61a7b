"""Building a corpus: what it holds, that it is whole or not there, that two builds agree, every refusal."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus import build, encode
from ra3_megatron.corpus.build import KINDS, Corpus, build_corpus, open_corpus
from ra3_megatron.corpus.indexed import to_document
from ra3_megatron.corpus.splits import SPLITS
from ra3_megatron.text.latents import code_text, compose, full_text
from ra3_megatron.text.segment import strip_comment_lines
from ra3_megatron.text.transcript import Role

FUNCTION = """\
def step_{n}(values, scale={n}):
    # add the values up
    total = 0
    for value in values:
        # each one scaled

        total += value * scale  # in place

    return "{n} # no comment", total
"""


def source(folder: Path, functions: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(functions):
        (folder / f"m{number}.py").write_text(FUNCTION.replace("{n}", str(number)))
    return folder


def configuration(path: Path, context: int = 256, **corpus: Any) -> RunConfig:
    sections = {name: corpus.pop(name) for name in ("text", "tokenizer") if name in corpus}
    return RunConfig.model_validate(
        {
            "corpus": {"source": "folder", "path": str(path), "valid_fraction": 0.3, **corpus},
            "tokenizer": {"vocab_size": 350},
            "model": {"context_length": context},
            **sections,
        }
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    base = tmp_path_factory.mktemp("corpus")
    return build_corpus(configuration(source(base / "code")), base / "built")


# -- content ----------------------------------------------------------------------------------------------------------


def test_files_and_counts(corpus: Corpus) -> None:
    manifest = corpus.manifest
    assert sorted(tree(corpus.folder)) == sorted(["manifest.json", *manifest.files])
    assert {name.partition("/")[0] for name in manifest.files} == {"text", "tokenizer", "warm", "mid", "sources.jsonl"}
    assert manifest.counts.documents == 40 and manifest.counts.train > manifest.counts.valid > 0
    for kind in KINDS:
        for split in SPLITS:
            store, counts = corpus.store(kind, split), manifest.stores[f"{kind}/{split}"]
            assert counts.documents == len(store) == getattr(manifest.counts, split)
            assert counts.tokens == store.num_tokens == sum(transcript.num_tokens for transcript in store)
            assert counts.lines == sum(transcript.num_lines for transcript in store)
            assert counts.code_tokens == counts.tokens - len(store)  # all but bos
    assert manifest.tokenizer == {"vocab_size": 350, "fingerprint": corpus.tokenizer.fingerprint}
    assert manifest.versions["python"] and manifest.versions["ra3_megatron"] and manifest.versions["megatron-core"]
    sources = [json.loads(line) for line in (corpus.folder / "sources.jsonl").read_text().splitlines()]
    assert len(sources) == 40 and sources[0]["file"] == "m0.py" and sources[0]["texts"] == 1


def test_transcripts_hold_the_texts(corpus: Corpus) -> None:
    for split in SPLITS:
        texts = list(corpus.texts(split))
        for text, warm, mid in zip(texts, corpus.store("warm", split), corpus.store("mid", split), strict=True):
            assert warm.document == mid.document == text.name
            assert code_text(warm, corpus.tokenizer) == text.code
            assert code_text(mid, corpus.tokenizer) == strip_comment_lines(text.code) != text.code
            assert mid.num_lines == 5 and mid.offered.any() and not mid.think.any()
            assert mid.ids[0] == corpus.tokenizer.bos and mid.ids[-1] == corpus.tokenizer.eos


def test_splits_share_nothing(corpus: Corpus) -> None:
    train, valid = ({text.code for text in corpus.texts(split)} for split in SPLITS)
    assert not train & valid


def test_standard_library_slice(tmp_path: Path) -> None:
    """Real code: everything read comes back, byte for byte."""
    path = Path(json.__file__).parent
    config = configuration(path, context=4096, valid_fraction=0.4, max_lines=200, tokenizer={"vocab_size": 600})
    built = build_corpus(config, tmp_path / "corpus")
    assert built.manifest.counts.documents > 20
    for split in SPLITS:
        for text, warm in zip(built.texts(split), built.store("warm", split), strict=True):
            assert code_text(warm, built.tokenizer) == text.code


@pytest.mark.parametrize("latent_format", ["comment", "tokens"])
def test_human_comments_as_thoughts(tmp_path: Path, latent_format: str) -> None:
    config = configuration(
        source(tmp_path / "code"), human_comments="as_thoughts", text={"latent_format": latent_format}
    )
    built = build_corpus(config, tmp_path / "corpus")
    counts = built.manifest.stores["mid/train"]
    assert counts.observed_thoughts >= counts.documents
    for text, mid in zip(built.texts("train"), built.store("mid", "train"), strict=True):
        assert code_text(mid, built.tokenizer) == strip_comment_lines(text.code)
        assert "add the" in full_text(mid, built.tokenizer)
        document = to_document(mid, built.format, built.tokenizer)
        assert compose(document, document.observed, built.format, built.tokenizer) == mid


def test_the_warm_start_reads_human_comments_as_thoughts(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"warm_start_comments": "as_thoughts", "text": {"latent_format": "tokens"}}
    built = build_corpus(configuration(source(tmp_path / "code"), **settings), tmp_path / "corpus")
    assert built.manifest.stores["warm/train"].observed_thoughts >= built.manifest.counts.documents / 2
    assert built.manifest.stores["mid/train"].observed_thoughts == 0
    for text, warm in zip(built.texts("train"), built.store("warm", "train"), strict=True):
        assert code_text(warm, built.tokenizer) == strip_comment_lines(text.code)
        assert to_document(warm, built.format, built.tokenizer).observed


def test_comments_may_be_kept_with_the_tokens_format(tmp_path: Path) -> None:
    config = configuration(source(tmp_path / "code"), human_comments="keep", text={"latent_format": "tokens"})
    built = build_corpus(config, tmp_path / "corpus")
    for text, mid in zip(built.texts("train"), built.store("mid", "train"), strict=True):
        assert code_text(mid, built.tokenizer) == text.code


# -- documents of transcripts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent_format", "granularity"), [("comment", "line"), ("comment", "statement"), ("tokens", "token")]
)
@pytest.mark.parametrize("context", [256, 64])
def test_documents_come_back_from_transcripts_with_any_thoughts(
    tmp_path: Path, latent_format: str, granularity: str, context: int
) -> None:
    text = {"latent_format": latent_format, "granularity": granularity}
    config = configuration(source(tmp_path / "code", 20), context, text=text)
    built = build_corpus(config, tmp_path / "corpus")
    random = np.random.default_rng(1)
    format, tokenizer = built.format, built.tokenizer
    for stored in built.store("mid", "train"):
        document = to_document(stored, format, tokenizer)
        assert document.observed == {} and document.name == stored.document
        assert document.complete == (stored.ids[-1] == tokenizer.eos)
        assert compose(document, {}, format, tokenizer) == stored
        thoughts = {}
        for index, line in enumerate(document.lines):
            if line.may_think and random.random() < 0.5:
                ids = [random.choice(np.flatnonzero(format.sets[line.think_set]))]
                while len(ids) < format.max_thought_ids and not format.ends_thought(ids[-1]):
                    ids.append(random.choice(np.flatnonzero(format.sets[format.thought_set])))
                thoughts[index] = tuple(int(i) for i in ids)
        infused = compose(document, thoughts, format, tokenizer)
        again = to_document(infused, format, tokenizer)
        assert again.lines == document.lines and again.observed == thoughts
        assert compose(again, again.observed, format, tokenizer) == infused


# -- length -----------------------------------------------------------------------------------------------------------


def test_long_documents_are_cut_at_a_line_or_dropped(tmp_path: Path) -> None:
    path = source(tmp_path / "code")
    (path / "short.py").write_text("def f():\n    a = 1\n    return a\n")
    (path / "short2.py").write_text("def g():\n    b = 1\n    return b\n")
    (path / "wide.py").write_text(f"def wide(a={'x' * 400!r}):\n    b = a\n    return b\n")
    cut = build_corpus(configuration(path, context=60, valid_fraction=0.5), tmp_path / "cut")
    stores = cut.manifest.stores.values()
    assert sum(store.too_long_cut for store in stores) == 80 and sum(store.too_long_dropped for store in stores) == 2
    for split in SPLITS:
        texts = {text.name: text.code for text in cut.texts(split)}
        for warm in cut.store("warm", split):
            assert warm.num_tokens <= 60
            code = code_text(warm, cut.tokenizer)
            assert code.endswith("\n") and texts[warm.document].startswith(code)
            assert (warm.ids[-1] == cut.tokenizer.eos) == (code == texts[warm.document])
    dropped = build_corpus(configuration(path, context=60, valid_fraction=0.5, too_long="drop"), tmp_path / "dropped")
    stores = dropped.manifest.stores.values()
    assert sum(store.too_long_cut for store in stores) == 0
    assert sum(store.too_long_dropped for store in stores) == 82 and sum(store.documents for store in stores) == 4


def test_a_cut_document_is_as_long_as_it_can_be(tmp_path: Path) -> None:
    path = source(tmp_path / "code", 12)
    whole = build_corpus(configuration(path, valid_fraction=0.5), tmp_path / "whole")
    ends = {t.document: np.flatnonzero(np.diff(t.lines)) + 1 for t in whole.store("warm", "train")}
    exact = 0
    for context in range(56, 66):
        built = build_corpus(configuration(path, context, valid_fraction=0.5), tmp_path / "cut")
        for transcript in built.store("warm", "train"):
            possible = ends[transcript.document]
            assert transcript.num_tokens == max(possible[possible <= context])
            exact += transcript.num_tokens == context
    assert exact


def test_observed_thoughts_count_towards_the_context(tmp_path: Path) -> None:
    path = tmp_path / "code"
    path.mkdir()
    for number in range(20):
        lines = (f"    # a comment that says a lot about line {line}\n    x = {line}\n" for line in range(12))
        (path / f"m{number}.py").write_text(f"def f{number}():\n" + "".join(lines))
    built = build_corpus(configuration(path, context=80, human_comments="as_thoughts"), tmp_path / "corpus")
    for split in SPLITS:
        counts = built.manifest.stores[f"mid/{split}"]
        assert counts.too_long_cut == counts.documents == getattr(built.manifest.counts, split)
        assert counts.too_long_dropped == 0
        for transcript in built.store("mid", split):
            assert 40 < transcript.num_tokens <= 80
            assert Role.THOUGHT in transcript.roles


def test_a_context_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    config = configuration(source(tmp_path / "code"), context=48, too_long="drop")
    with pytest.raises(UserError, match=r"no document fits model\.context_length=48"):
        build_corpus(config, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


# -- whole or not there -----------------------------------------------------------------------------------------------


def test_two_builds_are_the_same_bytes_whatever_the_shards(tmp_path: Path, corpus: Corpus) -> None:
    config = configuration(source(tmp_path / "code"))
    first = build_corpus(config, tmp_path / "one")
    assert tree(build_corpus(config, tmp_path / "two").folder) == tree(first.folder)
    sharded = build_corpus(configuration(tmp_path / "code", shard_documents=1), tmp_path / "three")
    ours, theirs = tree(first.folder), tree(sharded.folder)
    assert ours.pop("manifest.json") != theirs.pop("manifest.json")
    assert ours == theirs


def test_a_built_corpus_is_used_again_and_another_configuration_replaces_it(tmp_path: Path) -> None:
    path = source(tmp_path / "code")
    config = configuration(path)
    build_corpus(config, tmp_path / "corpus")
    content = tree(tmp_path / "corpus")
    (path / "m1.py").unlink()
    build_corpus(config, tmp_path / "corpus")
    assert tree(tmp_path / "corpus") == content
    other = build_corpus(configuration(path, context=300), tmp_path / "corpus")
    assert other.manifest.counts.documents == 39
    with pytest.raises(UserError, match="the corpus of another configuration"):
        open_corpus(config, tmp_path / "corpus")
    shutil.rmtree(path)  # the corpus needs its sources no more
    assert build_corpus(configuration(path, context=300), tmp_path / "corpus").manifest == other.manifest


@pytest.mark.parametrize("stop", range(4))
def test_an_interrupted_build_leaves_nothing_and_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    config = configuration(source(tmp_path / "code"))
    whole = tree(build_corpus(config, tmp_path / "whole").folder)
    calls: list[int] = []
    write_store = build.write_store

    def interrupted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return write_store(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_store", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(config, tmp_path / "corpus")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["code", "whole"]
    assert tree(build_corpus(config, tmp_path / "corpus").folder) == whole


def test_what_a_killed_build_left_is_cleared(tmp_path: Path) -> None:
    config = configuration(source(tmp_path / "code"))
    whole = tree(build_corpus(config, tmp_path / "whole").folder)
    left = tmp_path / ".corpus.partial"
    shutil.copytree(tmp_path / "whole", left)
    (left / "manifest.json").unlink()
    (left / "mid" / "rest.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no corpus here \(manifest\.json is missing\)"):
        open_corpus(config, tmp_path / "corpus")
    assert tree(build_corpus(config, tmp_path / "corpus").folder) == whole
    assert not left.exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    config = configuration(source(tmp_path / "code"))
    folder = build_corpus(config, tmp_path / "corpus").folder
    file = folder / "mid" / "train_ids.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"mid/train_ids\.bin has \d+ bytes instead of \d+: delete"):
        build_corpus(config, folder)
    file.unlink()
    with pytest.raises(UserError, match=r"mid/train_ids\.bin is missing"):
        build_corpus(config, folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not the manifest of a corpus"):
        build_corpus(config, folder)


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no corpus"):
        build_corpus(configuration(source(tmp_path / "code")), folder)
    assert (folder / "thesis.tex").read_text() == "years of work"


# -- refusals and progress --------------------------------------------------------------------------------------------


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(tmp_path: Path) -> None:
    config = configuration(source(tmp_path / "code"), tokenizer={"vocab_size": 30_000})
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=30000"):
        build_corpus(config, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode.TranscriptWriter, "add", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        build_corpus(configuration(source(tmp_path / "code")), tmp_path / "corpus")
    assert [file.name for file in tmp_path.iterdir()] == ["code"]


def test_a_given_tokenizer_is_copied(tmp_path: Path, corpus: Corpus) -> None:
    given = corpus.folder / "tokenizer" / "tokenizer.model"
    config = configuration(source(tmp_path / "code"), tokenizer={"path": str(given)})
    built = build_corpus(config, tmp_path / "corpus")
    assert built.tokenizer.fingerprint == corpus.tokenizer.fingerprint
    assert (built.folder / "tokenizer" / "tokenizer.model").read_bytes() == given.read_bytes()


def test_the_tokenizer_is_trained_on_a_share_of_the_training_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train = build.train_sentencepiece

    def watched(texts: Iterator[str], *arguments: Any) -> Any:
        seen.extend(texts)
        return train(iter(seen), *arguments)

    monkeypatch.setattr(build, "train_sentencepiece", watched)
    path = source(tmp_path / "code", 80)
    built = build_corpus(configuration(path), tmp_path / "all")
    training = [text.code for text in built.texts("train")]
    assert seen == training
    seen.clear()
    config = configuration(path, tokenizer={"vocab_size": 350, "train_bytes": 5000})
    build_corpus(config, tmp_path / "some")
    assert set(seen) < set(training) and 2000 < sum(map(len, seen)) < 9000


def test_progress_is_told_everything(tmp_path: Path) -> None:
    class Task:
        def __init__(self, total: int | None) -> None:
            self.total, self.steps, self.units, self.closed = total, 0, 0, False

        def advance(self, steps: int = 1, units: int = 0) -> None:
            self.steps += steps
            self.units += units

        def close(self) -> None:
            self.closed = True

    class Progress:
        def __init__(self) -> None:
            self.tasks: dict[str, Task] = {}

        def task(self, name: str, total: int | None = None, unit: str = "steps") -> Task:
            self.tasks[name] = Task(total)
            return self.tasks[name]

    progress = Progress()
    built = build_corpus(configuration(source(tmp_path / "code")), tmp_path / "corpus", progress)
    reading, tokenizing = progress.tasks["reading sources"], progress.tasks["tokenizing"]
    assert reading.steps == 40 and reading.closed
    assert tokenizing.steps == tokenizing.total == 80
    assert tokenizing.units == sum(store.tokens for store in built.manifest.stores.values())
