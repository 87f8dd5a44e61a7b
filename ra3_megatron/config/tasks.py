"""Generated tasks with known temporal abstractions: `corpus.source=tasks`."""

from typing import Literal

from pydantic import Field, model_validator

from ra3_megatron.config.base import Section

Family = Literal["hopprog", "stateprog", "composition", "equations"]

ROUTINES = 16
"""Routines of the program families."""

MAX_DIGITS = 10
"""Most symbols where they are digits."""

MAX_NAMES = 26
"""Most symbols of `composition`, where they are letters."""

MAX_STEPS = 9
"""Most steps between two items of `stateprog`."""

MAX_WITHHELD_VALUES = 5
"""Most values that `equations` can withhold: with half of them, every depth can still be reached."""


class TasksConfig(Section):
    """Which tasks are generated, and what their warm-start texts hold (`corpus.source=tasks`)."""

    family: Family = "hopprog"
    """`hopprog`: follow a successor table, then look up a routine; `stateprog`: the next routine follows a running
    state; `composition`: f(g(x)) with meaningless names; `equations`: arithmetic on a graph, one equation a line.
    See docs/tasks.md."""

    count: int = Field(default=20_000, ge=1)
    """Tasks."""

    seed: int = Field(default=0, ge=0)
    """Task number k is a function of (family's keys, seed, k)."""

    first: int = Field(default=0, ge=0)
    """Number of the first task. Each number is a task drawn by itself: where few are different, two may be the same."""

    min_items: int = Field(default=1, ge=1)
    """Items of a task (routines one after another; equations) at least."""

    max_items: int = Field(default=3, ge=1)
    """Items of a task at most."""

    min_hops: int = Field(default=0, ge=0)
    """Steps of serial computation behind an item at least."""

    max_hops: int = Field(default=3, ge=0)
    """Steps of serial computation behind an item at most."""

    inline: bool = True
    """Each item's request stands in a line of its own before it, besides the list in the prompt (`hopprog`). False: the
    model has to count items."""

    symbols: int = Field(default=8, ge=2, le=MAX_NAMES)
    """Symbols of the tables: states, names or variables. At most 10 but for `composition`, which needs 2 for each depth
    0 … max_hops; `equations` needs max_hops + 2."""

    routine_lines: int | None = Field(default=None, ge=2, le=8)
    """Lines of every routine; none: 16 hand-written ones of 2 to 6 lines. Not with `equations`."""

    computable: bool = True
    """False: routines are drawn at random whatever the tables say, so that thinking cannot help (a control)."""

    transplanted: bool = False
    """With `computable=False`, thoughts name the routine that really follows, against the tables: do a model's lines
    follow its thoughts? (`hopprog`)"""

    withheld: int = Field(default=0, ge=0, lt=ROUTINES - 1)
    """Routines that never occur in the training split and do in the held-out one (pruned actions, on purpose). Of
    `equations`: the largest values."""

    thought_share: float = Field(default=0.5, ge=0, le=1)
    """Share of items whose right thought stands above them, as a comment, in the warm-start text. A model from scratch
    has no thoughts to sample otherwise."""

    thought_hops: int | None = Field(default=None, ge=0)
    """Only items of at most so many hops have it; none: all. Drills, whose thoughts are all written, do not read it."""

    drill_share: float = Field(default=0.0, ge=0, le=1)
    """Share of tasks that are drills: `drill_items` items whose right thoughts are all written in the warm-start text.
    A small model learns look-ups from many of them in one sequence (`hopprog`)."""

    plain_drill_share: float = Field(default=0.0, ge=0, le=1)
    """Share of drills whose items have `plain_drill_hops` hops at most and no thoughts: from these it learns to do
    without where its layers are enough."""

    plain_drill_hops: int = Field(default=0, ge=0)
    """Hops of an item of such a drill at most; 0: one look-up."""

    drill_items: int = Field(default=8, ge=1)
    """Items of a drill."""

    junk_share: float = Field(default=0.05, ge=0, le=1)
    """Share of lines inside items with a thought that says nothing about them, in the warm-start text: without any,
    thoughts inside items could not be sampled, and not thinking there would prove nothing. Items of `equations` have no
    lines inside."""

    @model_validator(mode="after")
    def _check(self) -> "TasksConfig":
        problems = [
            f"corpus.tasks.{low}={getattr(self, low)} is above corpus.tasks.{high}={getattr(self, high)}"
            for low, high in (("min_items", "max_items"), ("min_hops", "max_hops"))
            if getattr(self, low) > getattr(self, high)
        ]
        if self.transplanted and (self.computable or self.family != "hopprog"):
            problems.append(
                "corpus.tasks.transplanted=true goes with corpus.tasks.family=hopprog and corpus.tasks.computable=false"
            )
        if self.drill_share and self.family != "hopprog":
            problems.append(f"corpus.tasks.drill_share={self.drill_share} goes with corpus.tasks.family=hopprog")
        if not self.inline and self.family != "hopprog":
            problems.append(
                f"corpus.tasks.inline=false is not read with corpus.tasks.family={self.family}: it goes with hopprog"
            )
        if self.plain_drill_share and not self.drill_share:
            problems.append(
                f"corpus.tasks.plain_drill_share={self.plain_drill_share} is not read with "
                f"corpus.tasks.drill_share={self.drill_share}: it is a share of the drills; set drill_share too"
            )
        if self.plain_drill_hops > self.max_hops:
            problems.append(
                f"corpus.tasks.plain_drill_hops={self.plain_drill_hops} is above corpus.tasks.max_hops={self.max_hops}"
            )
        problems += self._symbol_problems()
        problems += self._equation_problems() if self.family == "equations" else self._program_problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _symbol_problems(self) -> list[str]:
        least = {"composition": 2 * (self.max_hops + 1), "equations": self.max_hops + 2}.get(self.family, 2)
        most = MAX_NAMES if self.family == "composition" else MAX_DIGITS
        if least > most:
            return [
                f"corpus.tasks.max_hops={self.max_hops} needs {least} symbols with corpus.tasks.family={self.family}, "
                f"which has {most}: lower it"
            ]
        if least <= self.symbols <= most:
            return []
        return [
            f"corpus.tasks.symbols={self.symbols}: must be from {least} to {most} with "
            f"corpus.tasks.family={self.family} and corpus.tasks.max_hops={self.max_hops}"
        ]

    def _program_problems(self) -> list[str]:
        problems = []
        if self.family == "stateprog" and self.max_hops > MAX_STEPS:
            problems.append(
                f"corpus.tasks.max_hops={self.max_hops} is above {MAX_STEPS}: corpus.tasks.family=stateprog writes "
                "the steps before an item as one digit"
            )
        at_once = {"hopprog": self.symbols, "stateprog": state_routines(self.symbols)}.get(self.family, 1)
        if self.symbols <= MAX_DIGITS and at_once > ROUTINES - self.withheld:
            problems.append(
                f"corpus.tasks.withheld={self.withheld} leaves {ROUTINES - self.withheld} of {ROUTINES} routines, but "
                f"corpus.tasks.symbols={self.symbols} needs {at_once} with corpus.tasks.family={self.family}"
            )
        return problems

    def _equation_problems(self) -> list[str]:
        problems = []
        if self.routine_lines is not None:
            problems.append(
                f"corpus.tasks.routine_lines={self.routine_lines} does not go with corpus.tasks.family=equations, "
                "whose items are one line each: set it to null"
            )
        if self.withheld > MAX_WITHHELD_VALUES:
            problems.append(
                f"corpus.tasks.withheld={self.withheld} is above {MAX_WITHHELD_VALUES}: with "
                "corpus.tasks.family=equations, values of one digit are withheld"
            )
        return problems


def state_routines(symbols: int) -> int:
    """Routines of a task of `stateprog`: states share them."""
    return max(2, symbols // 2)
