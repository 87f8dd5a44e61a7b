"""What the phases of EM share beside what all trainings do: the corpus, and q's sampling."""

from dataclasses import dataclass

import torch

from ra3_megatron.corpus.build import Corpus
from ra3_megatron.em.latent_stats import BlankTokens
from ra3_megatron.em.policy import LatentPolicy, latent_policy
from ra3_megatron.training.context import RunContext


@dataclass(kw_only=True)
class EMContext(RunContext):
    """One EM run in one process."""

    corpus: Corpus
    blank: BlankTokens

    def policy(self, model: torch.nn.Module, weight_version: int | None = None) -> LatentPolicy:
        """q: what samples from `model`, with the run's engines. Collective. weight_version: see `latent_policy`."""
        return latent_policy(
            model, self.config, self.runtime, self.latents, self.tokenizer, weight_version, self.engines
        )
