"""Kinds of lines of real code."""

import pytest
from made_study import line

from ra3_megatron.study.code import kind_of, kinds


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("    def f(self):\n", "definition"),
        ("@property\n", "definition"),
        ("async def g():\n", "definition"),
        ("if x == 1:\n", "control"),
        ("    else:\n", "control"),
        ("match command.split():\n", "control"),
        ("    case Point(x=0) if ready:  # at the left\n", "control"),
        ("    case _:\n", "control"),
        ("match.group(1)\n", "expression"),
        ("match = pattern.match(text)\n", "assignment"),
        ("case == 3\n", "expression"),
        ("match is not None):\n", "expression"),
        ("format(x)\n", "expression"),
        ("return x\n", "return or raise"),
        ("returned = 3\n", "assignment"),
        ("import os\n", "import"),
        ('"""What it does."""\n', "docstring"),
        ("x = 1\n", "assignment"),
        ("x += 1\n", "assignment"),
        ("self.a[i], b = 1, 2\n", "assignment"),
        ("x //= 2\n", "assignment"),
        ("x == 1\n", "expression"),
        ("x <= 1\n", "expression"),
        ("call(a=1)\n", "expression"),
        (")\n", "expression"),
    ],
)
def test_kind_of_a_line(text: str, kind: str) -> None:
    assert kind_of(text) == kind


def test_figures_by_kind() -> None:
    from dataclasses import replace

    plain, thinking = line(1.0), line(1.0, thought="# a")
    runs = [[replace(thinking, text="x = 1\n"), replace(plain, text="x = 2\n"), replace(plain, text="f()\n")]] * 3
    found = kinds(runs)
    assert set(found) == {"assignment", "expression"}
    assert found["assignment"].share.mean == pytest.approx(2 / 3) and found["assignment"].think_rate.mean == 0.5
    assert found["assignment"].saved is not None and found["assignment"].saved.mean == pytest.approx(0.1)
    assert found["expression"].think_rate.mean == 0.0 and found["expression"].saved is None
