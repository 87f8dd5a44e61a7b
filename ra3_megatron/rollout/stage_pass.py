"""One incremental pass through all layers of the model, wherever they are.

Tensor parallelism: every rank of the group runs the pass. Pipeline stages run it one after another, chunk by chunk,
and hand hidden states on. Context parallelism plays no part: sequences are whole here. Experts that live on other
replicas of the model need these replicas to run a pass at the same time: see `_meet`.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ra3_megatron.mcore.attention import CachedAttention, CacheView, LayerCache
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.direct_pass import DirectPass, takes
from ra3_megatron.mcore.model import LanguageModel, chunks_of
from ra3_megatron.mcore.startup import Runtime


class StagePass:
    """Runs passes on the chunks of this process; collective over the processes of a replica."""

    def __init__(self, model: torch.nn.Module, runtime: Runtime, direct: bool = True) -> None:
        """direct: leave Megatron-Core's modules out where that computes the same (`mcore.direct_pass`)."""
        self.runtime = runtime
        self.chunks: list[LanguageModel] = chunks_of(model)
        self.config = self.chunks[0].config
        self.attentions = [m for chunk in self.chunks for m in chunk.modules() if isinstance(m, CachedAttention)]
        """Attention of every layer of this process, in order."""
        self._meets = runtime.expert_size > 1
        whole = direct and len(self.chunks) == 1 and takes(self.chunks[0])
        self._direct = DirectPass(self.chunks[0]) if whole else None

    @property
    def direct(self) -> bool:
        """Whether passes leave Megatron-Core's modules out now."""
        return self._direct is not None and self._direct.ready

    @torch.no_grad()
    def __call__(self, batch: TokenBatch, caches: Sequence[LayerCache], view: CacheView) -> Tensor:
        """Hidden states behind the model's last layer, [T, hidden], of a batch of one row of T tokens.

        Zeros on all pipeline stages but the last. The keys and values of the tokens are added to `caches`.
        """
        if self.direct:
            assert self._direct is not None
            return self._direct(batch.ids[0], batch.positions[0], caches, view)
        if self._meets:
            self._meet(True)
        # no switch to eval mode: the model has no dropout, and the switch costs a tenth of a small pass
        try:
            for attention, cache in zip(self.attentions, caches, strict=True):
                attention.cache, attention.view = cache, view
            return self._through(batch)
        finally:
            for attention in self.attentions:
                attention.cache = attention.view = None

    def finish(self) -> None:
        """Take part in the passes of other replicas until they are done too. To be called when this one is."""
        if self._meets:
            token = torch.zeros(1, 1, dtype=torch.long, device=self.runtime.device)
            while self._meet(False):
                self._through(TokenBatch(token, token, token, token))

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits of hidden states, [n, hidden] -> [n, V_local]; on the last stage."""
        return self.chunks[-1].logits(hidden)

    def _meet(self, active: bool) -> bool:
        """Whether any replica that shares experts with this one has a pass to run; all say so at the same time."""
        flag = torch.tensor([int(active)], device=self.runtime.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.runtime.expert_group)
        return bool(flag.item())

    def _through(self, batch: TokenBatch) -> Tensor:
        runtime, config, tokens = self.runtime, self.config, batch.ids.shape[1]
        hidden = torch.empty(0)
        for chunk in self.chunks:
            if not chunk.pre_process:
                hidden = torch.empty(tokens, 1, config.hidden_size, dtype=config.params_dtype, device=runtime.device)
                source = parallel_state.get_pipeline_model_parallel_prev_rank()
                dist.recv(hidden, src=source, group=runtime.pipeline_group)
                chunk.set_input_tensor(hidden)
            hidden = chunk(batch, hidden_only=True)
            if not chunk.post_process:
                target = parallel_state.get_pipeline_model_parallel_next_rank()
                dist.send(hidden.contiguous(), dst=target, group=runtime.pipeline_group)
        if runtime.is_last_stage:
            return hidden[:, 0]
        return hidden.new_zeros(1, 1).expand(tokens, config.hidden_size)
