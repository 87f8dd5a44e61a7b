"""Job arrays: levels by what waits for what, the script, submission through a fake sbatch, and one cell by index."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from made_study import study_of

from ra3_megatron.config.errors import UserError
from ra3_megatron.study import slurm
from ra3_megatron.study.plan import cells_of, resolve
from ra3_megatron.verbs.study import run

ARMS = {
    "ntp": {"method": "ntp"},
    "ra3": {},
    "late": {"after": "ra3", "settings": {"estep.horizon": 2}},
}


def test_the_log_of_a_folder_with_spaces_is_one_word_of_its_directive() -> None:
    """sbatch says "Invalid directive" of what stands behind a space; it fills in what stands behind one %."""
    assert slurm.log_pattern(Path("/runs/my study")) == "'/runs/my study/slurm-%A_%a.txt'"
    assert slurm.log_pattern(Path("/runs/99%a")) == "/runs/99%%a/slurm-%A_%a.txt"


def test_arrays_follow_what_waits(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=[1, 2], base={}, arms=ARMS)
    cells = cells_of(study)
    levels = slurm.arrays(cells)
    assert levels == [[0, 4], [1, 2, 5, 6], [3, 7]]
    assert [slurm.array_text(level) for level in levels] == ["0,4", "1-2,5-6", "3,7"]
    assert slurm.array_text([0, 1, 2, 5]) == "0-2,5"


def test_the_script_runs_one_cell(tmp_path: Path) -> None:
    study = study_of(tmp_path, arms={"ra3": {"parallel.data": 2}})
    configs = resolve(study, cells_of(study))
    text = slurm.render_script("a b", Path("out dir/study.yaml"), Path("out"), configs)
    assert text.startswith("#!/bin/bash\n")
    assert "#SBATCH --job-name=a-b\n" in text and "#SBATCH --cpus-per-task=2\n" in text
    assert "#SBATCH --output=out/slurm-%A_%a.txt\n" in text
    assert text.endswith("exec ra3 study run 'out dir/study.yaml' --cell \"$SLURM_ARRAY_TASK_ID\"\n")
    spaced = slurm.render_script("a", Path("out dir/study.yaml"), Path("out dir"), configs)
    assert "#SBATCH --output='out dir/slurm-%A_%a.txt'\n" in spaced


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, largest: int = 1001) -> Path:
    calls = folder / "calls"
    file = folder / "bin" / "sbatch"
    file.parent.mkdir()
    scontrol = file.with_name("scontrol")
    scontrol.write_text(f"#!/bin/sh\necho 'MaxArraySize            = {largest}'\n")
    scontrol.chmod(0o755)
    file.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{body}\n')
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")
    return calls


def test_arrays_are_submitted_one_behind_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_sbatch(tmp_path, monkeypatch, f'echo "$(wc -l < {tmp_path}/calls);cluster"')
    study = study_of(tmp_path, seeds=[1, 2], base={}, arms=ARMS)
    assert run(study, to_slurm=True) == 0
    script = study.path / "study.sbatch"
    assert calls.read_text().splitlines() == [
        f"--parsable --array=0,4 {script}",
        f"--parsable --array=1-2,5-6 --dependency=afterany:1 {script}",
        f"--parsable --array=3,7 --dependency=afterany:2 {script}",
    ]
    assert "job arrays 1, 2, 3" in capsys.readouterr().out
    assert {path.name for path in study.path.iterdir()} == {"study.yaml", "study.sbatch"}


def test_a_refusal_of_sbatch_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path, monkeypatch, 'echo "sbatch: error: no partition" >&2; exit 1')
    with pytest.raises(UserError, match="exit code 1: sbatch: error: no partition"):
        run(study_of(tmp_path), to_slurm=True)


def test_a_study_that_is_too_large_for_an_array_is_refused_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_sbatch(tmp_path, monkeypatch, "echo 1", largest=7)
    study = study_of(tmp_path, seeds=[1, 2], base={}, arms=ARMS)
    with pytest.raises(UserError, match=r"^--slurm: 8 cells, .* at most 7 \(MaxArraySize"):
        run(study, to_slurm=True)
    assert not calls.exists() and not (study.path / slurm.SCRIPT).exists()


def test_without_sbatch_it_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm, "has_sbatch", lambda: False)
    study = study_of(tmp_path, base={})
    assert run(study, to_slurm=True) == 0
    said = capsys.readouterr().out
    script = study.path / "study.sbatch"
    assert f"job=$(sbatch --parsable --array=0 {script})" in said
    assert f'job=$(sbatch --parsable --array=1 --dependency="afterany:$job" {script})' in said
