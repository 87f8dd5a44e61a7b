"""The `ra3` command: how verbs are parsed, what they call, exit codes. Not covered: what the called rooms do."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ra3_megatron import __version__
from ra3_megatron.cli import app, versions
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "examples" / "quickstart.yaml")


COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def ra3(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, arguments)


def refusal(*arguments: str) -> list[str]:
    result = ra3(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr.splitlines()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands for the rooms that the verbs call; records the calls."""
    recorded: list[tuple[Any, ...]] = []

    def module(name: str, **functions: Any) -> None:
        fake = types.ModuleType(name)
        for key, function in functions.items():
            setattr(fake, key, function)
        monkeypatch.setitem(sys.modules, name, fake)
        parent, _, child = name.rpartition(".")
        package = importlib.import_module(parent)  # a room itself loads nothing
        monkeypatch.setattr(package, child, fake, raising=False)

    def train(config: RunConfig, resume: bool) -> int:
        recorded.append(("train", config, resume))
        return 0

    def build_report(run_dir: Path) -> Path:
        recorded.append(("report", run_dir))
        return run_dir / "report.html"

    module("ra3_megatron.verbs.train", train=train)
    module("ra3_megatron.report.build", build_report=build_report)
    module("ra3_megatron.report.show", show=lambda *arguments: recorded.append(("show", *arguments)))
    module("ra3_megatron.verbs.infuse", infuse=lambda *arguments: recorded.append(("infuse", *arguments)))
    return recorded


def test_train_passes_the_resolved_configuration(calls: list[tuple[Any, ...]]) -> None:
    result = ra3("train", QUICKSTART, "estep.latent_price=inf", "--resume", "--run-dir", "runs/1e3", "seed=5")
    assert result.exit_code == 0, result.output
    ((_, config, resume),) = calls
    assert resume is True
    assert (config.estep.latent_price, config.run_dir, config.seed) == (float("inf"), "runs/1e3", 5)


def test_run_dir_is_taken_literally(calls: list[tuple[Any, ...]]) -> None:
    assert ra3("train", QUICKSTART, "--run-dir", "2024").exit_code == 0
    assert calls[0][1].run_dir == "2024"
    assert calls[0][2] is False


def test_the_exit_code_of_train_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setattr(sys.modules["ra3_megatron.verbs.train"], "train", lambda config, resume: 7)
    assert ra3("train", QUICKSTART).exit_code == 7


def test_report_and_show(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    result = ra3("report", str(tmp_path))
    assert result.stdout.strip() == str(tmp_path / "report.html")
    assert ra3("show", str(tmp_path), "--phase", "estep1", "--count", "5", "--document", "d").exit_code == 0
    assert calls[0] == ("report", tmp_path)
    assert calls[1][:5] == ("show", tmp_path, "estep1", 5, "d")


def test_infuse_with_and_without_configuration(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    options = ("infuse", "--checkpoint", str(tmp_path), "--out", "out")
    assert ra3(*options, "corpus.source=folder", "corpus.path=src").exit_code == 0
    assert ra3(*options, QUICKSTART, "seed=9").exit_code == 0
    assert calls[0] == ("infuse", tmp_path, Path("out"), None, ["corpus.source=folder", "corpus.path=src"])
    assert calls[1][3].seed == 9
    assert calls[1][4] == ["seed=9"]


def test_config_prints_the_resolved_configuration() -> None:
    result = ra3("config", QUICKSTART, "estep.steps=3")
    assert result.exit_code == 0
    values = yaml.safe_load(result.stdout)
    assert values["estep"]["steps"] == 3
    assert set(values) == set(RunConfig.model_fields)


def test_config_needs_no_file() -> None:
    assert yaml.safe_load(ra3("config", "seed=11").stdout)["seed"] == 11


def test_describe_lists_keys_with_their_meaning() -> None:
    text = COLOURS.sub("", ra3("config", "--describe").stdout)
    assert "estep.group_size = 8  (int >= 2)" in text
    assert "their mean return is the baseline" in text


def test_a_mistake_is_one_line_on_stderr_for_each_problem(calls: list[tuple[Any, ...]]) -> None:
    assert refusal("train", QUICKSTART, "estep.group_size=1", "seed=-1") == [
        "ra3: seed=-1: must be at least 0",
        "ra3: estep.group_size=1: must be at least 2",
    ]
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("train", "missing.yaml"), "ra3: missing.yaml: no such configuration file"),
        (
            ("train", "seed=3"),
            "ra3: train needs a configuration file before the overrides, such as examples/quickstart.yaml",
        ),
        (
            ("config", QUICKSTART, "estep.steps"),
            "ra3: estep.steps: one configuration file is enough; an override is written section.key=value",
        ),
        (("report", "missing"), "ra3: missing: no such run folder"),
        (("show", "missing"), "ra3: missing: no such run folder"),
        (("infuse", "--checkpoint", "missing", "--out", "o"), "ra3: missing: no such checkpoint folder"),
        (("config", "--markdown"), "ra3: --markdown goes with --describe"),
        (("config", "--describe", "seed=1"), "ra3: --describe lists all keys and takes no configuration"),
    ],
)
def test_refusals(arguments: tuple[str, ...], line: str) -> None:
    assert refusal(*arguments) == [line]


@pytest.mark.parametrize(
    ("arguments", "start", "command"),
    [
        (("--sedd",), "No such option: --sedd", "ra3"),
        (("trian", QUICKSTART), "No such command 'trian'", "ra3"),
        (("train",), "Missing argument 'CONFIG'", "ra3 train"),
        (("train", QUICKSTART, "--resum"), "No such option: --resum", "ra3 train"),
        (("plan", "--gpus", "many"), "--gpus many: ", "ra3 plan"),
        (("plan", "--gpus", "a\nb"), "--gpus a b: ", "ra3 plan"),
        (("preflight", "--max-skew=-1"), "--max-skew -1: ", "ra3 preflight"),
        (("convert", "check", "--hf", "a"), "Missing option '--checkpoint'", "ra3 convert check"),
        (
            ("study", "price", "a.yaml", "--folder", "f", "--seeds", "2", "--seeds", "0"),
            "--seeds 0: ",
            "ra3 study price",
        ),
        (("inspect", "a", "b"), "Got unexpected extra argument", "ra3 inspect"),
    ],
)
def test_mistaken_words_are_one_line(arguments: tuple[str, ...], start: str, command: str) -> None:
    """The option, its value, what would be right, and whose help says more."""
    (line,) = refusal(*arguments)
    assert line.startswith(f"ra3: {start}") and line.endswith(f" ({command} --help)"), line


@pytest.mark.parametrize("verb", [(), ("convert",), ("study",)])
def test_no_words_show_the_help(verb: tuple[str, ...]) -> None:
    result = ra3(*verb)
    assert f"Usage: ra3 {' '.join(verb)}".rstrip() in result.output and "Commands" in result.output
    assert "ra3: " not in result.output


def test_a_users_mistake_found_by_a_room(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    def train(config: RunConfig, resume: bool) -> int:
        raise UserError("corpus.path=x: holds no documents")

    monkeypatch.setattr(sys.modules["ra3_megatron.verbs.train"], "train", train)
    assert refusal("train", QUICKSTART) == ["ra3: corpus.path=x: holds no documents"]


def test_an_interruption_exits_with_130(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    def train(config: RunConfig, resume: bool) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["ra3_megatron.verbs.train"], "train", train)
    result = ra3("train", QUICKSTART)
    assert (result.exit_code, result.stderr) == (130, "ra3: interrupted\n")


def test_so_does_one_that_a_library_fails_about(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    """As torch.save does, which closes its file on the way."""

    def train(config: RunConfig, resume: bool) -> int:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected position in the file")

    monkeypatch.setattr(sys.modules["ra3_megatron.verbs.train"], "train", train)
    result = ra3("train", QUICKSTART)
    assert (result.exit_code, result.stderr) == (130, "ra3: interrupted\n")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    def train(config: RunConfig, resume: bool) -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr(sys.modules["ra3_megatron.verbs.train"], "train", train)
    result = ra3("train", QUICKSTART)
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize("verb", ["train", "report", "infuse", "show", "config"])
def test_every_verb_has_help(verb: str) -> None:
    result = ra3(verb, "--help")
    assert result.exit_code == 0
    assert f"{verb} [OPTIONS]" in COLOURS.sub("", result.stdout)


def test_versions_name_what_is_missing() -> None:
    found = versions()
    assert list(found) == ["ra3", "python", "torch", "megatron-core", "transformer-engine"]
    assert found["ra3"] == __version__
    assert all(found.values())


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_real_command() -> None:
    done = run_python("-m", "ra3_megatron", "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ra3 {' ' * 16}{__version__}\n")
    failed = run_python("-m", "ra3_megatron", "train", "missing.yaml")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "ra3: missing.yaml: no such configuration file\n"


def test_help_version_and_config_do_not_import_torch() -> None:
    script = """
import sys
from ra3_megatron.cli import app
for arguments in (["--help"], ["--version"], ["config", "seed=3"], ["config", "--describe"]):
    app(arguments, standalone_mode=False)
heavy = {"torch", "numpy", "megatron", "transformers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, ["ra3: estep.stepps: unknown key; did you mean estep.steps?"]),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, []),
        (
            {"SLURM_PROCID": "8", "SLURM_LOCALID": "0"},
            ["ra3: rank 8: estep.stepps: unknown key; did you mean estep.steps?"],
        ),
        ({"RANK": "3", "LOCAL_RANK": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, []),
    ],
)
def test_one_process_of_each_node_says_what_is_wrong(
    variables: dict[str, str], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be so on one node alone: a folder that is not there."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert refusal("train", QUICKSTART, "estep.stepps=3") == said
