"""Equations: variables defined by others, modulo 10; each line of the program states the value of one.

    def f():
        \"\"\"
        g 071325                  given: v0 = 7, v1 = 3, v2 = 5
        e 34-241+0                equations: v3 = v4 - v2, v4 = v1 + v0
        do 34                     variables asked for
        \"\"\"
        # 345125                  v3 = v4 + 5 = v1 + 2 = 5
        v3 = 5                    item 1 ...
        v4 = 0
        return v3, v4

A variable of depth d is one of depth d - 1 plus or minus a given one; hops are the depth, counted from the given
values: a line that stands above already may save some. The thought substitutes one equation after the other: a
variable and what is to be added to it, digit by digit, and at last the value. An item is one line, so there are no
lines inside items for `junk_share`. Its label is the value; `withheld` takes away the largest values.
With `computable=False` the values stated are drawn at random whatever the equations say, and the thoughts stay what the
equations say: they cannot help.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from ra3_megatron.config.tasks import TasksConfig
from ra3_megatron.tasks.layout import INDENT, head, indented
from ra3_megatron.tasks.task import Item, Task, comments

BASE = 10
"""Values are whole numbers below."""


@dataclass(frozen=True)
class _Equation:
    """`base + sign * given`, modulo 10."""

    base: int
    """Variable one step nearer to the given ones."""
    sign: int
    """1 or -1."""
    given: int
    """A given variable, another than `base`."""

    def __str__(self) -> str:
        return f"{self.base}{'+' if self.sign > 0 else '-'}{self.given}"


@dataclass(frozen=True)
class _System:
    """Variables, their values and what defines them."""

    depths: list[list[int]]
    """Variables of depth 0 (the given ones), 1, …"""
    values: dict[int, int]
    """Of each variable."""
    equations: dict[int, _Equation]
    """Of each variable that is not given."""

    def thought(self, variable: int) -> str:
        """The substitutions that give the value of `variable`."""
        text, rest = str(variable), 0
        while variable in self.equations:
            equation = self.equations[variable]
            variable, rest = equation.base, (rest + equation.sign * self.values[equation.given]) % BASE
            text += f"{variable}{rest}"
        return f"{text}{(self.values[variable] + rest) % BASE}"


class Equations:
    """The family `equations`."""

    words: Sequence[str] = ()

    def __init__(self, config: TasksConfig) -> None:
        self.config = config

    def task(self, number: int, training: bool) -> Task:
        """Task `number`: see `TaskFamily`. Values that are withheld occur nowhere in the system of a training task."""
        config, rng = self.config, Random(f"equations/{self.config.seed}/{number}")
        values = range(BASE - config.withheld if training else BASE)
        system = self._draw(rng, values)
        while system is None:
            system = self._draw(rng, values)
        items, asked = [], []
        for _ in range(rng.randint(config.min_items, config.max_items)):
            hops = rng.randint(config.min_hops, config.max_hops)
            variable = rng.choice(system.depths[hops])
            value = system.values[variable] if config.computable else rng.choice(values)
            items.append(Item(indented([f"v{variable} = {value}"]), system.thought(variable), hops, str(value)))
            asked.append(variable)
        given = "".join(f"{variable}{system.values[variable]}" for variable in sorted(system.depths[0]))
        defined = "".join(f"{variable}{system.equations[variable]}" for variable in sorted(system.equations))
        prompt = head("", (f"g {given}", f"e {defined}".rstrip(), "do " + "".join(map(str, asked))))
        ending = f"{INDENT}return {', '.join(f'v{variable}' for variable in dict.fromkeys(asked))}\n"
        written = comments(config, items, rng, _no_junk)
        return Task(f"equations#{number}", prompt, tuple(items), ending, written)

    def example(self, rng: Random) -> str:
        """Nothing: the function takes no arguments."""
        return ""

    def _draw(self, rng: Random, values: range) -> _System | None:
        """A system all of whose values are among `values`; None when the numbers drawn so far allow none."""
        variables = list(range(self.config.symbols))
        rng.shuffle(variables)
        depths = [variables[:2], *([variable] for variable in variables[2 : self.config.max_hops + 2])]
        for variable in variables[self.config.max_hops + 2 :]:
            rng.choice(depths).append(variable)
        known = {variable: rng.choice(values) for variable in depths[0]}
        equations = {}
        for below, here in pairwise(depths):
            for variable in here:
                possible = [
                    _Equation(base, sign, given)
                    for base in below
                    for sign in (1, -1)
                    for given in depths[0]
                    if given != base and (known[base] + sign * known[given]) % BASE in values
                ]
                if not possible:
                    return None
                equation = equations[variable] = rng.choice(possible)
                known[variable] = (known[equation.base] + equation.sign * known[equation.given]) % BASE
        return _System(depths, known, equations)


def _no_junk(rng: Random) -> str:
    raise AssertionError("items of equations have no lines inside")
