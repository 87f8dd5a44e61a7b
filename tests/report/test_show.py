"""Printed transcripts: columns, colour, choice of file."""

import io
import os
from pathlib import Path

import pytest
from made_run import CONFIG, make_transcripts
from rich.console import Console

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.show import show
from ra3_megatron.report.transcripts import (
    LineRecord,
    TranscriptRecord,
    read_transcripts,
    transcript_files,
    write_transcripts,
)


@pytest.fixture
def empty_run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def shown(run_dir: Path, terminal: bool = False, width: int = 100, **choice) -> str:
    system = "standard" if terminal else None
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=system, width=width)
    show(run_dir, console=console, **choice)
    return console.file.getvalue()  # type: ignore[attr-defined]


def one_line(**figures) -> TranscriptRecord:
    line = LineRecord(**figures)
    return TranscriptRecord(document="d", iteration=1, step=1, rollout=0, weight_version=0, lines=[line])


def test_transcripts_round_trip_and_are_replaced_whole(tmp_path: Path) -> None:
    path = write_transcripts(tmp_path, "estep-1-0020", make_transcripts("a"))
    assert list(read_transcripts(path)) == make_transcripts("a")
    assert write_transcripts(tmp_path, "estep-1-0020", make_transcripts("b")[:1]) == path
    assert list(read_transcripts(path)) == make_transcripts("b")[:1]


def test_lines_of_another_form_are_named(tmp_path: Path) -> None:
    path = write_transcripts(tmp_path, "x", make_transcripts())
    path.write_text(path.read_text().replace('"log_prob"', '"logprob"', 1))
    with pytest.raises(UserError, match=r"x\.jsonl, line 1: lines\.0\.logprob"):
        list(read_transcripts(path))


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="transcripts name"):
        write_transcripts(tmp_path, name, [])


def test_exact_rows(run: Path) -> None:
    assert shown(run, count=1).splitlines() == [
        "json/decoder.py:12",
        "iteration 1 · step 20 · rollout 0 · weights 7 · 1 thoughts in 3 lines · mean reward -0.933",
        "decision    log q   reward  advant.",
        "·                   -1.500           def scan(text):",
        "think      -3.250   -0.550   +0.125      # start at zero",
        "                                         total = 0",
        "act        -0.062   -0.750   -0.500      return total",
    ]


def test_count_and_colour(run: Path) -> None:
    assert shown(run, count=1).count("json/decoder.py:12") == 1
    plain = shown(run)
    assert plain.count("json/decoder.py:12") == 2
    assert "\x1b" not in plain
    coloured = shown(run, terminal=True, count=1)
    assert "\x1b[1;33m    # start at zero\x1b[0m" in coloured
    assert "\x1b[32m  +0.125  \x1b[0m" in coloured
    assert "\x1b[31m  -0.500  \x1b[0m" in coloured


@pytest.mark.parametrize(("terminal", "width", "limit"), [(False, 60, 100), (True, 80, 80), (True, 200, 100)])
def test_long_lines_go_on_in_the_code_column(empty_run: Path, terminal: bool, width: int, limit: int) -> None:
    code = "x = " + "0123456789" * 20
    write_transcripts(empty_run, "e", [one_line(text=code + "\n")])
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=width)
    show(empty_run, console=console)
    rows = console.file.getvalue().splitlines()[3:]  # type: ignore[attr-defined]
    assert "".join(row[37:] for row in rows) == code
    assert all(row[:37].strip() == "" for row in rows[1:])
    assert max(map(len, rows)) == limit


def test_markup_in_code_is_only_code(empty_run: Path) -> None:
    write_transcripts(empty_run, "e", [one_line(text="\tx[bold] = [/bold]\n", thought="# [red]")])
    rows = shown(empty_run).splitlines()[3:]
    assert [row[37:] for row in rows] == ["    # [red]", "    x[bold] = [/bold]"]


def test_newest_file_phase_and_document_choose(empty_run: Path) -> None:
    for age, name in enumerate(["estep-1-0010", "estep-10-0001", "evaluation-1"]):
        os.utime(write_transcripts(empty_run, name, make_transcripts(name)), (1000 + age, 1000 + age))
    assert shown(empty_run).startswith("evaluation-1\n")
    assert shown(empty_run, phase="estep").startswith("estep-10-0001\n")
    assert shown(empty_run, phase="estep-1").startswith("estep-1-0010\n")
    assert shown(empty_run, document="estep-1-0010").startswith("estep-1-0010\n")


def test_files_of_one_moment_are_ordered_by_their_numbers(empty_run: Path) -> None:
    for name in ("estep-10", "estep-9", "estep-1"):
        os.utime(write_transcripts(empty_run, name, []), (1000, 1000))
    assert [path.stem for path in transcript_files(empty_run)] == ["estep-1", "estep-9", "estep-10"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"phase": "mstep"}, "phase=mstep: no transcripts of it .* there are estep-1-0020"),
        ({"document": "nowhere"}, "document=nowhere: no transcript"),
        ({"count": 0}, "count=0: print at least 1"),
    ],
)
def test_what_is_not_there_is_a_user_error(run: Path, choice: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        show(run, **choice)


def test_run_without_transcripts(empty_run: Path) -> None:
    with pytest.raises(UserError, match="no transcripts yet"):
        show(empty_run)


def test_a_run_of_rlvr_has_none(empty_run: Path) -> None:
    (empty_run / "problems.json").write_text("{}")
    with pytest.raises(UserError, match="a run of ra3 rlvr has no transcripts: see responses/ and"):
        show(empty_run)
