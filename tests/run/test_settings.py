"""Short runs with other settings: they end, and what they computed makes sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import Ra3, metrics, weights

SHORT = (
    "logging.tensorboard=false",
    "warm_start.steps=4",
    "estep.steps=1",
    "mstep.steps=1",
    "em.iterations=1",
    "evaluation.documents=3",
)


def summary_of(run: Path) -> Any:
    return json.loads((run / "summary.json").read_text())


def phases_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_ntp_alone(ra3: Ra3, config: Path, finished: Path, tmp_path: Path) -> None:
    ra3("train", config, f"run_dir={tmp_path / 'run'}", "method=ntp")
    assert phases_of(tmp_path / "run") == ["ntp-1", "ntp-2", "warm_start"]
    summary = summary_of(tmp_path / "run")
    assert summary["ra3"] is None and summary["ntp"]["code_ce"] == summary_of(finished)["ntp"]["code_ce"]
    assert len(summary["snippets"]) == 3


def test_start_from_a_checkpoint_without_control(ra3: Ra3, config: Path, finished: Path, tmp_path: Path) -> None:
    run, start = tmp_path / "run", finished / "checkpoints/warm_start/final"
    settings = (f"warm_start.checkpoint={start}", "warm_start.steps=0", "em.control=false", "em.iterations=1")
    ra3("train", config, f"run_dir={run}", f"tokenizer.path={finished / 'corpus/tokenizer'}", *settings)
    assert phases_of(run) == ["estep-1", "mstep-1", "warm_start"]
    before, after = weights(start), weights(run / "checkpoints/warm_start/final")
    assert all(torch.equal(before[name], after[name]) for name in before)
    summary = summary_of(run)
    assert summary["ntp"] is None and summary["base"]["tokens"] == 0
    assert summary["ra3"]["code_ce"] == summary_of(finished)["iterations"][2]["code_ce"], "the same run from there on"


def test_m_steps_that_start_from_q(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # with a learning rate of (next to) nothing an M-step keeps the weights that it starts from
    settings = ("mstep.optimizer.learning_rate=1e-30", "mstep.optimizer.weight_decay=0", "em.control=false")
    ra3("train", config, f"run_dir={run}", *SHORT, *settings, "mstep.start=q")
    end = weights(run / "checkpoints/mstep-1/final")
    for source, same in (("warm_start", False), ("estep-1", True)):
        start = weights(run / f"checkpoints/{source}/final")
        assert all(torch.equal(end[name], start[name]) for name in start) == same


def test_m_steps_that_start_from_the_base(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("estep.latent_price=inf", "mstep.start=base")
    ra3("train", config, f"run_dir={run}", *SHORT, "em.iterations=2", "mstep.steps=2", *settings)
    first = {(row["phase"], row["iteration"]): row["code_ce"] for row in metrics(run)[::-1] if "code_ce" in row}
    for iteration in (1, 2):
        assert first["mstep", iteration] == first["ntp", iteration]
        ours, control = (weights(run / f"checkpoints/{arm}-{iteration}/final") for arm in ("mstep", "ntp"))
        assert all(torch.equal(ours[name], control[name]) for name in ours)
    summary = summary_of(run)
    for arm in ("ntp", "ra3"):
        phase = {"ntp": "ntp", "ra3": "mstep"}[arm]
        assert summary[arm]["tokens"] == summary["phases"][f"{phase}-2"]["tokens"], "what these weights have seen"


def test_stop_without_gain(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # an M-step that cannot learn gains nothing
    settings = ("mstep.optimizer.learning_rate=1e-30", "em.iterations=3", "em.stop_without_gain=true")
    outcome = ra3("train", config, f"run_dir={run}", *SHORT, *settings)
    assert "iteration 1 did not raise the held-out ELBO: stopping" in outcome.output
    assert [i["iteration"] for i in summary_of(run)["iterations"] if i["arm"] == "ra3"] == [1]
    first = next(i for i in summary_of(run)["iterations"] if i["arm"] == "ntp" and i["iteration"] == 1)
    assert summary_of(run)["ntp"]["tokens"] == first["tokens"], "the control is compared at the same point"


OTHER = {
    "tokens format, statements, observed thoughts": (
        "text.latent_format=tokens",
        "text.granularity=statement",
        "corpus.human_comments=as_thoughts",
        "estep.likelihood=sum",
    ),
    "tokens format, spans of tokens": (
        "text.latent_format=tokens",
        "text.granularity=token",
        "corpus.human_comments=keep",
        "estep.normalize_advantages=true",
    ),
    "comment format, observed thoughts, off-policy updates": (
        "corpus.human_comments=as_thoughts",
        "estep.steps=2",
        "estep.updates_per_rollout=2",
        "estep.clip_ratio=0.2",
        "estep.importance_cap=2",
        "estep.optimizer.schedule=linear",
        "evaluation.samples=2",
        "mstep.thought_weight=0.5",
    ),
    "comment format, observed thoughts, the latent in force alone": (
        "corpus.human_comments=as_thoughts",
        "text.keep_latents=false",
        "estep.baseline=no_thought",
    ),
    "statements, one sampler request a line": ("text.granularity=statement", "rollout.sampler=naive"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_settings(name: str, ra3: Ra3, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ra3("train", config, f"run_dir={run}", *SHORT, *OTHER[name])
    summary = summary_of(run)
    stores = json.loads((run / "manifest.json").read_text())["stores"]
    observed = "corpus.human_comments=as_thoughts" in OTHER[name]
    assert (stores["mid/train"]["observed_thoughts"] > 0) == observed
    infused = next(row for row in metrics(run) if row["phase"] == "infuse")
    if observed:
        assert infused["think_rate"] > 0
    for arm in ("base", "ntp", "ra3"):
        assert 0 < summary[arm]["code_ce"] < 7
    if "text.keep_latents=false" in OTHER[name]:
        step = next(row for row in metrics(run) if row["phase"] == "estep")
        assert step["largest_log_prob_difference"] < 1e-4, "the trainer reads what the sampler read"
    if "estep.updates_per_rollout=2" in OTHER[name]:
        step = next(row for row in metrics(run) if row["phase"] == "estep")
        assert step["learning_rate"] == pytest.approx(0.003 * 3 / 5), "the last of four updates learns"
    ra3("infuse", "--checkpoint", run / "checkpoints/mstep-1/final", "--out", tmp_path / "out")
    sources = [json.loads(line) for line in (run / "corpus/text/train.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (tmp_path / "out/infused.jsonl").read_text().splitlines()]
    from ra3_megatron.text.segment import strip_comment_lines

    kept = "corpus.human_comments=keep" in OTHER[name]
    for line, text in zip(lines, sources, strict=True):
        assert (text["code"] if kept else strip_comment_lines(text["code"])).startswith(line["code"])
