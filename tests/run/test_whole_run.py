"""A whole run from the command line: what it leaves in its folder, and that its parts tell the same story."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_run import Ra3, curves

ARMS = {"base-0", "ntp-1", "ntp-2", "ra3-1", "ra3-2"}


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder_is_complete(finished: Path) -> None:
    for name in ("config.yaml", "manifest.json", "versions.json", "metrics.jsonl", "summary.json", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").glob("events*"))
    files = {path.name for path in (finished / "evaluations").iterdir()}
    assert files == {f"{arm}{ending}" for arm in ARMS for ending in (".json", ".lines.jsonl")}
    phases = {"warm_start", *(f"{name}-{i}" for name in ("estep", "mstep", "ntp") for i in (1, 2))}
    assert {path.name for path in (finished / "checkpoints").iterdir()} == phases
    for phase in phases:
        assert [path.name for path in (finished / "checkpoints" / phase).iterdir()] == ["final"]
    assert not [path for path in finished.rglob("*") if path.suffix in (".partial", ".tmp")]


def test_the_resolved_configuration_describes_the_run(finished: Path, ra3: Ra3) -> None:
    shown = ra3("config", finished / "config.yaml").output
    assert shown == (finished / "config.yaml").read_text()
    assert f"run_dir: {finished}" in shown


def test_the_run_says_whose_kernels_computed_and_in_what(finished: Path) -> None:
    """On a CPU without a word on FP8: Megatron-Core's own layers do not say in what they compute."""
    found = read(finished, "precision.json")
    assert found["asked"] == "fp32" and "fp8" not in found
    assert found["phases"] == {path.name: {} for path in (finished / "checkpoints").iterdir()}
    assert found["kernels"] == {
        "linear layers": "Megatron-Core",
        "norms": "torch",
        "attention": "ra3_megatron",
        "optimizer": "torch",
        "gradient norm and clipping": "Megatron-Core",
        "weight gradients": "added behind them",
    }
    page = (finished / "report.html").read_text()
    assert "Precision and kernels" in page and "added behind them" in page


def test_metrics_hold_every_step_in_order(finished: Path) -> None:
    steps = [(row["phase"], row["iteration"], row["step"]) for row in rows(finished) if "monitor" not in row]
    expected = [("warm_start", 0, step) for step in range(1, 25)] + [("evaluation", 0, 0)]
    for i in (1, 2):
        expected += [("ntp", i, 1), ("ntp", i, 2), ("evaluation", i, 0)]
    for i in (1, 2):
        expected += [("estep", i, 1), ("estep", i, 2), ("infuse", i, 1), ("mstep", i, 1), ("mstep", i, 2)]
        expected += [("evaluation", i, 0)]
    assert steps == expected
    assert [row["global_step"] for row in rows(finished)] == list(range(len(rows(finished))))


def test_the_run_learns_and_thinks(finished: Path) -> None:
    """The other tests would mean little if nothing was learnt or no thought was ever sampled."""
    losses = [row["code_ce"] for row in rows(finished) if row["phase"] == "warm_start"]
    assert losses[-1] < 0.7 * losses[0]
    assert all(row["think_rate"] > 0 for row in rows(finished) if row["phase"] == "infuse")


def test_summary_metrics_and_evaluations_agree(finished: Path) -> None:
    summary = read(finished, "summary.json")
    assert set(summary["base"]) >= {"code_ce", "thought_ce", "think_rate", "mean_thought_tokens", "tokens", "seconds"}
    logged = {f"{r['arm']}-{r['iteration']}": r for r in rows(finished) if r["phase"] == "evaluation" and "arm" in r}
    arms = {"base-0": summary["base"]} | {f"{i['arm']}-{i['iteration']}": i for i in summary["iterations"]}
    assert set(arms) == set(logged) == ARMS
    for name, arm in arms.items():
        evaluation = read(finished, f"evaluations/{name}.json")
        for figure in ("code_ce", "raw_code_ce", "thought_ce", "think_rate", "mean_thought_tokens", "reward", "elbo"):
            assert arm[figure] == evaluation[figure] == logged[name][figure]
    for arm in ("ntp", "ra3"):
        last = arms[f"{arm}-2"]
        assert summary[arm] == {key: last[key] for key in summary[arm]}
        phases = ("mstep", "ntp")[arm == "ntp"]
        assert last["tokens"] == sum(r["tokens"] for r in rows(finished) if r["phase"] == phases)
    ends = {r["iteration"]: r for r in rows(finished) if r["phase"] == "estep" and "reward" in r}
    for i in summary["iterations"]:
        if i["arm"] == "ra3":
            assert i["estep"]["reward_last"] == ends[i["iteration"]]["reward"]
            assert i["estep"]["think_rate"] == ends[i["iteration"]]["think_rate"]
    for name, phase in summary["phases"].items():
        kind, _, iteration = name.partition("-")
        mine = [r for r in rows(finished) if r["phase"] == kind and r["iteration"] == int(iteration or 0)]
        assert phase["tokens"] == sum(r.get("tokens", 0) for r in mine), name
    manifest = read(finished, "manifest.json")
    assert summary["data"]["mid_train_documents"] == manifest["stores"]["mid/train"]["documents"]
    assert len(summary["snippets"]) == 3


def test_samples_carry_the_version_of_the_weights_that_made_them(finished: Path) -> None:
    """The number of updates behind the checkpoint that was sampled from."""
    for iteration in (1, 2):
        made_by = read(finished, f"checkpoints/estep-{iteration}/final/checkpoint.json")["weight_version"]
        assert made_by == 2
        assert read(finished, f"infused/iteration_{iteration}/infused.json")["weight_version"] == made_by
        for meta in (finished / f"infused/iteration_{iteration}").glob("chunk_*.json"):
            if "stats" not in meta.name:
                assert json.loads(meta.read_text())["weight_version"] == made_by
    shown = {path.stem: json.loads(path.read_text().splitlines()[0]) for path in (finished / "transcripts").iterdir()}
    assert shown["evaluation-base-0"]["weight_version"] == 24
    assert shown["evaluation-ra3-2"]["weight_version"] == shown["evaluation-ntp-1"]["weight_version"] == 2


def test_tensorboard_has_the_curves(finished: Path) -> None:
    shown = curves(finished)
    assert set(shown) >= {"warm_start/loss", "estep/reward", "estep/think_rate", "mstep/code_ce", "ntp/code_ce"}
    assert set(shown) >= {"infuse/think_rate", "evaluation/code_ce"}
    for phase in ("warm_start", "estep", "mstep", "ntp"):
        losses = [
            (row["global_step"], row["loss"]) for row in rows(finished) if row["phase"] == phase and "loss" in row
        ]
        assert [step for step, _ in shown[f"{phase}/loss"]] == [step for step, _ in losses]
        values = [value for _, value in shown[f"{phase}/loss"]]
        assert values == pytest.approx([value for _, value in losses], rel=1e-6)


def test_the_terminal_shows_the_table_and_the_snippets(finished: Path) -> None:
    shown = finished.with_name("output.txt").read_text()
    header = next(line for line in shown.splitlines() if line.split() == ["base", "NTP", "RA3"])
    assert header
    summary = read(finished, "summary.json")
    figures = [f"{summary[arm]['code_ce']:.4f}" for arm in ("base", "ntp", "ra3")]
    assert next(line.split()[-3:] for line in shown.splitlines() if line.startswith("code cross-entropy")) == figures
    for number, snippet in enumerate(summary["snippets"], start=1):
        assert f"infused snippet {number} of 3" in shown
        assert all(line in shown for line in snippet.splitlines())
    assert str(finished) in shown


def test_report_is_rebuilt_from_the_folder(finished: Path, ra3: Ra3, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("report.html", "figures", "checkpoints"))
    ra3("report", copy)
    html = (copy / "report.html").read_text()
    assert "<img" in html and f"{read(finished, 'summary.json')['ra3']['code_ce']:.4f}" in html


def test_show_prints_transcripts_of_each_phase(finished: Path, ra3: Ra3) -> None:
    records = [json.loads(line) for line in (finished / "transcripts/estep-2-0002.jsonl").read_text().splitlines()]
    assert len(records) == 9  # three documents, three transcripts each
    shown = ra3("show", finished, "--phase", "estep", "--count", 1).output
    assert records[0]["document"] in shown
    for line in records[0]["lines"]:
        printed = next(row for row in shown.splitlines() if row.endswith(line["text"].rstrip()) and "." in row)
        assert f"{line['reward']:.3f}" in printed and f"{line['advantage']:.3f}" in printed


@pytest.fixture(scope="module")
def infused(finished: Path, ra3: Ra3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("infused") / "out"
    ra3("infuse", "--checkpoint", finished / "checkpoints/estep-2/final", "--out", out)
    return out


def test_infused_code_is_the_corpus(finished: Path, infused: Path) -> None:
    from ra3_megatron.text.segment import split_rows, strip_comment_lines, written_comment_rows

    sources = [json.loads(line) for line in (finished / "corpus/text/train.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (infused / "infused.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [source["name"] for source in sources]
    for line, text in zip(lines, sources, strict=True):
        assert line["code"] == strip_comment_lines(text["code"])
        thoughts = written_comment_rows(line["infused"])
        rows = split_rows(line["infused"])
        assert "".join(row for number, row in enumerate(rows) if number not in thoughts) == line["code"]
        assert ast.dump(ast.parse(line["infused"])) == ast.dump(ast.parse(text["code"]))
    assert any(line["infused"] != line["code"] for line in lines), "no thought at all: nothing was tested"


def test_infuse_goes_on_and_keeps_to_its_checkpoint(finished: Path, infused: Path, ra3: Ra3, tmp_path: Path) -> None:
    whole = (infused / "infused.jsonl").read_bytes()
    out = tmp_path / "out"
    arguments = ("infuse", "--checkpoint", finished / "checkpoints/estep-2/final", "--out", out)
    ra3(*arguments, code=-9, kill=["ra3_megatron.em.infuse:_write", "before", 2])
    assert not (out / "infused.jsonl").exists()
    ra3(*arguments)
    assert (out / "infused.jsonl").read_bytes() == whole
    other = finished / "checkpoints/warm_start/final"
    assert ra3.refuses("infuse", "--checkpoint", other, "--out", out) == (
        f"--out={out}: holds a corpus infused with another checkpoint: choose another folder"
    )
    said = json.loads((out / "source.json").read_text())
    assert said["weights"] and all(len(digest) == 64 for digest in said["weights"].values())
    name = min(said["weights"])  # as if the run had been made again in its folder
    (out / "source.json").write_text(json.dumps({**said, "weights": {**said["weights"], name: "0" * 64}}))
    assert "infused with another weights" in ra3.refuses(*arguments)
    assert (out / "infused.jsonl").read_bytes() == whole


def test_infuse_another_corpus_with_the_tokenizer_of_the_run(finished: Path, ra3: Ra3, tmp_path: Path) -> None:
    rows = [{"text": f"def g{i}(item):\n    item += {i}\n    return item\n"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = finished / "checkpoints/mstep-2/final"
    settings = ("corpus.source=jsonl", f"corpus.path={tmp_path / 'rows.jsonl'}")
    ra3("infuse", "--checkpoint", checkpoint, "--out", tmp_path / "out", *settings)
    lines = [json.loads(line) for line in (tmp_path / "out/infused.jsonl").read_text().splitlines()]
    assert lines and {line["code"] for line in lines} <= {row["text"] for row in rows}


def test_the_installed_command_runs(config: Path, tmp_path: Path) -> None:
    """Everything else here forks from one process; this starts a fresh interpreter."""
    settings = ["warm_start.steps=1", "estep.steps=1", "mstep.steps=1", "em.iterations=1", "logging.tensorboard=false"]
    command = [sys.executable, "-m", "ra3_megatron", "train", str(config), f"run_dir={tmp_path / 'run'}", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert read(tmp_path / "run", "summary.json")["ra3"]["tokens"] > 0
    assert not (tmp_path / "run/tensorboard").exists()
