"""Buckets: what is written is read back; whatever is not as announced is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ra3_megatron.hf.finite import first_not_finite
from ra3_megatron.rollout.refit.buckets import ALIGNMENT, Bucket, BucketReader, BucketWriter, Part, Totals
from ra3_megatron.rollout.refit.errors import RefitError

CAPACITY = 512
Written = tuple[list[tuple[Bucket, Tensor]], Totals]


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,), "large": (40, 11), "c": (2, 2), "square": (4, 4), "d": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(values: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Written:
    buffer = torch.empty(CAPACITY, dtype=torch.uint8)
    buckets: list[tuple[Bucket, Tensor]] = []
    writer = BucketWriter(dtype, lambda: buffer, lambda b: buckets.append((b, buffer[: b.size].clone())))
    for name, value in values.items():
        writer.put(name, value)
    return buckets, writer.finish()


def read(written: Written, values: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    reader = BucketReader({name: tuple(value.shape) for name, value in values.items()}, dtype, CAPACITY)
    buckets, totals = written
    found: dict[str, Tensor] = {}
    for bucket, content in buckets:
        found |= dict(reader.read(bucket, content))
    reader.finish(totals)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(dtype: torch.dtype) -> None:
    values = tensors()
    written = write(values, dtype)
    found = read(written, values, dtype)
    assert list(found) == list(values)
    assert all(torch.equal(found[name], value.to(dtype)) for name, value in values.items())
    buckets, totals = written
    assert len(buckets) > 2 and all(bucket.size <= CAPACITY for bucket, _ in buckets)
    assert all(part.offset % ALIGNMENT == 0 for bucket, _ in buckets for part in bucket.parts)
    assert totals == Totals(len(buckets), len(values), sum(v.numel() for v in values.values()) * dtype.itemsize)


def test_tensors_that_are_read_are_copies() -> None:
    values = {"a": torch.ones(3)}
    (bucket, content), *_ = write(values)[0]
    ((_, found),) = BucketReader({"a": (3,)}, torch.float32, CAPACITY).read(bucket, content)
    content.zero_()
    assert torch.equal(found, values["a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    values = tensors()
    values["large"][39, 10] = value
    with pytest.raises(RefitError, match="tensor large holds values that are not finite"):
        write(values)


def test_a_value_beyond_the_range_of_the_sent_dtype_is_refused() -> None:
    with pytest.raises(RefitError, match="tensor a holds values that are not finite"):
        write({"a": torch.tensor([1e6])}, torch.float16)
    write({"a": torch.tensor([3e38, 3e38, -3e38])})


def test_a_bucket_is_pickled_whole() -> None:
    for bucket, _ in write(tensors())[0]:
        assert pickle.loads(pickle.dumps(bucket)) == bucket


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_verdict_names_the_first_tensor_that_is_not_finite(value: float, dtype: torch.dtype) -> None:
    """The check of a whole bucket, which GPUs get."""
    limits = torch.finfo(dtype)
    good = [torch.tensor([limits.max, limits.min], dtype=dtype), torch.zeros(70_001, dtype=dtype)]
    bad = [tensor.clone() for tensor in good]
    bad[1][66_666] = value
    assert first_not_finite(["a", "b"], good) is None
    assert first_not_finite(["a", "b", "c"], [*bad, bad[1]]) == "b"
    assert first_not_finite([], []) is None


def parts(change: Callable[[list[Part]], list[Part]]) -> Callable[[Written], Written]:
    """A change of the parts of the first bucket."""

    def changed(written: Written) -> Written:
        (bucket, content), *others = written[0]
        return [(replace(bucket, parts=tuple(change(list(bucket.parts)))), content), *others], written[1]

    return changed


def first(**values: Any) -> Callable[[Written], Written]:
    return parts(lambda all_parts: [replace(all_parts[0], **values), *all_parts[1:]])


def bucket_number(which: int, **values: Any) -> Callable[[Written], Written]:
    def changed(written: Written) -> Written:
        buckets = list(written[0])
        buckets[which] = (replace(buckets[which][0], **values), buckets[which][1])
        return buckets, written[1]

    return changed


CORRUPTIONS: dict[str, tuple[Callable[[Written], Written], str]] = {
    "unknown": (first(name="x"), "tensor x was not announced"),
    "misshapen": (first(shape=(5, 3)), r"tensor a came with shape \[5, 3\], not \[3, 5\]"),
    "duplicated": (parts(lambda p: [p[0], replace(p[0], offset=p[1].offset), *p[1:]]), "tensor a came twice"),
    "of another dtype": (first(dtype="torch.bfloat16"), "came as torch.bfloat16, torch.float32 was announced"),
    "short": (first(count=14), "tensor b came before the rest of a"),
    "long": (first(count=16), "elements from 0 came, those from 0 of 15 were due"),
    "empty": (first(count=0), "elements from 0 came"),
    "not from its beginning": (first(first=1, count=14), "elements from 1 came, those from 0 of 15 were due"),
    "unaligned": (first(offset=4), "tensor a lies outside of its place"),
    "over another": (parts(lambda p: [p[0], replace(p[1], offset=0), *p[2:]]), "tensor b lies outside of its place"),
    "missing in the first bucket": (
        parts(lambda p: p[1:]),
        "tensor a never came",
    ),
    "beyond the bucket": (bucket_number(0, size=64), "bucket 0 has 512 bytes, 64 were announced"),
    "a part beyond the bucket": (
        lambda w: ([(replace(w[0][0][0], size=448), w[0][0][1][:448]), *w[0][1:]], w[1]),
        "bucket 0: tensor large lies outside of its place",
    ),
    "bytes without a tensor": (parts(lambda p: p[:-1]), "bytes belong to no tensor"),
    "bucket out of order": (lambda w: ([w[0][1], w[0][0], *w[0][2:]], w[1]), "bucket 1 came where 0 was due"),
    "bucket twice": (lambda w: ([w[0][0], *w[0]], w[1]), "bucket 0 came where 1 was due"),
    "bucket missing": (lambda w: ([w[0][0], *w[0][2:]], w[1]), "bucket 2 came where 1 was due"),
    "last bucket missing": (lambda w: (w[0][:-1], w[1]), "never came|in part only"),
    "truncated bucket": (lambda w: ([(w[0][0][0], w[0][0][1][:-64]), *w[0][1:]], w[1]), "bucket 0 has 448 bytes"),
    "too large a bucket": (bucket_number(0, size=CAPACITY + 1), "bucket 0 has 513 bytes, the buffer 512"),
    "another number of bytes": (lambda w: (w[0], replace(w[1], nbytes=1)), "were sent, .* came"),
    "another shape in its second part": (
        lambda w: (
            [
                w[0][0],
                (replace(w[0][1][0], parts=(replace(w[0][1][0].parts[0], shape=(11, 40)),)), w[0][1][1]),
                *w[0][2:],
            ],
            w[1],
        ),
        "tensor large came with two shapes",
    ),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_what_is_not_as_announced_is_refused(what: str) -> None:
    corrupt, message = CORRUPTIONS[what]
    values = tensors()
    written = write(values)
    assert written[0][0][0].size == CAPACITY and len(written[0]) > 3
    with pytest.raises(RefitError, match=message):
        read(corrupt(written), values)


def test_the_rest_of_a_tensor_must_come() -> None:
    values = {"large": tensors()["large"]}
    buckets, totals = write(values)
    with pytest.raises(RefitError, match="tensor large came in part only"):
        read((buckets[:-1], totals), values)
