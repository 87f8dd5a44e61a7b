"""Documents of packed rows: where they stand, and that attention in one kernel sees what attention in buckets sees."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore import packing, variable_length
from ra3_megatron.mcore.attention import CachedAttention
from ra3_megatron.mcore.fp8_attention import Fp8Attention
from ra3_megatron.mcore.model import chunks_of
from ra3_megatron.mcore.packing import packing_of, read_packing, remember
from ra3_megatron.mcore.startup import Runtime, initialize
from tests.mcore.small_models import build, make_documents, make_trainer, micro_batches, put_in_rows

ROWS = [[0, 0, 0, 1, 1, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1, 1]]


def test_bounds_and_places() -> None:
    found = read_packing(torch.tensor(ROWS))
    assert found.begin.tolist() == [0, 3, 5, 8, 9] and found.length.tolist() == [3, 2, 1, 1, 7]
    assert found.longest == 7 and found.bounds.tolist() == [0, 3, 5, 6, 7, 14] and found.bounds.dtype == torch.int32
    assert found.real is not None and found.real.tolist() == [*range(6), *range(8, 16)]
    (bucket,) = found.buckets  # all are shorter than 16
    assert bucket.index.shape == (5, 7)
    assert bucket.places.tolist() == found.real.tolist()
    assert bucket.index.flatten()[bucket.sources].tolist() == found.real.tolist()


def test_rows_without_padding_need_no_places() -> None:
    found = read_packing(torch.tensor([[0, 0, 1], [0, 1, 2]]))
    assert found.real is None and found.bounds.tolist() == [0, 2, 3, 4, 5, 6]


def test_rows_of_padding() -> None:
    found = read_packing(torch.full((2, 4), -1))
    assert found.longest == 0 and found.bounds.tolist() == [0] and not found.buckets


def test_buckets_pad_no_document_to_more_than_twice_its_length() -> None:
    lengths = [1, 5, 16, 17, 30, 40, 63, 64, 65, 200]
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    found = read_packing(segments)
    assert sorted(n for bucket in found.buckets for n in bucket.inside.sum(1).tolist()) == lengths
    for bucket in found.buckets:
        assert bucket.inside.shape[1] <= 2 * max(16, int(bucket.inside.sum(1).min()))


def test_an_answer_is_kept_as_long_as_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = torch.tensor(ROWS)
    first = packing_of(segments)
    assert packing_of(segments) is first and packing_of(segments.clone()) is not first
    other = segments.clone()
    remember(other, first)
    monkeypatch.setattr(packing, "read_packing", lambda _: pytest.fail("read again"))
    assert packing_of(other) is first
    known = len(packing._known)
    del segments, other
    gc.collect()
    assert len(packing._known) < known


def one_by_one(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """What `variable_length.attention` computes, in a loop."""
    out = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert end - begin <= longest
        one = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        out.append(F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)[0])
    return torch.cat([x.transpose(0, 1) for x in out])


def attended(layer: CachedAttention, segments: Tensor) -> list[Tensor]:
    """What a layer gives, and gradients."""
    s, b, d = segments.shape[1], segments.shape[0], layer.config.kv_channels
    generator = torch.Generator().manual_seed(3)
    heads = (layer.config.num_attention_heads, *2 * [layer.config.num_query_groups])
    given = [torch.randn(s, b, h, d, generator=generator).requires_grad_() for h in heads]
    out = layer(*given, segments)
    weight = torch.randn(out.shape, generator=generator)
    return [out.detach(), *torch.autograd.grad(out, given, weight)]


@pytest.mark.parametrize("rows", [ROWS, [[0, 0, 1, 1, 2]], [[-1, -1, -1]], [[0, 0, 0]]])
def test_one_kernel_and_buckets(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, rows: list[list[int]]) -> None:
    layer = chunks_of(build(ParallelConfig(threads=1), runtime))[0].decoder.layers[0].self_attention.core_attention
    segments = torch.tensor(rows)
    expected = attended(layer, segments)
    calls: list[int] = []

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return one_by_one(*given)

    monkeypatch.setattr(variable_length, "takes", lambda _: True)
    monkeypatch.setattr(variable_length, "attention", counted)
    found = attended(layer, segments)
    assert len(calls) == (rows != [[-1, -1, -1]])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not found[0].transpose(0, 1)[segments < 0].any()


def test_attention_in_fp8_takes_no_kernel_of_16_bits(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows go through Transformer Engine's kernel (here one that computes the same), or FP8 would be off."""
    layer = chunks_of(build(ParallelConfig(threads=1), runtime))[0].decoder.layers[0].self_attention.core_attention
    segments = torch.tensor(ROWS)
    expected = attended(layer, segments)
    calls: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        calls.append(1)
        one = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*one, is_causal=True, scale=layer.scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    layer.__class__, layer.kernel = Fp8Attention, kernel
    monkeypatch.setattr(variable_length, "takes", lambda _: True)
    found = attended(layer, segments)
    assert calls
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_a_batch_says_of_itself_is_what_the_model_would_find(runtime: Runtime) -> None:
    for batch in micro_batches(put_in_rows(make_documents(12, seed=4)), runtime, 2):
        placed = batch.placed()
        assert placed.placed() is placed
        assert batch.ce_weight is not None and batch.choices is not None and placed.choices is not None
        assert torch.equal(placed.where_weighted(), torch.nonzero(batch.ce_weight.flatten()).flatten())
        assert torch.equal(placed.choices.where(), torch.nonzero(batch.choices.mask.flatten()).flatten())
        assert placed.plain == (batch.packing is None)
        if batch.packing is not None:
            assert placed.documents is not None and placed.packing is placed.segments
            assert torch.equal(placed.documents.bounds, packing_of(batch.packing).bounds)
        moved = placed.to(torch.device("cpu"))
        assert (moved.documents is None) == (placed.documents is None) and moved.plain == placed.plain
        with pytest.raises(ValueError, match="before it is"):
            placed.share(0, 2)


@pytest.mark.parametrize("keys", [{"recompute": "full"}, {"recompute": "selective"}])
def test_layers_that_are_computed_again_know_where_documents_stand(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it on a GPU would wait for all work before, in each layer."""
    parallel = ParallelConfig.model_validate({"threads": 1, **keys})
    trainer = make_trainer(parallel, initialize(parallel, seed=1))
    batches = micro_batches(put_in_rows(make_documents(8, 1)), trainer.runtime, 2)
    read: list[Tensor] = []
    monkeypatch.setattr("ra3_megatron.mcore.packing.read_packing", lambda rows: read.append(rows) or read_packing(rows))
    trainer.step(batches)  # read on the host, where batches are placed
    assert not read
