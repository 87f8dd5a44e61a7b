"""The generated tasks of `corpus.tasks` as problems: the corpus's own split decides which are held out."""

from itertools import islice

from ra3_megatron.config.data import CorpusConfig
from ra3_megatron.corpus.generated import Tasks
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.sandbox import FunctionTests
from ra3_megatron.tasks.problems import problem

SAME = "not held out, the prompt is that of a training problem"
"""Why a task of the held-out split is no problem."""


def generated_problems(
    config: CorpusConfig, limit: int | None, held_out: int
) -> tuple[list[Problem], list[Problem], dict[str, int]]:
    """Training and held-out problems, at most so many of each, in the order of their numbers; and how many tasks are
    not held out because a training problem has the same prompt (small settings have few different tasks)."""
    tasks = Tasks(config)
    train: list[Problem] = []
    valid: list[Problem] = []
    numbers = range(config.tasks.first, config.tasks.first + len(tasks))
    for number in islice((number for number in numbers if tasks.split(number) == "train"), limit):
        train.append(_problem(tasks, number))
    trained = {each.prompt for each in train}
    same = 0
    for number in numbers:
        if len(valid) >= held_out:
            break
        if tasks.split(number) == "train":
            continue
        found = _problem(tasks, number)
        if found.prompt in trained:
            same += 1
        else:
            valid.append(found)
    return train, valid, {SAME: same} if same else {}


def _problem(tasks: Tasks, number: int) -> Problem:
    given = problem(tasks.numbered(number), tasks.family)
    tests = FunctionTests(setup="", tests=given.tests, entry_points=(given.entry_point,))
    return Problem(given.name, given.prompt, tests, solution=given.solution)
