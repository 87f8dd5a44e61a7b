"""Prompts to samples with a rollout engine.

Every sample has uniforms of its own, named by (seed, suite, task, number), so it does not depend on the batch, on other
tasks or on what was done before an interruption; `think` and `no-think` share them. Stop sequences are text, which no
engine knows: a sample is continued in pieces of `PIECE` tokens, and ends when its cut text has met a stop.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np

from ra3_megatron.config.data import TextConfig
from ra3_megatron.evaluate.cutting import Cut, Cutter, Thoughts
from ra3_megatron.evaluate.modes import Mode
from ra3_megatron.evaluate.samples import Sample
from ra3_megatron.evaluate.suites import Suite
from ra3_megatron.rollout.protocol import Completion, Finish, GenerateRequest, Uniforms
from ra3_megatron.rollout.randomness import generator
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.prompts import prompt_ids
from ra3_megatron.text.tokenizer import Tokenizer

PIECE = 64


@dataclass(frozen=True)
class Settings:
    """What decides the samples, beside weights and prompts."""

    samples: int
    """A task."""
    temperature: float
    """0: greedy."""
    max_new_tokens: int
    seed: int
    batch_size: int
    """Samples at once."""
    stop_ids: frozenset[int]
    """Tokens that end a completion."""
    context_length: int


@dataclass
class _Open:
    """A sample that is being written."""

    task_id: str
    number: int
    prompt: str
    prompt_ids: list[int]
    uniforms: Uniforms
    ids: list[int] = field(default_factory=list)


class Generates(Protocol):
    """A rollout engine, or what spreads requests over several."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """A continuation of each prompt."""
        ...


class Writer:
    """Samples of one suite in one mode."""

    def __init__(
        self,
        engine: Generates,
        tokenizer: Tokenizer,
        latents: LatentFormat,
        text: TextConfig,
        suite: Suite,
        mode: Mode,
        settings: Settings,
    ) -> None:
        self.engine, self.tokenizer, self.suite, self.settings = engine, tokenizer, suite, settings
        self.latents, self.text = latents, text
        thoughts = latents.name if mode is Mode.THINK else "none"
        self.cutter = Cutter(tokenizer, suite.stops, cast(Thoughts, thoughts), suite.code_prompt)
        self.allowed = latents.no_thought_set if mode is Mode.NO_THINK else latents.ALL

    def too_long(self, prompts: Sequence[str]) -> list[int]:
        """Indices of prompts behind which the context has no place for a token."""
        return [place for place, prompt in enumerate(prompts) if self._room(self._ids(prompt)) < 1]

    def write(
        self,
        ids: Sequence[str],
        prompts: Sequence[str],
        done: Sequence[Sample],
        on_samples: Callable[[list[Sample]], None],
    ) -> None:
        """Write what `done` lacks of the samples of the tasks `ids`, which have `prompts`. Reports each when done."""
        have = {(sample.task_id, sample.number) for sample in done}
        waiting = [
            (task_id, number, prompt)
            for task_id, prompt in zip(ids, prompts, strict=True)
            for number in range(self.settings.samples)
            if (task_id, number) not in have
        ]
        waiting.reverse()
        active: list[_Open] = []
        while waiting or active:
            while waiting and len(active) < self.settings.batch_size:
                active.append(self._open(*waiting.pop()))
            finished, active = self._advance(active)
            on_samples(finished)

    def _advance(self, active: list[_Open]) -> tuple[list[Sample], list[_Open]]:
        """One piece of every sample: those that are finished, and the others."""
        requests = []
        for sample in active:
            piece = sample.uniforms[len(sample.ids) : len(sample.ids) + PIECE]
            greedy = self.settings.temperature == 0
            prompt = sample.prompt_ids + sample.ids
            requests.append(GenerateRequest(prompt, piece, self.allowed, self.settings.stop_ids, greedy))
        finished, others = [], []
        for sample, completion in zip(active, self.engine.generate(requests), strict=True):
            sample.ids += completion.ids
            cut = self.cutter.cut(sample.prompt, sample.ids)
            ended = completion.finish is Finish.END or len(sample.ids) >= len(sample.uniforms)
            if cut.stopped or ended:
                finished.append(self._sample(sample, cut))
            else:
                others.append(sample)
        return finished, others

    def _sample(self, sample: _Open, cut: Cut) -> Sample:
        text = cut.text.replace("\t", "    ") if self.suite.tabs_to_spaces else cut.text
        whole = self.suite.kind == "evalplus"  # whose own form joins prompt and completion before it is sanitised
        return Sample(
            sample.task_id,
            completion=None if whole else text,
            solution=sample.prompt + text if whole else None,
            number=sample.number,
            tokens=cut.tokens,
            thought_tokens=cut.thought_tokens,
        )

    def _open(self, task_id: str, number: int, prompt: str) -> _Open:
        ids = self._ids(prompt)
        length = max(0, min(self.settings.max_new_tokens, self._room(ids)))
        key = (self.settings.seed, zlib.crc32(self.suite.name.encode()), zlib.crc32(task_id.encode()), number)
        return _Open(task_id, number, prompt, ids, generator(key).random(length).astype(np.float64))

    def _ids(self, prompt: str) -> list[int]:
        return prompt_ids(prompt, self.suite.name, self.suite.code_prompt, self.tokenizer, self.latents, self.text)

    def _room(self, ids: Sequence[int]) -> int:
        return self.settings.context_length - len(ids)
