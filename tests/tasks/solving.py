"""Solves a task from the text of its prompt alone, with nothing of the package: what the right thoughts have to be."""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Solved:
    """What one item has to be."""

    thought: str
    hops: int
    label: str


def tables(prompt: str) -> dict[str, str]:
    """The lines of the docstring: first word -> rest."""
    docstring = prompt.split('"""')[1]
    rows = (line.strip().partition(" ") for line in docstring.strip().split("\n"))
    return {key: rest for key, _, rest in rows}


def mapping(text: str) -> dict[str, str]:
    """`0A1B` as a dictionary."""
    assert len(text) % 2 == 0
    return {text[place]: text[place + 1] for place in range(0, len(text), 2)}


def hopprog(prompt: str) -> list[Solved]:
    """Items of a task of `hopprog`."""
    given = tables(prompt)
    successor, routine = ({str(ord(k) - ord("a")): v for k, v in mapping(given[name]).items()} for name in "sr")
    solved = []
    for symbol, pluses in re.findall(r"(\d)(\+*)", given["do"]):
        chain = symbol
        for _ in pluses:
            chain += successor[chain[-1]]
        label = routine[chain[-1]]
        solved.append(Solved(chain + label, len(pluses), label))
    return solved


def stateprog(prompt: str) -> list[Solved]:
    """Items of a task of `stateprog`."""
    given = tables(prompt)
    following, routine = mapping(given["s"]), mapping(given["r"])
    state, _, steps = given["do"].partition(" ")
    solved = []
    for digit in steps:
        passed = state
        for _ in range(int(digit)):
            state = following[state]
            passed += state
        solved.append(Solved(passed + routine[state], int(digit), routine[state]))
    return solved


def composition(prompt: str) -> list[Solved]:
    """Items of a task of `composition`."""
    given = tables(prompt)
    definitions = {text[0]: re.findall(r"([12])(\w)", text[1:]) for text in given["d"].split("0")[1:]}

    def follow(path: str) -> list[Solved]:
        end = path[-1]
        if end.isupper():
            return [Solved(path, (len(path) - 4) // 2, end)]
        return [solved for place, part in definitions[end] for solved in follow(path + place + part)]

    return [solved for name in given["do"][1::2] for solved in follow("0" + name)]


def equations(prompt: str) -> list[Solved]:
    """Items of a task of `equations`."""
    given = tables(prompt)
    values = {variable: int(value) for variable, value in mapping(given["g"]).items()}
    defined = {name: rest for name, *rest in re.findall(r"(\d)(\d)([+-])(\d)", given.get("e", ""))}

    def value(variable: str) -> int:
        if variable in values:
            return values[variable]
        base, sign, other = defined[variable]
        return (value(base) + (value(other) if sign == "+" else -value(other))) % 10

    solved = []
    for asked in given["do"]:
        thought, hops, variable = asked, 0, asked
        while variable in defined:
            variable = defined[variable][0]
            hops += 1
            thought += f"{variable}{(value(asked) - value(variable)) % 10}"
        solved.append(Solved(f"{thought}{value(asked)}", hops, str(value(asked))))
    return solved


SOLVERS: dict[str, Callable[[str], list[Solved]]] = {
    "hopprog": hopprog,
    "stateprog": stateprog,
    "composition": composition,
    "equations": equations,
}
