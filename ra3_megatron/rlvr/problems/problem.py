"""One problem: what the policy is given, and the tests that its answer must pass."""

from dataclasses import dataclass
from typing import Literal

from ra3_megatron.rlvr.sandbox import FunctionTests, Program, StdinTests
from ra3_megatron.text.fences import program_in

Answer = Literal["continues", "program"]


@dataclass(frozen=True)
class Problem:
    """A problem. Its name is unique among the problems of a run."""

    name: str
    prompt: str
    """Text that the response follows."""
    tests: FunctionTests | StdinTests
    answer: Answer = "continues"
    """`continues`: the program is the prompt and the response behind it; `program`: the response holds the program, in
    a fenced code block or as it is (`text.fences.program_in`)."""
    stop: tuple[str, ...] = ()
    """The response ends before the first of these texts."""
    solution: str | None = None
    """A response that passes, where one is known."""
    more_solutions: tuple[str, ...] = ()
    """Other ones, for decontamination."""
    prelude: str = ""
    """Code before the program, such as imports that everybody may take for granted."""

    def __post_init__(self) -> None:
        """Raises ValueError for text that is none (lone surrogates, which JSON can hold): nothing could encode it."""
        self.prompt.encode()

    def program(self, text: str) -> Program:
        """What is executed for a response. text: what is left of it without thoughts and before its stop
        (rlvr/cutting.py)."""
        if self.answer == "continues":
            return Program(self.prelude + self.prompt + text, self.tests)
        return Program(self.prelude + program_in(text), self.tests)
