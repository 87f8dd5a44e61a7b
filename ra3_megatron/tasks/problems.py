"""Tasks as problems with verifiable rewards: what is given, what must be written, and tests made by executing it."""

from dataclasses import dataclass
from random import Random

from ra3_megatron.tasks.task import Task, TaskFamily

EXAMPLES = 5
"""Tests of a problem; fewer where they would be the same."""


@dataclass(frozen=True)
class Problem:
    """One problem: a completion of `prompt` is right when the tests pass behind it."""

    name: str
    """Of the task."""
    prompt: str
    """What is given; the completion starts on the next line."""
    entry_point: str
    """Name of the function that the tests call."""
    tests: tuple[str, ...]
    """Assertions, one statement each."""
    solution: str
    """The expert's completion: `prompt + solution` passes."""


def problem(task: Task, family: TaskFamily, examples: int = EXAMPLES) -> Problem:
    """The problem of a task. Its tests hold what the task's own program returns.

    Executes that program in this process: it was written by our generator, by nobody else.
    """
    space: dict[str, object] = {}
    exec(task.code, space)
    function = space["f"]
    assert callable(function)
    rng = Random(f"tests/{task.name}")
    tests = []
    for _ in range(examples):
        arguments = family.example(rng)
        tests.append(f"assert f({arguments}) == {eval(f'f({arguments})', {'f': function})!r}")
    return Problem(task.name, task.prompt, "f", tuple(dict.fromkeys(tests)), task.code.removeprefix(task.prompt))
