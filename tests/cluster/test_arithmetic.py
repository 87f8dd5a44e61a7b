"""Known answers: right on a sound machine, and wrong when one element of one round is off by its last digit."""

from __future__ import annotations

import os
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
import torch

from ra3_megatron.cluster import arithmetic
from ra3_megatron.cluster.arithmetic import COUNT, Question, my_share, questions, trouble

CPU = torch.device("cpu")


def test_the_answers_are_the_nearest_numbers() -> None:
    """By exact fractions: nearer than both neighbours, but by less than a thousandth of their distance."""
    division = questions(CPU)[0]
    dividends, divisors = (each.numpy() for each in division.operands)
    assert len(division.answer) == COUNT
    for dividend, divisor, answer in islice(zip(dividends, divisors, division.answer.numpy(), strict=True), 200):
        exact = Fraction(float(dividend)) / Fraction(float(divisor))
        below, above = (np.nextafter(answer, np.float32(end)) for end in (-np.inf, np.inf))
        away = sorted(abs(Fraction(float(each)) - exact) for each in (below, answer, above))
        assert abs(Fraction(float(answer)) - exact) == away[0]
        assert away[1] - away[0] < (away[0] + away[1]) / 1000, "a quotient that rounds by a hair"


def test_one_wrong_element_of_one_round_is_told() -> None:
    rounds = []

    def seldom() -> torch.Tensor:
        rounds.append(None)
        given = torch.ones(8)
        given[5] += (len(rounds) == 3) * 2.0**-23
        return given

    said = trouble([Question("division", seldom, (), torch.ones(8)), *questions(CPU)[1:]], seconds=0.3)
    assert said == f"wrong results (division in 1 of {len(rounds)} rounds, 1 elements)"
    assert trouble([Question("division", lambda: torch.ones(8), (), torch.ones(8))], seconds=0.0) == ""


def test_a_thread_goes_to_each_processor_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = os.sched_getaffinity(0), []

    def trouble(asked: list[Question], seconds: float) -> str:
        seen.append(os.sched_getaffinity(0))
        return "wrong" if len(seen) == 2 else ""

    monkeypatch.setattr(arithmetic, "trouble", trouble)
    numbers = sorted(before)
    found = arithmetic.processors(numbers, 0.1)
    assert seen == [{number} for number in numbers] and os.sched_getaffinity(0) == before
    assert found == ({f"CPU {numbers[1]}": "wrong"} if len(numbers) > 1 else {})


def test_processes_of_a_node_share_its_processors() -> None:
    everything = sorted(os.sched_getaffinity(0))
    if len(everything) == 1:
        pytest.skip("needs two cores")
    if len(everything) == os.cpu_count():
        assert sorted(my_share(0, 2) + my_share(1, 2)) == everything
    os.sched_setaffinity(0, {everything[0]})
    try:
        bound = my_share(1, 2)
    finally:
        os.sched_setaffinity(0, everything)
    assert bound == [everything[0]]
