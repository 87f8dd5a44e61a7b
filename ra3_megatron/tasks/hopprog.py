"""HopProg: follow a successor table h times from a symbol, look up a routine there, write its lines.

    def f(x):
        \"\"\"
        s a5b0c1d3e7f2g6h4        successor table: 0 -> 5, 1 -> 0, ...
        r aKbAcBdMeCfEgJhL        symbol -> routine
        do 5+4+++1                items: symbol, and a "+" for each hop
        \"\"\"
        "5+"                      item 1 (`inline`)
        x = sorted(x)             its routine
        x = x[1:]
        "4+++"                    item 2 ...

An item of h hops takes h + 1 look-ups, one after another; a thought writes them out: "# 52B" is "from 5 to 2, routine
B". The successors are one cycle, so h hops pass h + 1 symbols. Entries of tables and of the list are one token each, so
one attention layer can look one up: a model of L layers can do a few hops in one pass, and no more.

Without `inline` nothing in the body says which item comes next: a model has to count them, which small ones learn
slowly, and which has nothing to do with hops.

With `computable=False` the routines are drawn at random whatever the tables say, and the thoughts stay what the tables
say: they cannot help. With `transplanted=True` besides, the thoughts name the routine that follows: a model whose lines
follow its thoughts is right then, and one that reads the tables is not.
"""

from collections.abc import Sequence
from random import Random

from ra3_megatron.config.tasks import TasksConfig
from ra3_megatron.tasks.layout import INDENT, head, indented, pairs
from ra3_megatron.tasks.routines import LABELS, allowed, list_of_numbers, routines
from ra3_megatron.tasks.task import Item, Task, comments

KEYS = "abcdefghij"
"""How the symbols 0, 1, … are written as keys of the tables, so that no entry is part of a thought."""


class HopProg:
    """The family `hopprog`."""

    def __init__(self, config: TasksConfig) -> None:
        self.config = config
        self.symbols = tuple("0123456789"[: config.symbols])
        self.routines = routines(config.routine_lines)
        keys = KEYS[: config.symbols]
        plain = range(config.plain_drill_hops + 1) if config.plain_drill_share else ()
        hops = sorted({*range(config.min_hops, config.max_hops + 1), *plain})
        self.words: Sequence[str] = (
            *(key + value for key in keys for value in (*self.symbols, *LABELS)),
            *(f'"{symbol}{"+" * n}"' for symbol in self.symbols for n in hops if config.inline),
            *(symbol + "+" * n for symbol in self.symbols for n in hops if n),
        )

    def task(self, number: int, training: bool) -> Task:
        """Task `number`: see `TaskFamily`."""
        config, rng = self.config, Random(f"hopprog/{self.config.seed}/{number}")
        cycle = list(self.symbols)
        rng.shuffle(cycle)
        following = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        successor = {symbol: following[symbol] for symbol in self.symbols}
        labels = allowed(config.withheld, training)
        routine = dict(zip(self.symbols, rng.sample(labels, len(self.symbols)), strict=True))
        items, asked = [], []
        drill = rng.random() < config.drill_share
        plain = drill and config.plain_drill_share > 0 and rng.random() < config.plain_drill_share
        for _ in range(config.drill_items if drill else rng.randint(config.min_items, config.max_items)):
            chain = [rng.choice(self.symbols)]
            for _ in range(self._hops(rng, plain)):
                chain.append(successor[chain[-1]])
            hops = len(chain) - 1
            told = routine[chain[-1]]
            label = told if config.computable else rng.choice(labels)
            says = label if config.transplanted else told
            asked.append(chain[0] + "+" * hops)
            request = f'{INDENT}"{asked[-1]}"' if config.inline else None
            items.append(Item(indented(self.routines[label]), "".join(chain) + says, hops, label, request))
        tables = [
            pairs({KEYS[int(symbol)]: value for symbol, value in table.items()}) for table in (successor, routine)
        ]
        prompt = head("x", ("s " + tables[0], "r " + tables[1], "do " + "".join(asked)))
        if drill:
            config = config.model_copy(update={"thought_share": 0.0 if plain else 1.0, "thought_hops": None})
        written = comments(config, items, rng, self._junk)
        return Task(f"hopprog#{number}", prompt, tuple(items), f"{INDENT}return x\n", written)

    def example(self, rng: Random) -> str:
        """A list of digits."""
        return list_of_numbers(rng)

    def _hops(self, rng: Random, plain: bool) -> int:
        least, most = (0, self.config.plain_drill_hops) if plain else (self.config.min_hops, self.config.max_hops)
        return rng.randint(least, most) if most > 0 or not plain else 0  # older corpora: no draw for plain drills

    def _junk(self, rng: Random) -> str:
        chain = [rng.choice(self.symbols) for _ in range(rng.randint(1, self.config.max_hops + 1))]
        return "".join(chain) + rng.choice(LABELS)
