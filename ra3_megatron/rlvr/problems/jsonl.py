"""Problems of the user's: one JSON object a line.

    {"name": "double", "prompt": "def double(x):\\n", "tests": ["assert double(2) == 4"]}
    {"name": "sum", "prompt": "Read two numbers, print their sum.\\n", "answer": "program",
     "cases": [{"input": "1 2\\n", "output": "3\\n"}]}

Keys: name, prompt; tests (assertions that call functions of the program) with setup, or cases (standard input and
output) with checker (Python source that defines check(input, expected, output) -> bool); answer, stop, solution as in
`Problem`; split: "train" or "held_out".
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.problems.checks import require_parsed
from ra3_megatron.rlvr.problems.problem import Answer, Problem
from ra3_megatron.rlvr.sandbox import FunctionTests, StdinTests

MOST_ERRORS = 10
"""Lines of errors that are shown."""


class Case(BaseModel):
    """One run of a program: what it reads, what it must print."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: str
    output: str


class Row(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    tests: list[str] = []
    setup: str = ""
    cases: list[Case] = []
    checker: str | None = None
    answer: Answer = "continues"
    stop: list[Annotated[str, Field(min_length=1)]] = []
    solution: str | None = None
    split: Literal["train", "held_out"] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Row":
        if bool(self.tests) == bool(self.cases):
            raise ValueError("give either tests or cases")
        if self.tests:
            require_parsed(self.setup, self.tests)
        if self.checker is not None:
            if not self.cases:
                raise ValueError("checker goes with cases")
            require_parsed(self.checker, ["check"])
        return self

    def problem(self) -> Problem:
        """As the policy gets it."""
        tests: FunctionTests | StdinTests
        if self.tests:
            tests = FunctionTests(setup=self.setup, tests=tuple(self.tests))
        else:
            tests = StdinTests(tuple((case.input, case.output) for case in self.cases), self.checker)
        return Problem(self.name, self.prompt, tests, self.answer, tuple(self.stop), self.solution)


def jsonl_problems(path: str, limit: int | None, held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems: by `split` where a line has one; of the others, the last `held_out` are held out.

    Raises UserError with one line for each line of the file that is wrong (the first ones).
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # a text may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"rlvr.problems.path={path}: cannot be read ({error})") from error
    rows: list[Row] = []
    errors: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = Row.model_validate(json.loads(line))
            row.problem()
        except json.JSONDecodeError as error:
            errors.append(f"{path}:{number}: no JSON ({error.msg} at character {error.pos})")
            continue
        except ValidationError as error:
            errors += [f"{path}:{number}: {_where(each['loc'])}{_what(each['msg'])}" for each in error.errors()]
            continue
        except (
            UserError,
            ValueError,
            RecursionError,
        ) as error:  # a checker without check, a number of 5,000 digits
            errors.append(f"{path}:{number}: {str(error).splitlines()[0]}")
            continue
        if row.name in seen:
            errors.append(f"{path}:{number}: name: {row.name} stands in line {seen[row.name]} already")
        seen.setdefault(row.name, number)
        rows.append(row)
    if errors:
        more = [f"{path}: and {len(errors) - MOST_ERRORS} more errors"] if len(errors) > MOST_ERRORS else []
        raise UserError("\n".join(errors[:MOST_ERRORS] + more))
    if not rows:
        raise UserError(f"rlvr.problems.path={path}: holds no problem")
    free = [row for row in rows if row.split is None]
    given = [row for row in rows if row.split == "held_out"]
    kept = max(0, min(held_out - len(given), len(free) - 1))
    valid = (given + free[len(free) - kept :])[:held_out]
    train = [row for row in rows if row.split != "held_out" and row not in valid]
    if not train:
        raise UserError(f"rlvr.problems.path={path}: every problem is held out: none is left to train on")
    return [row.problem() for row in train][:limit], [row.problem() for row in valid]


def _what(message: str) -> str:
    return message.removeprefix("Value error, ")


def _where(place: tuple[int | str, ...]) -> str:
    return ".".join(map(str, place)) + ": " if place else ""
