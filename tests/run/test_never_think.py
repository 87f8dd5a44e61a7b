"""Invariant 1 of the method: with an infinite price of thoughts RA3 is next-token prediction, step for step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_run import Ra3, metrics, timeless, weights


@pytest.fixture(scope="module")
def run(ra3: Ra3, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("never") / "run"
    outcome = ra3("train", config, f"run_dir={folder}", "estep.latent_price=inf")
    assert "estep-1: skipped, because with estep.latent_price=inf" in outcome.output
    return folder


def test_every_m_step_is_the_controls(run: Path) -> None:
    def steps(phase: str) -> list[dict[str, object]]:
        return [
            {key: value for key, value in row.items() if key not in ("phase", "global_step")}
            for row in metrics(run)
            if row["phase"] == phase
        ]

    assert len(steps("mstep")) == 4
    assert steps("mstep") == steps("ntp")


def test_weights_are_the_controls(run: Path) -> None:
    for iteration in (1, 2):
        ours, control = (weights(run / f"checkpoints/{arm}-{iteration}/final") for arm in ("mstep", "ntp"))
        assert ours.keys() == control.keys()
        assert all(torch.equal(ours[name], control[name]) for name in ours)


def test_infused_documents_are_the_corpus(run: Path) -> None:
    from ra3_megatron.corpus.indexed import TranscriptStore
    from ra3_megatron.em.infuse import InfusedCorpus

    store = TranscriptStore(run / "corpus/mid/train")
    originals = {store.name(index): store[index] for index in range(len(store))}
    for iteration in (1, 2):
        corpus = InfusedCorpus(run / f"infused/iteration_{iteration}")
        for index in range(len(corpus)):
            document = corpus[index]
            assert document.ids.tolist() == originals[document.document].ids.tolist()
            assert document.roles.tolist() == originals[document.document].roles.tolist()
            assert not document.offered.any()


def test_no_choice_was_offered_or_taken(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert timeless(summary["ra3"]) == timeless(summary["ntp"])
    assert summary["base"]["think_rate"] == summary["ra3"]["think_rate"] == 0.0
    assert all(iteration["estep"] is None for iteration in summary["iterations"])
    assert not list((run / "checkpoints").glob("estep*"))


def test_observed_thoughts_are_refused(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    settings = ("estep.latent_price=inf", "corpus.human_comments=as_thoughts")
    problem = ra3.refuses("train", config, f"run_dir={tmp_path / 'run'}", *settings)
    assert problem.startswith("estep.latent_price=inf (never think) does not go with corpus.human_comments=as_thoughts")
