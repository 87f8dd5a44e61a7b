"""A corpus of generated tasks: the truth is found by a document's name, and both stores hold what they should."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from ra3_megatron.config.data import CorpusConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.tasks import Family, TasksConfig
from ra3_megatron.corpus.build import Corpus, build_corpus
from ra3_megatron.corpus.generated import Tasks
from ra3_megatron.corpus.splits import SPLITS
from ra3_megatron.text.latents import code_text
from ra3_megatron.text.tokenizer import Tokenizer

FAMILIES: tuple[Family, ...] = get_args(Family)
COUNT = 80


VOCABULARY = {"hopprog": 600, "stateprog": 330, "composition": 340, "equations": 320}


def configuration(family: Family, superwords: bool = False, **tasks: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "corpus": {
                "source": "tasks",
                "valid_fraction": 0.3,
                "min_lines": 2,
                "tasks": {"count": COUNT, "family": family, **tasks},
            },
            "tokenizer": {"vocab_size": VOCABULARY[family], "superwords": superwords},
            "model": {"context_length": 512},
        }
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def documents(corpus: Corpus) -> dict[str, str]:
    return {text.name: text.prompt + text.code for split in SPLITS for text in corpus.texts(split)}


@pytest.fixture(scope="module", params=FAMILIES)
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(configuration(request.param), tmp_path_factory.mktemp("tasks") / "corpus")


def tasks_of(corpus: Corpus) -> Tasks:
    return Tasks(CorpusConfig.model_validate(corpus.manifest.config["corpus"]))


# -- stores -----------------------------------------------------------------------------------------------------------


def test_the_warm_store_holds_comments_and_the_other_one_programs(corpus: Corpus) -> None:
    tasks, comments = tasks_of(corpus), 0
    for split in SPLITS:
        for warm, mid in zip(corpus.store("warm", split), corpus.store("mid", split), strict=True):
            task = tasks.task_named(mid.document)
            assert code_text(warm, corpus.tokenizer) == task.warm_text
            assert code_text(mid, corpus.tokenizer) == task.code and "#" not in task.code
            assert not mid.think.any() and mid.offered.any()
            comments += len(task.comments)
    assert comments > COUNT / 2


def test_each_line_of_a_document_has_its_truth(corpus: Corpus) -> None:
    """The line where an item starts is its first; the prompt is context and no line."""
    tasks = tasks_of(corpus)
    for split in SPLITS:
        for mid in corpus.store("mid", split):
            task = tasks.task_named(mid.document)
            assert mid.num_lines == len(task.truth)
            for number, truth in enumerate(task.truth):
                text = corpus.tokenizer.decode(mid.ids[(mid.lines == number) & mid.is_code].tolist())
                item = None if truth.item is None else task.items[truth.item]
                others = {task.ending, *(f"{item.request}\n" for item in task.items)}
                assert text in (others if item is None else {item.lines[truth.place] + "\n"})
            assert corpus.tokenizer.decode(mid.ids[mid.is_given].tolist()) == task.prompt


def test_every_task_is_in_one_split_and_the_splits_are_disjoint(corpus: Corpus) -> None:
    tasks = tasks_of(corpus)
    names = {split: {text.name for text in corpus.texts(split)} for split in SPLITS}
    texts = {split: {text.prompt + text.code for text in corpus.texts(split)} for split in SPLITS}
    assert not names["train"] & names["valid"] and not texts["train"] & texts["valid"]
    assert names["train"] | names["valid"] == {task.name for task in tasks}
    assert len(names["train"]) > len(names["valid"]) > 5
    for split in SPLITS:
        assert all(tasks.split(int(name.partition("#")[2])) == split for name in names[split])


def test_two_builds_are_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    family = tasks_of(corpus).config.tasks.family
    assert tree(build_corpus(configuration(family), tmp_path / "again").folder) == tree(corpus.folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_of_numbers_do_not_overlap(family: Family, tmp_path: Path) -> None:
    first, second, both = (
        documents(build_corpus(configuration(family, first=start, count=count), tmp_path / f"{start}-{count}"))
        for start, count in ((0, COUNT), (COUNT, COUNT), (0, 2 * COUNT))
    )
    assert not first.keys() & second.keys() and not set(first.values()) & set(second.values())
    assert first | second == both and len(both) == 2 * COUNT


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_withheld_is_held_out(family: Family, tmp_path: Path) -> None:
    built = build_corpus(configuration(family, withheld=4), tmp_path / "corpus")
    tasks = tasks_of(built)
    labels = {
        split: {item.label for text in built.texts(split) for item in tasks.task_named(text.name).items}
        for split in SPLITS
    }
    withheld = set("6789" if family == "equations" else "MNOP")
    assert not labels["train"] & withheld and labels["valid"] & withheld


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_names_lead_back_to_their_tasks(family: Family) -> None:
    tasks = Tasks(CorpusConfig(source="tasks", tasks=TasksConfig(family=family, count=20, first=5, withheld=2)))
    found = list(tasks)
    assert len(found) == len(tasks) == 20 and found[0].name == f"{family}#5"
    assert [tasks.task_named(task.name) for task in found] == found


@pytest.mark.parametrize(
    "name", ["stateprog#3", "hopprog", "hopprog#", "hopprog#x", "hopprog#-1", "json/decoder.py::f"]
)
def test_foreign_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"document {re.escape(name)} is no task of the family hopprog"):
        Tasks(CorpusConfig(source="tasks")).task_named(name)


# -- tokens -----------------------------------------------------------------------------------------------------------


def spans(line: str, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([index]).strip() for index in tokenizer.encode(line)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("superwords", [False, True])
def test_symbols_are_tokens_of_their_own(family: Family, superwords: bool, tmp_path: Path) -> None:
    """In tables (a whole entry with hopprog) and in thoughts, so that one can be looked up for the other."""
    built = build_corpus(configuration(family, superwords=superwords), tmp_path / "corpus")
    for task in tasks_of(built):
        tables = [line for line in task.prompt.split("\n") if re.match(r"    [a-z]+ ", line) and '"""' not in line]
        assert len(tables) == (2 if family == "composition" else 3)
        for line in tables:
            key, _, symbols = line.strip().partition(" ")
            found = "".join(spans(line.strip(), built.tokenizer)).removeprefix(key)
            assert found == symbols.replace(" ", "")
            pieces = [piece for piece in spans(line.strip(), built.tokenizer)[1:] if re.search(r"\w", piece)]
            entries = {piece for piece in pieces if piece not in key}
            if family == "hopprog":
                size = {"s": 2, "r": 2}.get(key, 4)
                assert entries == set(re.findall(r"[a-h].", symbols) if size == 2 else re.findall(r"\d\+*", symbols))
            else:
                assert all(len(entry) == 1 for entry in entries), pieces
        for item in task.items:
            pieces = [piece for piece in spans(f"# {item.thought}\n", built.tokenizer) if piece]
            assert pieces == ["#", *item.thought]
