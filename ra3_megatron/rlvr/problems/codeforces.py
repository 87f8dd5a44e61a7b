"""Codeforces problems with official tests, rows of the schema of open-r1/codeforces, and programs to grade."""

from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.problems.checks import syntax_error
from ra3_megatron.rlvr.problems.room import with_room
from ra3_megatron.rlvr.sandbox import Limits, Program, StdinTests

STARTING = 10.0
SLOWER = 4.0
"""Python gets this many times the time limit, which is set for compiled languages."""
DEFAULT_SECONDS, DEFAULT_MEGABYTES = 2.0, 256.0
STOPS = ("###",)
"""A section of the prompt's form begins."""

_CHECKER = '''
import contextlib, io, os, sys, tempfile
SOURCE = {source!r}

def check(input, expected, output):
    """Runs the data set's checker as its card says: files of input, expected and found output; it prints a score."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, text in (("input.txt", input), ("correct_output.txt", expected), ("solution_output.txt", output)):
            paths.append(os.path.join(folder, name))
            with open(paths[-1], "w") as file:
                file.write(text)
        said, before = io.StringIO(), sys.argv
        sys.argv = ["checker.py", *paths]
        try:
            with contextlib.redirect_stdout(said):
                exec(compile(SOURCE, "checker.py", "exec"), {{"__name__": "__main__"}})
        except SystemExit:
            pass
        finally:
            sys.argv = before
    words = said.getvalue().split()
    if len(words) != 1:  # in a message stand the program's own words, and line ends
        return False
    score = float(words[0])
    return score - score == 0 and score >= 1.0
'''


def choose(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows that can be graded exactly, and how many were left out for which reason."""
    left_out: dict[str, int] = {}
    kept = []
    for row in rows:
        reason = reason_left_out(row)
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            kept.append(row)
    if not kept:
        raise UserError(f"codeforces: no task can be graded ({left_out})")
    return kept, left_out


def reason_left_out(row: dict[str, Any]) -> str | None:
    """Why a row cannot be graded."""
    if not row.get("official_tests"):
        return "no official tests"
    if not row.get("official_tests_complete"):
        return "official tests incomplete"
    if row.get("interaction_format"):
        return "interactive"
    if row.get("input_mode", "stdio") not in ("stdio", None):
        return "reads a file"
    return None


def prompt(row: dict[str, Any]) -> str:
    """Statement, input, output and examples in sections; the model writes a program behind `### Answer`."""
    parts = [f"### Question\n{row['title']}\n\n{row['description']}\n"]
    parts += [f"\nInput\n{row['input_format']}\n"] if row.get("input_format") else []
    parts += [f"\nOutput\n{row['output_format']}\n"] if row.get("output_format") else []
    for number, example in enumerate(row.get("examples") or [], start=1):
        parts.append(f"\nExample {number}, input\n{example['input']}\nExample {number}, output\n{example['output']}\n")
    parts += [f"\nNote\n{row['note']}\n"] if row.get("note") else []
    return "".join(parts) + "\n### Answer\n\n"


def program(row: dict[str, Any], code: str) -> Program:
    """What is graded. Raises UserError when the row's tests cannot be read."""
    try:
        cases = tuple((test["input"], test["output"]) for test in row["official_tests"])
        if not all(isinstance(text, str) for case in cases for text in case):
            raise TypeError("not text")
    except (KeyError, TypeError) as error:
        raise UserError(f"codeforces, {row.get('id')}: official_tests need input and output ({error})") from error
    source = row.get("generated_checker")
    if source is not None and not isinstance(source, str):
        raise UserError(f"codeforces, {row.get('id')}: generated_checker: must be a text or null")
    if source and (said := syntax_error(source, "generated_checker")):
        raise UserError(f"codeforces, {row.get('id')}: generated_checker: must be Python ({said})")
    try:
        return Program(code, StdinTests(cases, checker=_CHECKER.format(source=source) if source else None))
    except UserError as error:
        raise UserError(f"codeforces, {row.get('id')}: {error}") from error


def limits(row: dict[str, Any]) -> Limits:
    """For all tests of a program together; CPU time is that of one."""
    seconds = SLOWER * float(row.get("time_limit") or DEFAULT_SECONDS)
    memory = int(float(row.get("memory_limit") or DEFAULT_MEGABYTES)) + 256  # the interpreter and the runner
    total = STARTING + seconds * len(row["official_tests"])
    found = Limits(seconds=total, cpu_seconds=seconds, memory_mib=max(memory, 512), disk_mib=64, output_kib=16384)
    return with_room(found, ((test["input"], test["output"]) for test in row["official_tests"]))
