"""Whether a checkpoint and a Hugging Face folder hold the same model: their tensors, and the logits they give.

Tensors are compared one by one, exactly: conversion copies numbers. Where one side has bf16 and the other fp32, both
are compared, and compute, with the numbers rounded to bf16.

Logits are those of Hugging Face transformers and of Megatron-Core, one model after the other, both in fp32 arithmetic
whatever the weights are stored in, so that the tolerance needs no room for bf16. Half of the sequences have positions
that are spread over the whole context of the model: there, scaled rotary frequencies show in every attention score.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.hf.conversion import Progress
from ra3_megatron.hf.distcp import ShardReader
from ra3_megatron.hf.importing import DTYPES, model_of
from ra3_megatron.hf.reference import load_reference
from ra3_megatron.hf.source import Source
from ra3_megatron.hf.weights import Link
from ra3_megatron.mcore import checkpoint as mcore_checkpoint
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.checkpoint_contents import Contents, read_contents
from ra3_megatron.mcore.checkpoint_record import check_architecture
from ra3_megatron.mcore.model import architecture_of, build_model, language_model
from ra3_megatron.mcore.startup import Runtime

TOLERANCE = 1e-5
"""Of a logit, relative to the largest logit of its position, or to 1 if that is smaller."""
SEQUENCES = 4
TOKENS = 64
_SEED = 1


@dataclass(frozen=True)
class TensorResult:
    """What the comparison of tensors found."""

    compared: int
    dtype: str
    """What both sides were rounded to: `fp32` or `bf16`."""
    different: list[tuple[str, float]]
    """Names of tensors that differ, in the order of layers, with the largest difference."""


@dataclass(frozen=True)
class LogitResult:
    """Where the logits differ most, relative to the tolerance there."""

    difference: float
    tolerance: float
    """At this place."""
    sequence: int
    position: int
    """Of the rotary embedding."""
    token: int
    """Whose logit it is."""
    longest: int
    """Positions of the spread sequences are below this."""
    tokens: int
    """Of each sequence."""

    @property
    def passes(self) -> bool:
        """Whether every logit is within its tolerance."""
        return self.difference <= self.tolerance


class Check:
    """A Hugging Face folder and a checkpoint that are to be compared."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        """Raises UserError when either cannot be read, or they are of different architectures."""
        family, self._model, self._vocab_size = model_of(folder)
        self._folder, self._checkpoint = folder, checkpoint
        self._links: list[Link] = family.links(self._model, self._vocab_size)
        self._source = Source.open(folder)
        self._source.check(self._links)
        contents: Contents = read_contents(checkpoint)
        architecture = architecture_of(self._model, self._vocab_size)
        check_architecture(f"{checkpoint}: does not fit {folder}", contents.record, architecture)
        self._reader = ShardReader(contents, self._links)
        narrow = contents.record["precision"] == "bf16" or self._source.dtype == torch.bfloat16
        self.dtype = "bf16" if narrow else "fp32"

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return sum(torch.Size(link.slot.shape).numel() for link in self._links)

    def tensors(self, progress: Progress | None = None) -> TensorResult:
        """Compare every tensor. Raises UserError for those that are damaged or not finite."""
        dtype = DTYPES[self.dtype]
        total = self.parameters * dtype.itemsize
        report = progress(total) if progress is not None else (lambda count: None)
        different, compared = [], 0
        for link in self._links:
            for name, mine in zip(link.names, link.split(self._reader.read(link.slot)), strict=True):
                theirs = self._source.read(name, dtype)
                if not torch.equal(mine.to(dtype), theirs):
                    different.append((name, float((mine.to(dtype).float() - theirs.float()).abs().max())))
                compared += 1
                report(theirs.nbytes)
        return TensorResult(compared, self.dtype, different)

    def logits(self, runtime: Runtime) -> LogitResult:
        """Compare logits. runtime: that of this one process. Needs 4 bytes a parameter.

        Raises UserError when transformers cannot load the folder.
        """
        longest = self._model.context_length
        tokens = min(TOKENS, longest)
        generator = torch.Generator().manual_seed(_SEED)
        ids = torch.randint(0, self._vocab_size, (SEQUENCES, tokens), generator=generator)
        near = torch.arange(tokens)
        far = torch.linspace(0, longest - 1, tokens, dtype=torch.float64).round().long()
        positions = torch.stack([near if number % 2 == 0 else far for number in range(SEQUENCES)])
        with torch.inference_mode():
            expected = self._hugging_face(ids, positions)
            found = self._megatron(ids, positions, runtime)
        difference = (found - expected).abs()
        tolerance = TOLERANCE * expected.abs().amax(-1, keepdim=True).clamp(min=1.0)
        ratio = difference / tolerance
        ratio[ratio.isnan()] = torch.inf
        place = tuple(int(index) for index in torch.unravel_index(ratio.argmax(), ratio.shape))
        sequence, row, token = place
        return LogitResult(
            float(difference[place]),
            float(tolerance[sequence, row, 0]),
            sequence,
            int(positions[sequence, row]),
            token,
            longest,
            tokens,
        )

    def _hugging_face(self, ids: Tensor, positions: Tensor) -> Tensor:
        model = load_reference(self._folder, attn_implementation="eager")
        self._round(model)
        # with a mask, transformers does not take positions that are not consecutive for packed sequences
        rows = [
            model(row[None], attention_mask=torch.ones_like(row)[None], position_ids=place[None]).logits[0]
            for row, place in zip(ids, positions, strict=True)
        ]
        return torch.stack(rows).float()

    def _megatron(self, ids: Tensor, positions: Tensor, runtime: Runtime) -> Tensor:
        sets = torch.ones(1, self._vocab_size, dtype=torch.bool)
        model: ModelConfig = self._model
        network = build_model(model, ParallelConfig(), runtime, self._vocab_size, sets, None)
        mcore_checkpoint.load(self._checkpoint, network, runtime)
        self._round(network)
        chunk = language_model(network).eval()
        rows = []
        for row, place in zip(ids[:, None].to(runtime.device), positions[:, None].to(runtime.device), strict=True):
            hidden = chunk(TokenBatch(row, place, torch.zeros_like(row), row), hidden_only=True)
            rows.append(chunk.logits(hidden[:, 0])[:, : self._vocab_size].float().cpu())
        return torch.stack(rows)

    def _round(self, model: torch.nn.Module) -> None:
        """Numbers that both sides have."""
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[self.dtype]).float()
