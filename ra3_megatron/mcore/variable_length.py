"""Causal attention of documents of any length in one kernel: torch's `varlen_attn`, on GPUs in 16 bits."""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

CHANNELS = 256
"""Of a head at most."""


def takes(query: Tensor) -> bool:
    """Whether there is a kernel for queries like these. query: [..., d]."""
    channels = query.shape[-1]
    return (
        query.is_cuda and query.element_size() == 2 and channels <= CHANNELS and channels % 8 == 0 and bool(_kernel())
    )


def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """softmax(q k^T * scale + mask) v within each document, [T, h, d].

    q: [T, h, d]; k, v: [T, g, d]; bounds: int [documents + 1], where each document begins among the T tokens, and T.
    """
    found = _kernel()
    assert found is not None, "`takes` was not asked"
    kernel, keys = found
    out: Tensor = kernel(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **keys)
    return out


@cache
def _kernel() -> tuple[Any, dict[str, Any]] | None:
    """torch's function, and what it must be told beside the above; None where this torch has none that will do."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not torch.cuda.is_available() or not {"scale", "window_size"} <= known.keys():
        return None
    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in known else {}
