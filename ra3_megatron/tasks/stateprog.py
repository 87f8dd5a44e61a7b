"""StateProg: a state moves along a transition table, and its routine is written wherever it halts.

    def f(x):
        \"\"\"
        s 0510273246536174        transition table: 0 -> 5, 1 -> 0, ...
        r 0J1A2J3M4C5A6C7M        state -> routine
        do 5 203                  start state; steps before item 1, item 2, item 3
        \"\"\"
        # 532J                    the state moves from 5 over 3 to 2: routine J
        s = len(x)                the routine of item 1 ...

The transitions are one cycle through all states, so that no path is shorter than it looks. An item's hops are the
steps since the item before; the thought writes out the states passed, from the one where that item halted, and the
routine. States share routines (where there are more than three), so the code written so far does not tell the state:
without the thoughts of earlier items, item k takes the steps of all items up to k. A thought helps the items behind
its own too, as long as it stays in the context.
With `computable=False` the routines are drawn at random whatever the tables say, and the thoughts stay what the tables
say: they cannot help.
"""

from collections.abc import Sequence
from random import Random

from ra3_megatron.config.tasks import TasksConfig, state_routines
from ra3_megatron.tasks.layout import INDENT, head, indented, pairs
from ra3_megatron.tasks.routines import LABELS, allowed, list_of_numbers, routines
from ra3_megatron.tasks.task import Item, Task, comments


class StateProg:
    """The family `stateprog`."""

    words: Sequence[str] = ()

    def __init__(self, config: TasksConfig) -> None:
        self.config = config
        self.states = tuple("0123456789"[: config.symbols])
        self.routines = routines(config.routine_lines)

    def task(self, number: int, training: bool) -> Task:
        """Task `number`: see `TaskFamily`."""
        config, rng = self.config, Random(f"stateprog/{self.config.seed}/{number}")
        order = list(self.states)
        rng.shuffle(order)
        following = dict(sorted(zip(order, order[1:] + order[:1], strict=True)))
        labels = allowed(config.withheld, training)
        routine = self._routine_of_states(rng, labels)
        state = start = rng.choice(self.states)
        items, steps = [], []
        for _ in range(rng.randint(config.min_items, config.max_items)):
            passed = [state]
            for _ in range(rng.randint(config.min_hops, config.max_hops)):
                passed.append(following[passed[-1]])
            state, hops = passed[-1], len(passed) - 1
            label = routine[state] if config.computable else rng.choice(labels)
            items.append(Item(indented(self.routines[label]), "".join(passed) + routine[state], hops, label))
            steps.append(str(hops))
        prompt = head("x", ("s " + pairs(following), "r " + pairs(routine), f"do {start} " + "".join(steps)))
        written = comments(config, items, rng, self._junk)
        return Task(f"stateprog#{number}", prompt, tuple(items), f"{INDENT}return x\n", written)

    def example(self, rng: Random) -> str:
        """A list of digits."""
        return list_of_numbers(rng)

    def _routine_of_states(self, rng: Random, labels: tuple[str, ...]) -> dict[str, str]:
        chosen = rng.sample(labels, state_routines(len(self.states)))
        shared = [chosen[place % len(chosen)] for place in range(len(self.states))]
        rng.shuffle(shared)
        return dict(zip(self.states, shared, strict=True))

    def _junk(self, rng: Random) -> str:
        passed = [rng.choice(self.states) for _ in range(rng.randint(1, self.config.max_hops + 1))]
        return "".join(passed) + rng.choice(LABELS)
