"""Whether processors and GPUs compute what they should: answers that are known are asked for, again and again.

A defective core or GPU computes wrong now and then and says nothing. Runs then differ in a last digit that should not,
replicas drift apart, or a loss jumps. What shows it first is what rounds: quotients next to the middle between two
numbers, where the smallest error gives the other one.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.cluster.results import Result

CHECK = "arithmetic"
COUNT = 4096
"""Divisions of one round."""
_CLOSE = 2.0**-12
"""Largest distance from the middle of two numbers, in units of their distance."""
_HIDDEN = 29
"""Bits of the significand that float64 has and float32 has not."""


@dataclass(frozen=True)
class Question:
    """An operation, and the only right answer to it."""

    name: str
    compute: Callable[..., Tensor]
    operands: tuple[Tensor, ...]
    answer: Tensor

    def wrong(self) -> int:
        """Elements of one answer that are not right."""
        given = self.compute(*self.operands)
        return 0 if torch.equal(given, self.answer) else int((given != self.answer).sum())


def processors(mine: list[int], seconds: float) -> dict[str, str]:
    """What is wrong with these processors of this node, by "CPU N"; the thread runs on each in turn."""
    found = {}
    asked = questions(torch.device("cpu"))
    with _one_thread():
        for number in mine:
            with _on(number):
                said = trouble(asked, seconds / len(mine))
            if said:
                found[f"CPU {number}"] = said
    return found


def gpu(device: torch.device, seconds: float) -> dict[str, str]:
    """The same of a GPU, by "GPU N" (as this process counts them)."""
    said = trouble(questions(device), seconds)
    return {f"GPU {device.index or 0}": said} if said else {}


def trouble(asked: list[Question], seconds: float) -> str:
    """Ask for so long, at least once each: what was wrong, nothing if all was right."""
    end = time.monotonic() + seconds
    rounds, wrong, elements = 0, dict.fromkeys((each.name for each in asked), 0), 0
    while rounds == 0 or time.monotonic() < end:
        rounds += 1
        for each in asked:
            count = each.wrong()
            wrong[each.name] += count > 0
            elements += count
    if not elements:
        return ""
    which = ", ".join(f"{name} in {count}" for name, count in wrong.items() if count)
    return f"wrong results ({which} of {rounds} rounds, {elements} elements)"


def my_share(local: int, processes: int) -> list[int]:
    """The processors that a process of a node is to check, of those that it may use."""
    mine = sorted(os.sched_getaffinity(0))
    return mine if len(mine) < (os.cpu_count() or 1) else mine[local::processes]  # bound, or all see all


def judge(node: str, found: dict[str, str], checked: int) -> list[Result]:
    """found: of all processes of the node; checked: processors and GPUs."""
    if not found:
        return [Result(node, CHECK, "ok", f"{checked} processors and GPUs gave the known answers", "right")]
    return [
        Result(node, CHECK, "bad", f"{unit}: {text}: defective, take the node out", "wrong")
        for unit, text in sorted(found.items())
    ]


@cache
def questions(device: torch.device) -> list[Question]:
    """Of the unit that divides, and of the one that multiplies and adds; no order of operations gives other answers."""
    return [divisions(device), _products(device)]


def divisions(device: torch.device) -> Question:
    """Divisions whose quotient is next to the middle between two float32 numbers; IEEE 754 says which one is right."""
    numbers, divisor = np.random.default_rng(1), np.float64(np.float32(0.86582673))
    dividends = np.empty(0, np.float32)
    while len(dividends) < COUNT:
        drawn = numbers.standard_normal(1 << 21).astype(np.float32)
        hidden = (drawn / divisor).view(np.int64) & ((1 << _HIDDEN) - 1)
        away = np.abs(hidden - (1 << (_HIDDEN - 1)))  # a quotient is never in the middle itself
        dividends = np.concatenate([dividends, drawn[away < _CLOSE * (1 << _HIDDEN)]])[:COUNT]
    answer = torch.from_numpy((dividends / divisor).astype(np.float32)).to(device)
    a = torch.from_numpy(dividends).to(device)
    by = torch.full_like(a, float(divisor))  # a GPU multiplies by the inverse of a number
    return Question("division", torch.div, (a, by), answer)


def _products(device: torch.device) -> Question:
    """Products of matrices of -1, 0 and 1: every sum is an integer that the type holds (bf16: up to 256)."""
    side, dtype = (2048, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    numbers = np.random.default_rng(2)
    one, other = (numbers.integers(-1, 2, (side, side)).astype(np.float32) for _ in range(2))
    a, b, answer = (torch.from_numpy(each).to(device, dtype) for each in (one, other, one @ other))
    assert float(answer.abs().max()) <= 256
    return Question("matrix product", torch.matmul, (a, b), answer)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes in this thread alone: one that it starts meanwhile would stay on the processor of this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _on(number: int) -> Iterator[None]:
    """This thread on that processor alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {number})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
