"""The generated tasks of `corpus.tasks` as problems: the corpus's own split decides which are held out."""

from ra3_megatron.config.data import CorpusConfig
from ra3_megatron.corpus.generated import Tasks
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.sandbox import FunctionTests
from ra3_megatron.tasks.problems import problem


def generated_problems(config: CorpusConfig, limit: int | None, held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, at most so many of each, in the order of their numbers."""
    tasks = Tasks(config)
    train: list[Problem] = []
    valid: list[Problem] = []
    for number in range(config.tasks.first, config.tasks.first + len(tasks)):
        found, most = (train, limit) if tasks.split(number) == "train" else (valid, held_out)
        if most is not None and len(found) >= most:
            continue
        given = problem(tasks.numbered(number), tasks.family)
        tests = FunctionTests(setup="", tests=given.tests, entry_points=(given.entry_point,))
        found.append(Problem(given.name, given.prompt, tests, solution=given.solution))
    return train, valid
