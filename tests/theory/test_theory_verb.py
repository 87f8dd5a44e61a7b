"""`ra3 theory`: what it writes, prints and refuses. Its numbers are tested with the studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ra3_megatron.cli import app
from ra3_megatron.theory import studies
from ra3_megatron.theory.figures import CAPTIONS
from ra3_megatron.verbs import theory as verb


def ra3(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["theory", *arguments])


def test_a_quick_run_writes_numbers_figures_and_a_page(tmp_path: Path) -> None:
    out = tmp_path / "theory"
    result = ra3("--quick", "--out", str(out), "--seed", "3")
    assert result.exit_code == 0, result.output
    found = json.loads((out / "theory.json").read_text())
    assert (found["seed"], found["quick"]) == (3, True)
    assert list(found["studies"]) == ["regret", "pruning", "convergence", "prior"]
    verdicts = [verdict for study in found["studies"].values() for verdict in study["verdicts"]]
    assert {verdict["outcome"] for verdict in verdicts} <= {"confirmed", "refuted", "undecided"}
    exact = (
        "regret = pruning error + RL error",
        "KL(q||p) = rho c - H(q) - log abar",
        "never need more than the bound",
    )
    for claim in exact:
        assert [v["outcome"] for v in verdicts if claim in v["claim"]] == ["confirmed"]
    page = (out / "theory.html").read_text()
    for name in CAPTIONS:
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == len(CAPTIONS)
    for verdict in verdicts:
        assert verdict["outcome"] in page
    assert "regret = pruning error + RL error" in page
    assert "confirmed" in result.stdout
    assert str(out / "theory.html") in result.stdout


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the two fast studies, without figures."""
    chosen = studies.plans

    def plans(seed: int, size: studies.Size) -> list[studies.Plan]:
        return [plan for plan in chosen(seed, studies.Size(2, 1, 1, 2)) if plan.name in ("regret", "prior")]

    monkeypatch.setattr(verb, "plans", plans)
    monkeypatch.setattr(verb, "draw_figures", lambda found: {})
    monkeypatch.setattr(verb, "PLACES", {"regret": (), "prior": ()})


def test_the_same_seed_gives_the_same_bytes_and_its_own_folder_is_written_again(tmp_path: Path, tiny: None) -> None:
    written = []
    for seed in ("1", "1", "2"):
        assert ra3("--out", str(tmp_path / "out"), "--seed", seed).exit_code == 0
        written.append((tmp_path / "out" / "theory.json").read_bytes())
    assert written[0] == written[1] != written[2]


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, tiny: None) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = ra3("--out", str(tmp_path))
    assert result.exit_code == 2
    assert "holds something else" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_refused(tmp_path: Path, tiny: None) -> None:
    (tmp_path / "out").write_text("mine")
    result = ra3("--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "is a file" in result.stderr
    below = ra3("--out", str(tmp_path / "out" / "deeper"))
    assert below.exit_code == 2
    assert "cannot be written" in below.stderr
