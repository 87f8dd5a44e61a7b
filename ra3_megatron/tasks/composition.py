"""Composition: names that mean a routine, another name, or two such things in order; write what a name means.

    def f(x):
        \"\"\"
        d 0a1c2c0b1d0c1J0d1M2A    a is c, then c; b is d; c is routine J; d is routine M, then routine A
        do 0c0b                   names asked for
        \"\"\"
        # 0c1J                    c is routine J
        s = len(x)                the routine of item 1 ...
        x = x + [s]
        # 0b1d1M                  the first part of b is d, the first part of d is routine M
        ...

A name of depth d is defined by one or two names of depth d - 1 (d = 0: routines). Each routine behind it is h = d
names away and takes h + 1 look-ups; the thought writes them out, with the number of the part that was followed. A
name asks for one item for each routine behind it. Each depth has at least two names, and one with a single routine
behind it. Only 2 names a depth leave little to choose between: 16 symbols with max_hops=3 are better. A digit stands
between any two letters, so that a tokenizer that splits digits keeps letters apart.
With `computable=False` the routines are drawn at random whatever the definitions say, and the thoughts stay what the
definitions say: they cannot help.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from random import Random
from string import ascii_lowercase

from ra3_megatron.config.tasks import TasksConfig
from ra3_megatron.tasks.layout import INDENT, head, indented
from ra3_megatron.tasks.routines import LABELS, allowed, list_of_numbers, routines
from ra3_megatron.tasks.task import Item, Task, comments

PAIRS = 0.5
"""Share of two-part definitions among the names that may have them."""


class Composition:
    """The family `composition`."""

    words: Sequence[str] = ()

    def __init__(self, config: TasksConfig) -> None:
        self.config = config
        self.names = ascii_lowercase[: config.symbols]
        self.routines = routines(config.routine_lines)

    def task(self, number: int, training: bool) -> Task:
        """Task `number`: see `TaskFamily`."""
        config, rng = self.config, Random(f"composition/{self.config.seed}/{number}")
        labels = allowed(config.withheld, training)
        depths = self._names_by_depth(rng)
        parts = _definitions(rng, depths, labels)
        paths = {name: _paths(name, parts) for name in self.names}
        items: list[Item] = []
        asked = []
        count = rng.randint(config.min_items, config.max_items)
        while len(items) < count:
            hops = rng.randint(config.min_hops, config.max_hops)
            name = rng.choice([name for name in depths[hops] if len(paths[name]) <= count - len(items)])
            for path in paths[name]:
                label = path[-1] if config.computable else rng.choice(labels)
                items.append(Item(indented(self.routines[label]), f"0{name}{path}", hops, label))
            asked.append(name)
        definitions = "".join(f"0{name}{_numbered(parts[name])}" for name in self.names)
        prompt = head("x", (f"d {definitions}", "do " + "".join("0" + name for name in asked)))
        written = comments(config, items, rng, self._junk)
        return Task(f"composition#{number}", prompt, tuple(items), f"{INDENT}return x\n", written)

    def example(self, rng: Random) -> str:
        """A list of digits."""
        return list_of_numbers(rng)

    def _names_by_depth(self, rng: Random) -> list[list[str]]:
        """Names of depth 0, 1, … max_hops; at least two each."""
        names = list(self.names)
        rng.shuffle(names)
        depths = [names[2 * depth : 2 * depth + 2] for depth in range(self.config.max_hops + 1)]
        for name in names[2 * len(depths) :]:
            rng.choice(depths).append(name)
        return depths

    def _junk(self, rng: Random) -> str:
        names = [rng.choice(self.names) for _ in range(rng.randint(1, self.config.max_hops + 1))]
        return "0" + "".join(f"{name}{rng.choice('12')}" for name in names) + rng.choice(LABELS)


def _definitions(rng: Random, depths: list[list[str]], labels: tuple[str, ...]) -> dict[str, list[str]]:
    """The parts of each name. The first name of each depth has a single routine behind it."""
    parts = {}
    for below, names in pairwise([list(labels), *depths]):
        for name in names:
            parts[name] = rng.choices(below, k=2 if rng.random() < PAIRS else 1)
        parts[names[0]] = [rng.choice(labels) if names is depths[0] else below[0]]
    return parts


def _numbered(parts: list[str]) -> str:
    return "".join(f"{place}{part}" for place, part in enumerate(parts, start=1))


def _paths(name: str, parts: Mapping[str, list[str]]) -> list[str]:
    """One text for each routine behind `name`, in order: the numbers and parts on the way to it."""
    return [
        f"{place}{part}{path}"
        for place, part in enumerate(parts[name], start=1)
        for path in (_paths(part, parts) if part in parts else [""])
    ]
