"""What the user can mend: one line that names the key or file and what would be right, exit code 2, nothing lost."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from small_run import Ra3, metrics

from ra3_megatron.config.errors import UserError

SHORT = (
    "logging.tensorboard=false",
    "warm_start.steps=3",
    "estep.steps=1",
    "mstep.steps=1",
    "em.iterations=1",
    "evaluation.documents=2",
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- the corpus ---------------------------------------------------------------------------------------------------


def test_corpora_that_give_nothing(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\x00\xff\xfe\n")
    cases = [
        (("corpus.path=/no/such/folder",), "corpus.path=/no/such/folder: "),
        (("corpus.source=jsonl", f"corpus.path={binary}"), str(binary)),
        (
            ("corpus.min_lines=25",),
            "the corpus is empty after filtering (texts 70, too_few_lines 70): check corpus.path",
        ),
        (("model.context_length=20", "text.max_latent_tokens=1", "corpus.too_long=drop"), "no document fits"),
        (("tokenizer.vocab_size=30000",), "tokenizer.vocab_size=30000"),
    ]
    for settings, start in cases:
        problem = ra3.refuses("train", config, f"run_dir={tmp_path / 'run'}", *settings)
        assert problem.startswith(start), problem
        assert not (tmp_path / "run").exists(), settings
    ra3("train", config, f"run_dir={tmp_path / 'run'}", *SHORT, "warm_start.steps=1", "em.control=false")


def test_folders_that_cannot_be_looked_at() -> None:
    """A name that is too long stands for a folder of somebody else's, which root may look into."""
    from ra3_megatron.config.load import load_config
    from ra3_megatron.config.run import RunConfig
    from ra3_megatron.mcore.checkpoint_record import read_record
    from ra3_megatron.verbs.run_dir import check_folder

    name = "x" * 300
    cases = {
        f"run_dir={name}: cannot be read (File name too long)": lambda: check_folder(RunConfig(run_dir=name), False),
        f"model.hf={name}: cannot be read (File name too long)": lambda: load_config(None, [f"model.hf={name}"]),
        f"{name}/checkpoint.json: cannot be read: ": lambda: read_record(Path(name)),
    }
    for start, call in cases.items():
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value).startswith(start)


@pytest.mark.multiprocess
def test_two_processes_refuse_with_one_line(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    settings = ("parallel.data=2", "corpus.path=/no/such/folder")
    problem = ra3.refuses("train", config, f"run_dir={tmp_path / 'run'}", *settings)
    assert problem.startswith("corpus.path=/no/such/folder: ")
    assert not (tmp_path / "run").exists()


def test_documents_longer_than_the_context_are_counted(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    for way in ("cut", "drop"):
        run = tmp_path / way
        settings = ("model.context_length=64", f"corpus.too_long={way}", "em.control=false")
        ra3("train", config, f"run_dir={run}", *SHORT, *settings)
        data = json.loads((run / "summary.json").read_text())["data"]
        lost = {key: data[f"mid_train_{key}_at_context"] for key in ("cut", "dropped")}
        assert (lost["cut"] > 0) == (way == "cut") and (lost["dropped"] > 0) == (way == "drop"), lost


def test_layouts_that_do_not_fit(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    """Before any process starts; tests/config has all the rules."""
    cases = {
        "parallel.tensor=3": "parallel.tensor=3 does not divide",
        "parallel.pipeline=4": "parallel.pipeline=4 does not divide model.num_layers=2",
        "parallel.virtual_pipeline=2": "parallel.virtual_pipeline=2 needs parallel.pipeline >= 2",
        "parallel.expert=2": "parallel.expert=2 needs a mixture of experts: set model.num_experts",
    }
    for setting, start in cases.items():
        problem = ra3.refuses("train", config, f"run_dir={tmp_path / 'run'}", setting)
        assert problem.startswith(start), problem
        assert not (tmp_path / "run").exists()


def test_a_host_of_engines_does_not_wait_for_a_file(ra3: Ra3, config: Path) -> None:
    assert ra3.refuses("engines", "--run-dir", config) == f"--run-dir {config}: is a file: give the folder of the run"


# -- the run folder -----------------------------------------------------------------------------------------------


def test_run_folders_that_are_taken(finished: Path, ra3: Ra3, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = contents(run)
    assert "go on with --resume" in ra3.refuses("train", config, f"run_dir={run}")
    for resume in ((), ("--resume",)):
        problem = ra3.refuses("train", config, f"run_dir={run}", "estep.latent_price=0.2", *resume)
        assert problem.startswith(f"run_dir={run}: holds a run with another configuration")
        assert "estep.latent_price=0.05 there, 0.2 here" in problem
    assert contents(run) == before

    file = tmp_path / "file"
    file.write_text("mine")
    assert ra3.refuses("train", config, f"run_dir={file}") == f"run_dir={file}: is a file: choose another run_dir"
    assert ra3.refuses("train", config, f"run_dir={file / 'below'}").startswith(f"run_dir={file / 'below'}: ")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    for resume in ((), ("--resume",)):
        assert "is no run folder" in ra3.refuses("train", config, f"run_dir={foreign}", *resume)
    assert contents(tmp_path / "foreign") == {"thesis.tex": b"mine"} and file.read_text() == "mine"


def test_a_run_folder_in_use(finished: Path, ra3: Ra3, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with (run / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert "another process is writing there" in ra3.refuses("train", config, f"run_dir={run}", "--resume")
    ra3("train", config, f"run_dir={run}", "--resume")


def test_a_run_without_checkpoint_may_begin_anew(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill = ["ra3_megatron.em.steps:PackedSteps.step", "before", 3]
    ra3("train", config, f"run_dir={run}", *SHORT, code=-9, kill=kill)
    ra3("train", config, f"run_dir={run}", *SHORT, "tokenizer.vocab_size=320", "em.control=false")
    assert [row["step"] for row in metrics(run) if row["phase"] == "warm_start"] == [1, 2, 3]


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_checkpoints_that_do_not_fit(finished: Path, ra3: Ra3, config: Path, tmp_path: Path) -> None:
    start, tokenizer = finished / "checkpoints/warm_start/final", finished / "corpus/tokenizer"
    train = ("train", config, f"run_dir={tmp_path / 'run'}", f"warm_start.checkpoint={start}")
    problem = ra3.refuses(*train, "tokenizer.vocab_size=320")
    assert problem.startswith(f"warm_start.checkpoint={start}: was trained with another tokenizer")
    assert "set tokenizer.path" in problem
    problem = ra3.refuses(*train, f"tokenizer.path={tokenizer}", "model.ffn_hidden_size=96")
    differs = "holds a model with model.ffn_hidden_size=64, but this model has model.ffn_hidden_size=96"
    assert problem == f"warm_start.checkpoint={start}: {differs}"
    problem = ra3.refuses(*train[:3], f"tokenizer.path={tokenizer}", f"warm_start.checkpoint={tmp_path}")
    assert problem == f"warm_start.checkpoint={tmp_path}: is no complete checkpoint (no checkpoint.json)"
    for key in ("warm_start.checkpoint", "estep.policy"):  # before the corpus is built
        problem = ra3.refuses("train", config, f"run_dir={tmp_path / 'early'}", f"{key}={finished}")
        assert problem.startswith(f"{key}={finished}: is no checkpoint itself; those below it, oldest first: {start}, ")
        assert not (tmp_path / "early").exists()
    policy = (f"tokenizer.path={tokenizer}", "model.ffn_hidden_size=96", f"estep.policy={start}")
    assert ra3.refuses(*train[:3], *policy) == f"estep.policy={start}: {differs}"
    assert not (tmp_path / "run/checkpoints").exists(), "before anything is trained"
    infuse = ("infuse", "--checkpoint", start, "--out", tmp_path / "out")
    assert ra3.refuses(*infuse, "model.ffn_hidden_size=96") == f"--checkpoint={start}: {differs}"
    assert not (tmp_path / "out").exists()


def test_an_infusion_in_use(finished: Path, ra3: Ra3, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    words = ("infuse", "--checkpoint", finished / "checkpoints/mstep-1/final", "--out", out)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        expected = f"--out={out}: another process is writing there: wait for it, or stop it"
        assert ra3.refuses(*words) == expected and contents(out) == {".lock": b""}
    ra3(*words)
    assert (out / "infused.jsonl").is_file()


@pytest.mark.multiprocess
def test_damaged_checkpoints_are_refused(finished: Path, ra3: Ra3, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints/mstep-2")
    final = run / "checkpoints/estep-2/final"
    shard = next(final.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    shutil.rmtree(run / "infused/iteration_2")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if '"infuse", "iteration": 2' in line)
    (run / "metrics.jsonl").write_text("".join(lines[:end]))
    message = ra3.refuses("train", config, f"run_dir={run}", "--resume")
    assert message.startswith(f"{final / '__0_0.distcp'}: is truncated: ")
    shard.unlink()
    message = ra3.refuses("train", config, f"run_dir={run}", "--resume", "parallel.context=2")
    assert message == f"{shard}: is missing: use another checkpoint", "once, of two processes"
    # without its record, the folder is no checkpoint: the phase is done again, and the run ends as before
    (final / "checkpoint.json").unlink()
    shutil.rmtree(run / "evaluations")
    shutil.copytree(finished / "evaluations", run / "evaluations", ignore=shutil.ignore_patterns("ra3-2.json"))
    ra3("train", config, f"run_dir={run}", "--resume")
    assert metrics(run) == metrics(finished)


def test_a_damaged_evaluation_is_measured_again_when_it_is_deleted(
    finished: Path, ra3: Ra3, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "evaluations" / "ra3-2.json"
    remedy = "delete it, and --resume measures again"
    file.write_text("")
    said = f"{file}: not valid JSON (Expecting value: line 1 column 1 (char 0)): {remedy}"
    assert ra3.refuses("train", config, f"run_dir={run}", "--resume") == said
    file.write_text("{}")
    said = f"{file}: holds no figures of an evaluation: {remedy}"
    assert ra3.refuses("train", config, f"run_dir={run}", "--resume") == said
    file.unlink()
    summary = run / "summary.json"
    said = f"{summary}: is no summary of a run: delete it, and the run's command with --resume writes it again"
    summary.write_text("[]")
    assert ra3.refuses("report", run) == said
    ra3("train", config, f"run_dir={run}", "--resume")
    assert metrics(run) == metrics(finished)
    assert file.read_text() == (finished / "evaluations" / "ra3-2.json").read_text()


# -- while training -----------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_checkpoint(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    train = ("train", config, *SHORT, "em.control=false", "checkpoint.interval=1")
    kill = ["ra3_megatron.em.steps:PackedSteps.step", "before", 3]
    ra3(*train, f"run_dir={run}", code=-9, kill=kill)
    kept = contents(run / "checkpoints/warm_start/step_000002")
    weights_size = max(len(content) for content in kept.values())
    problem = ra3.refuses(*train, f"run_dir={run}", "--resume", file_size=weights_size // 4)
    assert problem.startswith(f"{run / 'checkpoints/warm_start/final'}: cannot be written: "), problem
    assert contents(run / "checkpoints/warm_start/step_000002") == kept
    # no room for a line of metrics either
    size = (run / "metrics.jsonl").stat().st_size
    assert "cannot be written (File too large)" in ra3.refuses(*train, f"run_dir={run}", "--resume", file_size=size - 9)
    ra3(*train, f"run_dir={run}", "--resume")
    ra3(*train, f"run_dir={whole}")
    assert metrics(run) == metrics(whole)


def test_a_loss_that_is_not_finite(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("warm_start.steps=8", "warm_start.optimizer.learning_rate=1e30", "checkpoint.interval=1")
    problem = ra3.refuses("train", config, f"run_dir={run}", *settings)
    assert problem.startswith("warm_start step 2: "), problem
    assert "lower the learning rate" in problem
    dump = run / "failed/warm_start-000002.json"
    assert str(dump) in problem
    failed = json.loads(dump.read_text())
    assert (failed["phase"], failed["step"], failed["seed"]) == ("warm_start", 2, 7)
    assert failed["checkpoint"] == str(run / "checkpoints/warm_start/step_000001")
    named = {json.loads(line)["name"] for line in (run / "corpus/text/train.jsonl").read_text().splitlines()}
    assert failed["documents"] and set(failed["documents"]) <= named
    assert [row["step"] for row in metrics(run)] == [1], "no metrics of the failed step"
    assert ra3.refuses("train", config, f"run_dir={run}", *settings, "--resume") == problem, "repeated exactly"


def test_held_out_figures_that_are_not_finite() -> None:
    from ra3_megatron.em.loop import require_finite

    require_finite({"code_ce": 1.0, "thought_ce": None}, Path("final"))
    with pytest.raises(UserError, match="held-out elbo of final is nan: training has diverged"):
        require_finite({"code_ce": 1.0, "elbo": float("nan")}, Path("final"))
