"""Prompts to samples with a rollout engine.

Every sample has uniforms of its own, named by (seed, suite, task, number), so it does not depend on the batch, on other
tasks or on what was done before an interruption; `think` and `no-think` share them. A sample ends when its cut text has
met a stop.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from ra3_megatron.config.data import TextConfig
from ra3_megatron.evaluate.modes import Mode
from ra3_megatron.evaluate.samples import Sample
from ra3_megatron.evaluate.suites import Suite
from ra3_megatron.rollout.pieces import Generates, complete
from ra3_megatron.rollout.protocol import GenerateRequest
from ra3_megatron.rollout.randomness import generator
from ra3_megatron.text.cutting import Cut, Cutter, Thoughts
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.prompts import prompt_ids
from ra3_megatron.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """What decides the samples, beside weights and prompts."""

    samples: int
    """A task."""
    temperature: float
    """0: greedy."""
    top_p: float
    """Sampled are the most probable tokens alone that together have at least this probability; 1: all."""
    max_new_tokens: int
    seed: int
    batch_size: int
    """Samples at once."""
    stop_ids: frozenset[int]
    """Tokens that end a completion."""
    context_length: int


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
        self.cutter = Cutter(
            tokenizer, suite.stops, cast(Thoughts, thoughts), suite.code_prompt, suite.fenced, settings.stop_ids
        )
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
        wanted = [
            (task_id, number, prompt)
            for task_id, prompt in zip(ids, prompts, strict=True)
            for number in range(self.settings.samples)
            if (task_id, number) not in have
        ]

        def ended(place: int, sampled: list[int], seen: int) -> int | None:
            return self.cutter.ended(wanted[place][2], sampled, seen)

        requests = (self._request(*each) for each in wanted)
        for place, completion in complete(self.engine, requests, self.settings.batch_size, ended):
            on_samples([self._sample(*wanted[place], self.cutter.cut(wanted[place][2], completion.ids))])

    def _sample(self, task_id: str, number: int, prompt: str, cut: Cut) -> Sample:
        text = cut.text.replace("\t", "    ") if self.suite.tabs_to_spaces else cut.text
        whole = self.suite.kind == "evalplus"  # whose own form joins prompt and completion before it is sanitised
        return Sample(
            task_id,
            completion=None if whole else text,
            solution=prompt + text if whole else None,
            number=number,
            tokens=cut.tokens,
            thought_tokens=cut.thought_tokens,
        )

    def _request(self, task_id: str, number: int, prompt: str) -> GenerateRequest:
        ids, settings = self._ids(prompt), self.settings
        length = max(0, min(settings.max_new_tokens, self._room(ids)))
        key = (settings.seed, zlib.crc32(self.suite.name.encode()), zlib.crc32(task_id.encode()), number)
        uniforms = generator(key).random(length).astype(np.float64)
        greedy = settings.temperature == 0
        return GenerateRequest(ids, uniforms, self.allowed, settings.stop_ids, greedy, settings.top_p)

    def _ids(self, prompt: str) -> list[int]:
        return prompt_ids(prompt, self.suite.name, self.suite.code_prompt, self.tokenizer, self.latents, self.text)

    def _room(self, ids: Sequence[int]) -> int:
        return self.settings.context_length - len(ids)
