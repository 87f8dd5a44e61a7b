"""Known answers: right on a sound machine, and wrong when one element of one round is off by its last digit."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_threads_started_later_are_on_every_processor() -> None:
    """A thread inherits the processors of the one that starts it, and torch keeps its threads."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 3 and len(set(lines)) == 1, lines


THREADS = """
import os, torch
torch.set_num_threads(3)
from ra3_megatron.cluster.arithmetic import processors
processors(sorted(os.sched_getaffinity(0))[:1], 0.05)
a = torch.ones(1 << 22)
a.div(3)
assert torch.get_num_threads() == 3
for thread in os.listdir("/proc/self/task"):
    print(sorted(os.sched_getaffinity(int(thread))))
"""


def test_processes_of_a_node_share_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert [my_share(local, 3) for local in range(3)] == [[0, 3], [1], [2]]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2})
    assert my_share(1, 2) == [2], "bound to it"
