"""`ra3 study` from the command line: refusals that write nothing, plans, ready-made studies, one real small study."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_cells import command_of, order
from made_study import SMALL, make, study_of
from typer.testing import CliRunner

from ra3_megatron.cli import app
from ra3_megatron.config.errors import UserError
from ra3_megatron.study.plan import cells_of, resolve
from ra3_megatron.study.process import lock
from ra3_megatron.study.ready import em_study, price_study
from ra3_megatron.study.spec import load_study
from ra3_megatron.verbs.study import default_jobs, run
from tests.run.small_run import CONFIG, write_corpus

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "studies").glob("*.yaml"))


def ra3(*arguments: object, code: int = 0) -> Any:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result


def refusal(*arguments: object) -> list[str]:
    result = ra3(*arguments, code=2)
    assert result.stdout == ""
    return [line.removeprefix("ra3: ") for line in result.stderr.splitlines()]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small configuration."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    return Path("small.yaml")


def write(**values: Any) -> Path:
    Path("s.yaml").write_text(yaml.safe_dump({"name": "s", "folder": "out", "config": "small.yaml", **values}))
    return Path("s.yaml")


def test_mistakes_are_one_line_each_and_nothing_is_written(small: Path) -> None:
    assert refusal("study", "run", "no.yaml") == ["no.yaml: no such study file"]
    file = write(seeds=[1, 1], arms={"a": {"estep.stepz": 1}})
    assert refusal("study", "run", file) == [
        "s.yaml: seeds=[1, 1]: the same seed stands twice",
        "s.yaml: arms.a.estep.stepz: unknown key; did you mean estep.steps?",
    ]
    file = write(arms={"a": {}, "b": {"estep.group_size": 1}}, reference="c")
    assert refusal("study", "run", file) == ["reference=c: must be an arm (a, b) or one of a, b"]
    assert refusal("study", "run", write(), "estep.group_size=1") == ["estep.group_size=1: must be at least 2"]
    assert refusal("study", "run", write(), "--cell", "7") == ["--cell 7: there are 1 cells, numbered from 0"]
    assert refusal("study", "run", write(config="none.yaml")) == ["none.yaml: no such configuration file"]
    starts = {
        ("run", write(), "--cell", "x"): "--cell x: no cell has this name; there are ra3,seed=1",
        ("price", small, "--folder", "out", "--prices", "0,x"): "--prices 0,x: x is no price",
        ("price", small, "--folder", "out", "--log-grid", "1", "0.1", "3"): "--log-grid 1.0 0.1 3: needs 0 < LOW",
        ("em", small, "estep.stepz=1", "--folder", "out"): "estep.stepz: unknown key",
    }
    for arguments, start in starts.items():
        (line,) = refusal("study", *arguments)
        assert line.startswith(start), line
    assert refusal("study", "em", "seed=1", "--folder", "out") == [
        "study em needs a configuration file, such as examples/quickstart.yaml"
    ]
    assert refusal("study", "report", "out") == ["out: no such study folder"]
    assert {path.name for path in Path().iterdir()} == {"small.yaml", "s.yaml"}


def test_a_foreign_folder_and_another_run_are_refused(small: Path) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("precious")
    assert refusal("study", "run", write()) == ["folder=out: exists and holds no study: choose another folder"]
    assert refusal("study", "run", write(folder="s.yaml")) == ["folder=s.yaml: is a file: choose another folder"]
    study = study_of(Path(), seeds=[1, 2])
    make(study, {}, without=("ra3,seed=2",))
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    (line,) = refusal("study", "run", "out/study.yaml", "estep.horizon=2")
    assert line.startswith("cell ra3,seed=1: its folder holds a run with estep.horizon=4, and the study asks for 2")
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


def test_cells_of_another_study_are_not_dropped(small: Path) -> None:
    """Their results would be gone from table and report, and the study file that names them overwritten."""
    study = study_of(Path(), arms={"a": {}, "b": {}}, seeds=[1, 2])
    make(study, {}, without=("b,seed=2",))
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    (line,) = refusal("study", "run", write(arms={"a": {}, "c": {}}, seeds=[1]))
    assert line == (
        "folder=out: holds cells that this study does not have: a,seed=2; b,seed=1: name their arms, values and seeds "
        "too, delete them, or choose another folder"
    )
    (line,) = refusal("study", "price", small, "--folder", "out", "--prices", "0")
    assert line.startswith("folder=out: holds cells that this study does not have: a,seed=1; a,seed=2; b,seed=1: name")
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


def test_starts_that_are_not_there(small: Path) -> None:
    starts = ("--start", "a=nowhere/{seed}", "--start", "b=small.yaml", "--seeds", "1")
    example = ROOT / "examples" / "rlvr-hopprog.yaml"
    said = [
        f"cell {arm},seed=1: rlvr.checkpoint={place}: no such folder"
        for arm, place in zip("ab", ("nowhere/1", "small.yaml"), strict=True)
    ]
    assert refusal("study", "rlvr-transfer", example, *starts, "--folder", "out") == said
    file = write(arms={"a": {"warm_start.checkpoint": "gone"}, "b": {"estep.policy": "out/cells/a,seed=1/checkpoints"}})
    assert refusal("study", "run", file) == ["cell a,seed=1: warm_start.checkpoint=gone: no such folder"]
    assert not Path("out").exists()


def test_the_plan_is_shown_without_running(small: Path) -> None:
    file = write(base={}, arms={"a": {}, "b": {"after": "a"}})
    said = ra3("study", "run", file, "--dry-run").stdout
    assert re.search(r"0 +base,seed=1 +to run", said) and re.search(r"2 +b,seed=1 +to run +base,seed=1 a,seed=1", said)
    assert not Path("out").exists()


def test_a_run_reports_skips_and_fails_with_one(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of(Path(), arms={"a": {}, "bad": {}, "late": {"after": "bad"}}, reference="a")
    assert run(study, command=command_of(Path())) == 1
    said = capsys.readouterr().out
    assert "a,seed=1: code CE 2.4" in said and "3/3" in said
    assert "bad,seed=1: failed: exit code 3: boom (out/cells/bad,seed=1/log.txt)" in said
    assert "late,seed=1: not run: bad,seed=1 failed" in said
    assert Path("out/report.html").is_file()
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 2
    assert run(study, command=command_of(Path())) == 1
    assert sorted(order(Path())) == ["a,seed=1", "bad,seed=1", "bad,seed=1"]  # two at once
    assert "1 of 3 cells are done already" in capsys.readouterr().out
    fine = load_study(Path("out/study.yaml")).model_copy(update={"arms": {"a": study.arms["a"]}})
    assert run(fine, command=command_of(Path())) == 0
    assert ra3("study", "report", "out").stdout == "out/report.html\n"


def test_one_cell_by_name_or_number(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(6))
    study = study_of(Path(), arms={"a": {}, "b": {"after": "a"}})
    assert run(study, cell="b,seed=1", command=command_of(Path())) == 1  # a is not done
    assert run(study, cell="0", command=command_of(Path())) == 0
    assert not Path("out/report.html").exists()
    assert run(study, cell="1", command=command_of(Path())) == 0
    assert Path("out/report.html").is_file()  # the last one writes it
    assert order(Path()) == ["a,seed=1", "b,seed=1"]
    assert Path("out/cells/a,seed=1/log.txt").read_text() == "threads 6\n"  # it has the machine to itself


def test_two_runs_of_one_study_at_once_are_refused(small: Path) -> None:
    study = study_of(Path())
    held = lock(Path("out"))
    assert held is not None
    with pytest.raises(UserError, match="another `ra3 study run` is at work there"):
        run(study, command=command_of(Path()))
    held.close()
    assert run(study, command=command_of(Path())) == 0


def test_jobs_are_cores_over_processes(small: Path) -> None:
    one, two = study_of(Path()), study_of(Path(), settings={"parallel.data": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "glob", lambda self, pattern: iter(()))
        assert default_jobs(resolve(one, cells_of(one)), 6) == 6
        assert default_jobs(resolve(two, cells_of(two)), 6) == 3
        assert default_jobs(resolve(two, cells_of(two)), 1) == 1
        patch.setattr(Path, "glob", lambda self, pattern: iter([Path("/dev/nvidia0")]))
        assert default_jobs(resolve(one, cells_of(one)), 6) == 1


def test_the_ready_made_price_study(small: Path) -> None:
    small.write_text(yaml.safe_dump({**SMALL, "em": {"control": True}}))
    study = price_study(small, ["estep.steps=7"], Path("out"), 2, "0,0.05,inf", (0.01, 1.0, 3))
    prices = study.arms["ra3"].grid["estep.latent_price"]
    assert prices == [0, 0.01, 0.05, 0.1, 1.0, float("inf")]
    assert study.seeds == [1, 2] and study.base == {} and study.reference == "ra3,latent_price=inf"
    configs = resolve(study, cells_of(study))
    assert len(configs) == 14
    assert configs["ra3,latent_price=inf,seed=2"].estep.steps == 7
    assert not configs["ra3,latent_price=0.0,seed=1"].em.control
    assert price_study(small, [], Path("out"), 1, "0,1", None).reference is None
    own = price_study(small, ["warm_start.steps=0"], Path("out"), 1, "0,1", None)
    assert own.base is None  # there is no warm start to share


def test_the_ready_made_em_study(small: Path) -> None:
    study = em_study(small, ["em.iterations=3"], Path("out"), 1)
    configs = resolve(study, cells_of(study))
    assert {name: (c.method, c.em.iterations) for name, c in configs.items()} == {
        "base,seed=1": ("ra3", 0),
        "ra3,seed=1": ("ra3", 3),
        "ntp,seed=1": ("ntp", 3),
    }
    said = ra3("study", "em", small, "--folder", "out", "--seeds", "1", "--dry-run").stdout
    assert "ntp,seed=1" in said


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_resolve(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(file)
    assert study.folder in (f"runs/studies/{file.stem}", f"runs/{file.stem}")
    cells = cells_of(study)
    configs = resolve(study, cells)
    for name, config in configs.items():
        assert not config.em.control or file.stem == "failures", name  # whose monitors compare with NTP
        assert config.model.num_layers * config.model.hidden_size**2 < 1e6, name  # for a CPU


def test_there_are_examples_for_every_axis() -> None:
    names = "controls em granularity group_size horizon likelihood mstep_start price relatives thought_length"
    assert {file.stem for file in EXAMPLES} >= set(names.split())


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_real_study_of_two_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, RA3 and NTP on a few functions: one corpus, one start, figures that pair up; run again, nothing runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = write_corpus(Path("code"))
    Path("small.yaml").write_text(CONFIG.replace("CORPUS", str(code)))
    settings = {"em": {"iterations": 1, "control": False}, "logging.tensorboard": False}
    file = write(base={}, arms={"ra3": {}, "ntp": {"method": "ntp"}}, settings=settings)
    said = ra3("study", "run", file, "--jobs", "2").stdout
    assert "ra3,seed=1: code CE" in said and "report      out/report.html" in said
    cells = [Path("out/cells") / f"{name},seed=1" for name in ("base", "ra3", "ntp")]
    inodes = {(cell / "corpus" / "mid" / "train_ids.bin").stat().st_ino for cell in cells}
    assert len(inodes) == 1
    rows = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    start = {row["code_ce"] for row in rows if row["iteration"] == 0}
    assert len(rows) == 5 and len(start) == 1  # all start from the base's weights
    assert all(row["flops"] is not None for row in rows)
    table = Path("out/table.md").read_text()
    assert "| ra3 − ntp | code (nats/line) |" in table and "| ntp | 1 |" in table
    before = {path: path.stat().st_mtime_ns for cell in cells for path in cell.rglob("*")}
    assert "3 of 3 cells are done already" in ra3("study", "run", file).stdout
    assert {path: path.stat().st_mtime_ns for cell in cells for path in cell.rglob("*")} == before
