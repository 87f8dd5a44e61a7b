"""Routines: what they cost without the latent, line by line, and which may occur."""

import math
from collections import Counter
from random import Random

import pytest

from ra3_megatron.tasks.routines import LABELS, allowed, list_of_numbers, routines


def blind_nats(written: list[tuple[str, ...]]) -> list[float]:
    """Mean -log P(line | lines before) at each place of a routine, over routines that are equally likely."""
    nats = [0.0] * max(map(len, written))
    for mine in written:
        for place, line in enumerate(mine):
            possible = Counter(
                other[place] if place < len(other) else "" for other in written if other[:place] == mine[:place]
            )
            nats[place] -= math.log(possible[line] / possible.total()) / len(written)
    return nats


def test_hand_written_routines_cost_log_16_without_the_latent() -> None:
    nats = blind_nats(list(routines(None).values()))
    assert sum(nats) == pytest.approx(math.log(16), abs=1e-12)  # none is the beginning of another
    assert nats[:3] == pytest.approx([1.83, 0.09, 0.85], abs=0.005)
    assert sum(nats[3:]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("lines", range(2, 9))
def test_routines_of_one_length_part_in_their_first_two_lines(lines: int) -> None:
    written = list(routines(lines).values())
    assert {len(routine) for routine in written} == {lines}
    assert blind_nats(written) == pytest.approx([math.log(4)] * 2 + [0] * (lines - 2), abs=1e-12)


@pytest.mark.parametrize("lines", [None, *range(2, 9)])
def test_routines_run_and_differ(lines: int | None) -> None:
    rng = Random(0)
    examples = [list_of_numbers(rng) for _ in range(30)] + ["[]"]
    results = set()
    for routine in routines(lines).values():
        space: dict[str, object] = {}
        exec("def f(x):\n" + "".join(f"    {line}\n" for line in routine) + "    return x\n", space)
        results.add(tuple(eval(f"repr(f({example}))", space) for example in examples))
    assert len(results) == len(LABELS)


def test_withheld_routines_are_the_last_ones() -> None:
    assert allowed(3, training=True) == LABELS[:13]
    assert allowed(3, training=False) == allowed(0, training=True) == LABELS
