"""The choice of tokens from logits by inverse cumulative distribution, as every engine makes it.

Pure functions of tensors. n positions, V tokens, R rows of the table of token sets (bool [R, V]).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def last_of_sets(sets: Tensor) -> Tensor:
    """The last token of each set, [R]."""
    places = torch.arange(sets.shape[1], device=sets.device)
    return torch.where(sets, places, 0).amax(-1)


def choose(
    logits: Tensor,
    sets: Tensor,
    last: Tensor,
    allowed: Tensor,
    universe: Tensor,
    draws: Tensor,
    greedy: Sequence[bool] | None = None,
    top_p: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens sampled within rows `allowed` of the sets, and their log-probabilities within rows `universe`.

    logits: fp32 [n, V], at the sampling temperature; last: `last_of_sets(sets)`; allowed, universe: [n];
    draws: fp64 [n], uniforms in [0, 1); greedy: positions that take the most probable allowed token instead;
    top_p: of each position, see `nucleus`.
    Returns tokens, long [n], and log-probabilities, fp32 [n].
    """
    inside = logits.masked_fill(~sets[allowed], -torch.inf)
    probabilities = inside.double().softmax(-1)
    last = last[allowed]
    if top_p is not None and min(top_p) < 1:
        kept = nucleus(probabilities, torch.tensor(top_p, dtype=torch.float64, device=logits.device))
        probabilities, last = torch.where(kept, probabilities, 0.0), last_of_sets(kept)
    cumulative = probabilities.cumsum(-1)
    point = draws * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]
    # a uniform next to 1 can round past the last token that has any probability
    tokens = torch.minimum(tokens, last)
    if greedy is not None and any(greedy):
        tokens = torch.where(torch.tensor(greedy, device=tokens.device), inside.argmax(-1), tokens)
    within = logits.masked_fill(~sets[universe], -torch.inf).log_softmax(-1)
    return tokens, within.gather(1, tokens[:, None])[:, 0]


def nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The fewest most probable tokens that have together at least probability `top_p`, bool [n, V] (Holtzman et al.,
    2020); of equal ones the first. probabilities: fp64 [n, V]; top_p: fp64 [n], in (0, 1]; 1: every token."""
    ordered, places = probabilities.sort(stable=True, dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, places, before < top_p[:, None])
    return kept | (top_p[:, None] >= 1)


def set_log_probs(logits: Tensor, sets: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """log P(token in A | token in B), fp32 [n], for rows `numerator` (A, a subset of B) and `denominator` (B).

    logits: fp32 [n, V], at the sampling temperature. The whole-vocabulary form of mcore's `event_log_probs`.
    """
    event = logits.masked_fill(~sets[numerator], -torch.inf).logsumexp(-1)
    return event - logits.masked_fill(~sets[denominator], -torch.inf).logsumexp(-1)
