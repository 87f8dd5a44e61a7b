"""Where responses end, and what is executed of them: thoughts and the end token are dropped, then the text ends before
the first stop."""

from collections.abc import Sequence
from typing import cast

from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.text.cutting import Cut, Cutter, Thoughts
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.tokenizer import Tokenizer


class Cuts:
    """Of the responses to these problems."""

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        latents: LatentFormat,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        """ends: tokens that end a response beside the tokenizer's own."""
        self._problems = problems
        self.ends = ends | {tokenizer.eos}
        thoughts = cast(Thoughts, latents.name)
        self._cutters = [
            Cutter(tokenizer, each.stop, thoughts, each.answer == "continues", each.answer == "program", self.ends)
            for each in problems
        ]

    @property
    def needed(self) -> bool:
        """Whether there are stops: without any a response ends by its last token or its length alone."""
        return any(each.stop for each in self._problems)

    def cut(self, problem: int, ids: Sequence[int]) -> Cut:
        """What a response to a problem, by its index, comes to."""
        return self._cutters[problem].cut(self._problems[problem].prompt, ids)

    def ended(self, problem: int, ids: Sequence[int], seen: int = 0) -> int | None:
        """How many of these tokens are the response, when a stop is met behind the first `seen`; None: it goes on."""
        return self._cutters[problem].ended(self._problems[problem].prompt, ids, seen)
