"""Rewards of responses: 1 when every test of the program passes, else 0. Programs are executed on all processes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ra3_megatron.config.errors import Unavailable
from ra3_megatron.config.rlvr import RlvrLimits
from ra3_megatron.mcore import watchdog
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rlvr.cutting import Cuts
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.responses import Response
from ra3_megatron.rlvr.sandbox import Limits, Outcome, Program, Sandbox, SandboxError, StdinTests, Verdict


@dataclass(frozen=True)
class Graded:
    """What became of responses, in their order."""

    outcomes: list[Outcome]
    programs: list[Program]
    executed: int
    """Programs that were executed: equal ones are once."""
    thoughts: list[int]
    """How many each holds."""

    @property
    def rewards(self) -> list[float]:
        """1 for a program that passes."""
        return [float(outcome.verdict is Verdict.PASSED) for outcome in self.outcomes]

    def metrics(self) -> dict[str, float]:
        """Share of each verdict, and of the tests that passed; thoughts."""
        number = max(len(self.outcomes), 1)
        verdicts = Counter(outcome.verdict for outcome in self.outcomes)
        shares = {f"verdict_{verdict.value}": verdicts[verdict] / number for verdict in Verdict}
        tests = [outcome.passed / outcome.total for outcome in self.outcomes if outcome.total]
        return {
            **shares,
            "tests_passed": float(np.mean(tests)) if tests else 0.0,
            "distinct_programs": self.executed / number,
            "thoughts_per_response": sum(self.thoughts) / number,
        }


def joined(parts: Sequence[Graded]) -> Graded:
    """Of batches that have no program in common, one behind the other."""
    return Graded(
        outcomes=[outcome for part in parts for outcome in part.outcomes],
        programs=[program for part in parts for program in part.programs],
        executed=sum(part.executed for part in parts),
        thoughts=[number for part in parts for number in part.thoughts],
    )


def sandbox_limits(limits: RlvrLimits, problems: Sequence[Problem] = ()) -> Limits:
    """The limits of the sandbox that a configuration asks for, with room for twice the longest output expected."""
    found = Limits(seconds=limits.seconds, memory_mib=limits.memory_mib)
    expected = [case[1] for each in problems if isinstance(each.tests, StdinTests) for case in each.tests.cases]
    longest = max((len(text.encode()) for text in expected), default=0)
    return replace(found, output_kib=max(found.output_kib, 1 + 2 * longest // 1024))


class Grader:
    """Grades responses, dealt out over all processes. Collective."""

    def __init__(
        self,
        sandbox: Sandbox,
        problems: Sequence[Problem],
        cuts: Cuts,
        runtime: Runtime,
    ) -> None:
        self._sandbox, self._problems, self._cuts, self._runtime = sandbox, problems, cuts, runtime

    def grade(self, responses: Sequence[Response]) -> Graded:
        """What becomes of each response; the same on every process. Raises Unavailable on all of them when the sandbox
        itself fails on one: that is nobody's reward."""
        cuts = [self._cuts.cut(r.problem, r.ids[r.prompt_tokens :].tolist()) for r in responses]
        programs = [self._problems[r.problem].program(cut.text) for r, cut in zip(responses, cuts, strict=True)]
        numbers: dict[Program, int] = {}
        which = [numbers.setdefault(program, len(numbers)) for program in programs]
        mine = list(numbers)[self._runtime.rank :: self._runtime.world_size]
        watchdog.touch()
        found_here: list[Outcome] = []
        failure = ""
        defect: Exception | None = None
        try:
            found_here = self._sandbox.grade(mine)
        except SandboxError as error:
            failure = str(error)
        except Exception as error:  # a defect: the others wait for what this process has to say
            failure, defect = f"{type(error).__name__}: {error}", error
        failures = [told for told in self._runtime.gather_all(failure) if told]
        if defect is not None:
            raise defect
        if failures:
            raise Unavailable(f"sandbox={self._sandbox.isolation.value}: {failures[0]}")
        shares = self._runtime.gather_all(found_here)
        watchdog.touch()
        outcomes: list[Outcome | None] = [None] * len(numbers)
        for rank, share in enumerate(shares):
            outcomes[rank :: self._runtime.world_size] = share
        found = [outcome for outcome in outcomes if outcome is not None]
        assert len(found) == len(numbers)
        return Graded([found[place] for place in which], programs, len(numbers), [cut.thoughts for cut in cuts])
