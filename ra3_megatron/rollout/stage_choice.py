"""The choice of tokens behind hidden states of the model's last stage: its logits, and `choice.choose` among them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ra3_megatron.rollout.choice import choose, last_of_sets
from ra3_megatron.rollout.stage_pass import StagePass


class StageChoice:
    """Among the tokens of a vocabulary, at a temperature. To be called on the last pipeline stage alone."""

    def __init__(self, stage: StagePass, sets: Tensor, vocab_size: int, temperature: float) -> None:
        """sets: the table of token sets, bool [R, vocab_size], on the model's device."""
        self._stage, self._sets, self._last = stage, sets, last_of_sets(sets)
        self._vocab_size, self._temperature = vocab_size, temperature

    def __call__(
        self,
        hidden: Tensor,
        allowed: Tensor,
        universe: Tensor,
        draws: Tensor,
        greedy: Sequence[bool] | None = None,
        top_p: Sequence[float] | None = None,
    ) -> Tensor:
        """Tokens sampled within rows `allowed` of the sets and their log-probabilities within rows `universe`, fp64
        [2, n].

        hidden [n, hidden]; allowed, universe: long [n]; draws: uniforms, long [n], the bits of fp64; greedy, top_p: see
        `choose`.
        """
        uniforms = draws.view(torch.float64)
        tokens, values = choose(
            self._logits(hidden), self._sets, self._last, allowed, universe, uniforms, greedy, top_p
        )
        return torch.stack((tokens.double(), values.double()))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits over the whole vocabulary of single positions, [n, vocab], gathered over the tensor-parallel group."""
        runtime = self._stage.runtime
        local = self._stage.logits(hidden).float() / self._temperature
        if runtime.tensor_size > 1:
            shards = [torch.empty_like(local) for _ in range(runtime.tensor_size)]
            dist.all_gather(shards, local.contiguous(), group=runtime.tensor_group)
            local = torch.cat(shards, dim=-1)
        return local[:, : self._vocab_size]
