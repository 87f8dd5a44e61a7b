"""Who samples which documents: every process with the live model, or vLLM processes on behalf of them.

`Sampling` is what the E-step, infusion and evaluation use: `publish` makes it sample with the model's present weights,
`start` begins with a batch, and what that returns waits for it and gives every process all transcripts. A transcript
depends on the weights and its key alone, so it does not matter who samples it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from ra3_megatron.config.runtime import RolloutConfig
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.rollout.pieces import Until, complete
from ra3_megatron.rollout.protocol import Completion, GenerateRequest, RolloutEngine
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Transcript

Result = TypeVar("Result", Transcript, Completion)

ByDocument = dict[int, list[Transcript]]
"""Transcripts of each document, by its place in the batch."""
Wait = Callable[[], ByDocument]
ByPrompt = dict[int, list[Completion]]
"""Completions of each prompt, by its place in the batch."""


class Sampling(Protocol):
    """Samples transcripts of one model. All calls are collective."""

    @property
    def weight_version(self) -> int:
        """Of the weights it samples with."""
        ...

    def publish(self, version: int) -> dict[str, float]:
        """Sample with the model's present weights from now on, and stamp them `version`; metrics of it."""
        ...

    def mine(self, documents: int) -> Sequence[int]:
        """Which documents of a batch of `documents` this process has to bring the jobs of."""
        ...

    def start(self, jobs: Mapping[int, list[Job]], background: bool = False) -> Wait:
        """Begin to sample the jobs of each of `mine`. With `background`, training may go on meanwhile.

        One batch at a time: wait before the next `start`, `generate` or `publish`.
        """
        ...

    def generate(
        self, requests: Mapping[int, list[GenerateRequest]], background: bool = False, until: Until | None = None
    ) -> Callable[[], ByPrompt]:
        """Begin to continue the prompts of each of `mine` freely, or until `until`, which gets the place of a prompt,
        says so; otherwise as `start`."""
        ...


class LiveSampling:
    """Every process of a replica samples the replica's documents from the model that is being trained."""

    def __init__(
        self,
        model: torch.nn.Module,
        runtime: Runtime,
        latents: LatentFormat,
        tokenizer: Tokenizer,
        config: RolloutConfig,
        max_tokens: int,
        keep_latents: bool = True,
    ) -> None:
        self.runtime = runtime
        self.engine = MegatronEngine(
            model, runtime, latents, tokenizer.vocab_size, config.temperature, cuda_graphs=config.cuda_graphs
        )
        self._batch_size = config.batch_size
        self._sampler = LatentSampler(
            self.engine,
            latents,
            tokenizer,
            max_tokens,
            config.batch_size,
            config.sampler,
            keep_latents=keep_latents,
        )

    @property
    def weight_version(self) -> int:
        return self.engine.weight_version

    def publish(self, version: int) -> dict[str, float]:
        self.engine.weight_version = version
        self.engine.forget()
        return {}

    def mine(self, documents: int) -> Sequence[int]:
        return range(self.runtime.replica_rank, documents, self.runtime.replica_size)

    def start(self, jobs: Mapping[int, list[Job]], background: bool = False) -> Wait:
        return self._sampled(lambda: sample_groups(self._sampler, jobs), background)

    def generate(
        self, requests: Mapping[int, list[GenerateRequest]], background: bool = False, until: Until | None = None
    ) -> Callable[[], ByPrompt]:
        return self._sampled(lambda: complete_groups(self.engine, requests, self._batch_size, until), background)

    def _sampled(
        self, sample: Callable[[], dict[int, list[Result]]], background: bool
    ) -> Callable[[], dict[int, list[Result]]]:
        if background:
            raise ValueError("the model that is being trained cannot be sampled from at the same time")
        sampled = sample()
        self.engine.finish()
        everything: dict[int, list[Result]] = {}
        for share in self.runtime.gather_replicas(sampled):
            everything |= share
        return lambda: everything


def complete_groups(
    engine: RolloutEngine,
    requests: Mapping[int, list[GenerateRequest]],
    batch_size: int,
    until: Until | None = None,
) -> ByPrompt:
    """The completions of each prompt's requests, `batch_size` of them at once. Prompts of like length go together.

    until: called with the place of a prompt.
    """
    flat = [(place, request) for place, group in requests.items() for request in group]
    order = sorted(range(len(flat)), key=lambda i: (len(flat[i][1].prompt), flat[i][0], i))
    ends: Until | None = None
    if until is not None:
        given = until

        def ends(number: int, ids: list[int], seen: int) -> int | None:
            return given(flat[order[number]][0], ids, seen)

    found: dict[int, Completion] = {}
    for number, completion in complete(engine, [flat[i][1] for i in order], batch_size, ends):
        found[order[number]] = completion
    engine.forget()
    completions: ByPrompt = {place: [] for place in requests}
    for number, (place, _) in enumerate(flat):
        completions[place].append(found[number])
    return completions


def sample_groups(sampler: LatentSampler, jobs: Mapping[int, list[Job]]) -> ByDocument:
    """The transcripts of each document's jobs."""
    transcripts = iter(sampler.sample([job for group in jobs.values() for job in group]))
    return {document: [next(transcripts) for _ in group] for document, group in jobs.items()}
