"""Suites of tasks while a model trains: a model that learns the answers solves them, and training does not notice."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from small_run import Ra3, curves, metrics

sys.path.append(str(Path(__file__).parents[1] / "evaluate"))

from made import ADD, packed, write_rows

from ra3_megatron.config.errors import STOPPED
from ra3_megatron.rlvr.problems import livecodebench

PROGRAMS = {
    "sum": "a, b = map(int, input().split())\nprint(a + b)\n",
    "product": "a, b = map(int, input().split())\nprint(a * b)\n",
}


CONFIG = """
method: ntp
seed: 7
corpus: {source: jsonl, path: CORPUS, valid_fraction: 0.2}
tokenizer: {vocab_size: 330}
model:
  {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2,
   context_length: 160}
warm_start: {steps: 240, global_batch_size: 2, micro_batch_size: 2, optimizer: {learning_rate: 0.02}}
em: {iterations: 0}
evaluation: {documents: 2}
parallel: {threads: 1}
checkpoint: {interval: 1000}
logging: {progress: plain}
benchmarks:
  {suites: [livecodebench], data: DATA, phases: [warm_start], interval: 120, mode: both, max_new_tokens: 60}
"""


def task(name: str) -> dict[str, object]:
    made = [("3 4\n", {"sum": "7\n", "product": "12\n"}), ("5 -2\n", {"sum": "3\n", "product": "-10\n"})]
    cases = [{"input": given, "output": wanted[name], "testtype": "stdin"} for given, wanted in made]
    public, private = json.dumps(cases[:1]), packed(cases[1:])
    content = f"Print the {name} of two numbers."
    return {
        **ADD,
        "question_id": name,
        "question_content": content,
        "public_test_cases": public,
        "private_test_cases": private,
    }


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Next-token prediction on the answers to two tasks, until the model knows them by heart."""
    folder = tmp_path_factory.mktemp("tasks")
    write_rows(folder / "data" / "livecodebench" / "made.jsonl", [task(name) for name in PROGRAMS])
    texts = [livecodebench.prompt(task(name)) + program for name, program in PROGRAMS.items()]
    # the number keeps equal texts apart; a program ends its document, as it must where no comment may follow
    rows = [{"text": f"n = {number}\n{text}"} for number in range(30) for text in texts]
    corpus = write_rows(folder / "corpus.jsonl", rows)
    config = folder / "config.yaml"
    config.write_text(CONFIG.replace("DATA", str(folder / "data")).replace("CORPUS", str(corpus)))
    return ("train", str(config))


@pytest.fixture(scope="module")
def whole(ra3: Ra3, arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("benchmarks") / "run"
    run.with_name("output.txt").write_text(ra3(*arguments, f"run_dir={run}").output)
    return run


def lines(run: Path) -> list[dict[str, object]]:
    return [record for record in metrics(run) if record["phase"] == "benchmarks"]


def test_a_model_that_learns_the_answers_solves_the_tasks(whole: Path) -> None:
    found = lines(whole)
    assert [(line["of"], line["iteration"], line["step"]) for line in found] == [
        ("warm_start", 0, n) for n in (0, 120, 240)
    ]
    for mode in ("think", "no-think"):
        scores = [line[f"livecodebench/{mode}/passed"] for line in found]
        assert scores[0] == 0 and scores[-1] == 1, scores
        assert float(found[-1][f"livecodebench/{mode}/tokens"]) < float(found[0][f"livecodebench/{mode}/tokens"])  # type: ignore[arg-type]
    written = (whole / "benchmarks" / "warm_start-000240-livecodebench-think.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in written]
    assert [row["task_id"] for row in rows] == list(PROGRAMS)
    assert [row["completion"] for row in rows] == list(PROGRAMS.values())
    assert all(row["scores"] == {"passed": 1.0} for row in rows)


def test_where_it_is_shown(whole: Path) -> None:
    output = whole.with_name("output.txt").read_text()
    assert "benchmarks, warm_start-000240: livecodebench/think/passed 100.0%" in output
    curve = curves(whole)["benchmarks/livecodebench/think/passed"]
    assert (curve[0][1], curve[-1][1]) == (0, 1)
    page = (whole / "report.html").read_text()
    assert '<section id="benchmarks">' in page and "livecodebench no-think passed" in page
    assert (whole / "figures" / "benchmarks.png").is_file()


def test_training_does_not_notice(whole: Path, ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ra3(*arguments, "benchmarks={suites: []}", f"run_dir={run}")

    def training(folder: Path) -> list[dict[str, object]]:
        others = [line for line in metrics(folder) if line["phase"] != "benchmarks"]
        return [{key: value for key, value in line.items() if key != "global_step"} for line in others]

    assert training(run) == training(whole) and not lines(run)
    assert (
        "benchmarks" not in {path.name for path in run.iterdir()}
        and '"benchmarks"' not in (run / "report.html").read_text()
    )


def test_killed_it_ends_as_if_nothing_had_been(
    whole: Path, ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = (*arguments, f"run_dir={run}", "checkpoint.interval=80")
    suites = "ra3_megatron.evaluate.during:TrainingSuites"
    places = [
        (f"{suites}._mode", "after", 1),  # behind no update
        (f"{suites}._score", "after", 1),  # behind 120, for what 0 gave is in the metrics
        # behind 121, for 80 is the last save: what 120 gave is in the metrics
        ("ra3_megatron.training.phases:_Benchmarks.behind", "after", 42),
    ]
    for number, place in enumerate(places):
        outcome = ra3(*command, *(["--resume"] if number else []), code=None, kill=list(place))
        assert outcome.code == -9, f"{place}: exit code {outcome.code}\n{outcome.errors}"
    ra3(*command, "--resume")
    assert metrics(run) == metrics(whole)
    files = sorted(path.name for path in (whole / "benchmarks").iterdir())
    assert files == sorted(path.name for path in (run / "benchmarks").iterdir())
    assert all((run / "benchmarks" / name).read_text() == (whole / "benchmarks" / name).read_text() for name in files)


def test_a_signal_ends_an_evaluation(whole: Path, ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Its updates are saved, where they were not before, and it begins again."""
    run = tmp_path / "run"
    command = (*arguments, f"run_dir={run}")
    suites = "ra3_megatron.evaluate.during"
    places = [
        (0, f"{suites}:_Spread.generate", "before", 1, "SIGTERM"),
        (120, f"{suites}:TrainingSuites._mode", "before", 3, "SIGUSR1"),
        (120, f"{suites}:TrainingSuites._score", "before", 1, "SIGTERM"),
        (240, f"{suites}:_Spread.generate", "after", 3, "SIGTERM"),
    ]
    for number, (step, target, when, call, name) in enumerate(places):
        resume = ["--resume"] if number else []
        outcome = ra3(*command, *resume, code=STOPPED, signal=[target, when, call, name])
        where = f"in the evaluation behind step {step} of warm_start, which begins again"
        assert outcome.errors == f"ra3: stopped by {name}: {where}; the same command with --resume goes on\n"
        saved = sorted(path.name for path in (run / "checkpoints" / "warm_start").glob("step_*"))
        assert saved[-1:] == [f"step_{step:06d}"][: step > 0]
    ra3(*command, "--resume")
    assert metrics(run) == metrics(whole)


HARNESS = importlib.util.find_spec("lm_eval") is not None
NO_MBPP = "suite mbpp: no data by any of the three ways: " if HARNESS else "is not installed: make install-eval"
REFUSED = [
    ("benchmarks.suites=[mmlu]", "benchmarks.suites[0]=mmlu: must be one of humaneval, humaneval+, "),
    ("benchmarks.suites=[mbpp,mbpp]", "suites=mbpp,mbpp names one twice"),
    ("benchmarks.data=nowhere", "benchmarks.data=nowhere: no such folder"),
    ("benchmarks.suites=[mbpp]", NO_MBPP),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[change for change, _ in REFUSED])
def test_what_it_refuses(change: str, said: str, ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert said in ra3.refuses(*arguments, change, f"run_dir={run}")
    assert not run.exists()
