"""Settings of tasks that cannot be had are refused, one line each, before anything is generated."""

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config


def problems(*settings: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(None, ["corpus.source=tasks", *(f"corpus.tasks.{setting}" for setting in settings)])
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("min_items=4",), "corpus.tasks.min_items=4 is above corpus.tasks.max_items=3"),
        (("min_hops=2", "max_hops=1"), "corpus.tasks.min_hops=2 is above corpus.tasks.max_hops=1"),
        (("plain_drill_hops=4",), "corpus.tasks.plain_drill_hops=4 is above corpus.tasks.max_hops=3"),
        (
            ("symbols=11",),
            "corpus.tasks.symbols=11: must be from 2 to 10 with corpus.tasks.family=hopprog and "
            "corpus.tasks.max_hops=3",
        ),
        (
            ("withheld=9",),
            "corpus.tasks.withheld=9 leaves 7 of 16 routines, but corpus.tasks.symbols=8 needs 8 with "
            "corpus.tasks.family=hopprog",
        ),
        (
            ("family=stateprog", "withheld=13"),
            "corpus.tasks.withheld=13 leaves 3 of 16 routines, but corpus.tasks.symbols=8 needs 4 with "
            "corpus.tasks.family=stateprog",
        ),
        (
            ("family=stateprog", "max_hops=10"),
            "corpus.tasks.max_hops=10 is above 9: corpus.tasks.family=stateprog writes the steps before an item as one "
            "digit",
        ),
        (
            ("family=composition", "symbols=7"),
            "corpus.tasks.symbols=7: must be from 8 to 26 with corpus.tasks.family=composition and "
            "corpus.tasks.max_hops=3",
        ),
        (
            ("family=composition", "max_hops=13"),
            "corpus.tasks.max_hops=13 needs 28 symbols with corpus.tasks.family=composition, which has 26: lower it",
        ),
        (
            ("family=equations", "symbols=4"),
            "corpus.tasks.symbols=4: must be from 5 to 10 with corpus.tasks.family=equations and "
            "corpus.tasks.max_hops=3",
        ),
        (
            ("family=equations", "routine_lines=3"),
            "corpus.tasks.routine_lines=3 does not go with corpus.tasks.family=equations, whose items are one line "
            "each: set it to null",
        ),
        (
            ("family=equations", "withheld=6"),
            "corpus.tasks.withheld=6 is above 5: with corpus.tasks.family=equations, values of one digit are withheld",
        ),
        (
            ("family=hoprog",),
            "corpus.tasks.family=hoprog: must be one of hopprog, stateprog, composition, equations",
        ),
        (("symbols=27",), "corpus.tasks.symbols=27: must be at most 26"),
        (("thought_share=1.5",), "corpus.tasks.thought_share=1.5: must be at most 1"),
    ],
)
def test_refusals(settings: tuple[str, ...], line: str) -> None:
    assert problems(*settings) == [line]


def test_each_problem_has_its_line() -> None:
    assert len(problems("family=equations", "symbols=3", "withheld=7", "routine_lines=2", "min_items=9")) == 4


@pytest.mark.parametrize(
    "settings",
    [
        ("family=composition", "symbols=26", "max_hops=12", "withheld=14"),
        ("family=stateprog", "symbols=2", "withheld=14", "max_hops=9"),
        ("family=equations", "symbols=10", "max_hops=8", "withheld=5"),
        ("family=hopprog", "symbols=10", "withheld=6", "max_hops=30"),
    ],
)
def test_the_limits_themselves_are_allowed(settings: tuple[str, ...]) -> None:
    load_config(None, ["corpus.source=tasks", *(f"corpus.tasks.{setting}" for setting in settings)])
