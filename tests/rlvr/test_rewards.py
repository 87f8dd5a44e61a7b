"""Rewards of responses: what is executed, and that a failure of the sandbox is nobody's reward."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy import Toy

from ra3_megatron.config.errors import Unavailable
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rlvr.cutting import Cuts
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.responses import Response
from ra3_megatron.rlvr.rewards import Grader
from ra3_megatron.rlvr.sandbox import FunctionTests, Isolation, Outcome, Program, Sandbox, SandboxError, Verdict
from ra3_megatron.rollout.protocol import Finish

TABLE = [b"a", b"b", b"\n", b"#", b"1", b"x = "]
PROBLEM = Problem("one", "x = ", FunctionTests("", ("assert x == 1",), entry_points=("x",)))


def response(toy: Toy, text: str) -> Response:
    ids = np.array([toy.tokenizer.bos, *toy.tokenizer.encode("x = " + text), toy.tokenizer.eos], dtype=np.int32)
    return Response(0, ids, 2, np.zeros(len(ids), dtype=np.float32), Finish.END, 0)


def test_equal_programs_are_executed_once_and_thoughts_are_not(sandbox: Sandbox, runtime: Runtime) -> None:
    toy = Toy(runtime, "comment", TABLE, 4)
    grader = Grader(sandbox, [PROBLEM], Cuts([PROBLEM], toy.tokenizer, toy.latents), runtime)
    graded = grader.grade([response(toy, text) for text in ("1\n", "11\n", "1\n", "1\n#ab\n", "a\n")])
    assert graded.rewards == [1, 0, 1, 1, 0] and graded.executed == 3
    assert [outcome.verdict for outcome in graded.outcomes][1::3] == [Verdict.WRONG, Verdict.CRASHED]
    assert graded.metrics()["verdict_passed"] == pytest.approx(0.6)
    assert graded.metrics()["distinct_programs"] == pytest.approx(0.6)
    assert graded.thoughts == [0, 0, 0, 1, 0] and graded.metrics()["thoughts_per_response"] == pytest.approx(0.2)


def test_an_answer_ends_at_its_first_stop(sandbox: Sandbox, runtime: Runtime) -> None:
    toy = Toy(runtime, "comment", TABLE, 4)
    problem = replace(PROBLEM, stop=("\nb", "\na"))
    graded = Grader(sandbox, [problem], Cuts([problem], toy.tokenizer, toy.latents), runtime).grade(
        [response(toy, "1\na1\nb"), response(toy, "1\n#a\nb1")]
    )
    assert [program.code for program in graded.programs] == ["x = 1", "x = 1"] and graded.rewards == [1, 1]


class Broken(Sandbox):
    """A sandbox that does not work."""

    def grade(self, programs: object) -> list[Outcome]:
        raise SandboxError("the sandbox failed 4 times: no room")


def test_a_sandbox_that_fails_gives_no_reward(sandbox: Sandbox, runtime: Runtime) -> None:
    toy = Toy(runtime, "comment", TABLE, 4)
    broken = Broken(Isolation.BUBBLEWRAP, sandbox.limits, 1)
    grader = Grader(broken, [PROBLEM], Cuts([PROBLEM], toy.tokenizer, toy.latents), runtime)
    with pytest.raises(Unavailable, match=r"^sandbox=bubblewrap: the sandbox failed 4 times: no room$"):
        grader.grade([response(toy, "1\n")])


def test_a_defect_is_told_to_the_others_before_it_is_raised(
    sandbox: Sandbox, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would wait for this process for ever."""
    toy = Toy(runtime, "comment", TABLE, 4)
    told: list[object] = []
    gather = type(runtime).gather_all
    monkeypatch.setattr(type(runtime), "gather_all", lambda self, value: (told.append(value), gather(self, value))[1])
    monkeypatch.setattr(sandbox, "grade", lambda programs: [][1])
    with pytest.raises(IndexError):
        Grader(sandbox, [PROBLEM], Cuts([PROBLEM], toy.tokenizer, toy.latents), runtime).grade([response(toy, "1")])
    assert told == ["IndexError: list index out of range"]


def test_programs_are_equal_when_code_and_tests_are() -> None:
    assert PROBLEM.program("1\n") == Program("x = 1\n", PROBLEM.tests)
