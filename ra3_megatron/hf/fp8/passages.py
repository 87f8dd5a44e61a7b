"""The sequences that a model is calibrated on, drawn from texts.

Texts are cut at line ends into passages of at least as many characters as could fill a sequence. Of all passages of
all texts, a seeded reservoir keeps a uniform sample, in one pass and in bounded memory.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ra3_megatron.config.errors import UserError

CHARACTERS_PER_TOKEN = 4
"""What a passage is long enough for, in the mean: a passage is cut at its last token anyway."""
SHORTEST = 2
"""Tokens of a sequence at least: one to predict from, one to predict."""


class Encoder(Protocol):
    """What is asked of a tokenizer here."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class CalibrationSettings:
    """How many sequences, and which."""

    sequences: int = 128
    """Those whose activations decide the scales."""
    length: int = 512
    """Tokens of a sequence at most."""
    held_out: int = 16
    """Further ones, on which the result is compared with the original."""
    seed: int = 1

    def check(self) -> None:
        """UserError for numbers that make no sense."""
        for name, least in (("sequences", 1), ("length", SHORTEST), ("held_out", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option}={getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True)
class Passages:
    """Texts to calibrate on, and others to compare on."""

    calibration: list[str]
    held_out: list[str]


def draw_passages(texts: Iterable[str], settings: CalibrationSettings, what: str) -> Passages:
    """A seeded sample of passages. Fewer than were asked for are divided in the same proportion, at least one each.

    what: names the texts in errors. Raises UserError when there are fewer than two passages.
    """
    wanted = settings.sequences + settings.held_out
    generator = random.Random(settings.seed)
    kept: list[str] = []
    for number, passage in enumerate(_passages(texts, CHARACTERS_PER_TOKEN * settings.length)):
        if number < wanted:
            kept.append(passage)
        elif (place := generator.randrange(number + 1)) < wanted:
            kept[place] = passage
    if len(kept) < 2:
        raise UserError(
            f"{what}: holds {'no lines' if not kept else 'one passage'}: calibration needs one passage of text, and "
            "another one to measure on"
        )
    generator.shuffle(kept)
    held_out = max(1, len(kept) * settings.held_out // wanted)
    return Passages(kept[held_out:], kept[:held_out])


def encode(passages: Sequence[str], tokenizer: Encoder, length: int, what: str) -> list[list[int]]:
    """Token ids of each passage, at most `length`. Raises UserError when none has two tokens."""
    rows = [tokenizer.encode(passage)[:length] for passage in passages]
    rows = [row for row in rows if len(row) >= SHORTEST]
    if not rows:
        raise UserError(f"{what}: the passages drawn have fewer than {SHORTEST} tokens each")
    return rows


def _passages(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        lines: list[str] = []
        held = 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            held += len(line)
            if held >= characters and "".join(lines).strip():
                yield "".join(lines)
                lines, held = [], 0
        if "".join(lines).strip():
            yield "".join(lines)
