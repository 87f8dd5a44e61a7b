"""Uniforms keyed by what they decide, so that a sample does not depend on batches, processes or the order of work."""

from collections.abc import Sequence

import numpy as np

from ra3_megatron.rollout.protocol import Uniforms


def uniforms(key: Sequence[int], lines: int, max_latent_tokens: int) -> Uniforms:
    """Uniforms in [0, 1), [lines, 1 + max_latent_tokens], of the stream named by `key` (non-negative integers)."""
    return generator(key).random((lines, 1 + max_latent_tokens))


def generator(key: Sequence[int]) -> np.random.Generator:
    """The stream named by `key` (non-negative integers)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))
