"""Dealing documents out to micro-batches of about equal cost, none above a budget of tokens.

Everything here is a function of the documents' lengths: every process deals out the same way. The method is the greedy
one that places the longest document first, each into the micro-batch of least cost that has room for it. It keeps to
the budget by construction, which the differencing method of Karmarkar and Karp does not.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ra3_megatron.config.model import ModelConfig


@dataclass(frozen=True)
class DocumentCost:
    """FLOPs of a forward pass over one document of n tokens, as an exact integer that grows with n:

        per_token * n  +  per_pair * n (n + 1) / 2

    per_token is 2 FLOPs a weight that a token is multiplied with in the layers (of a mixture, the router and the
    experts that the token is sent to); per_pair is 4 FLOPs a channel of each query head and layer, for the scores and
    the values of causal attention within the document. A backward pass costs twice as much of both. The output layer
    is left out: it is linear too, and computed only at tokens that count.
    """

    per_token: int
    per_pair: int

    @classmethod
    def of(cls, model: ModelConfig) -> "DocumentCost":
        """The cost in this architecture."""
        head = model.head_dim or model.hidden_size // model.num_attention_heads
        attention = 2 * model.hidden_size * head * (model.num_attention_heads + model.num_query_groups)
        if model.num_experts is None:
            feed_forward = 3 * model.hidden_size * model.ffn_hidden_size
        else:
            width = model.expert_ffn_hidden_size or model.ffn_hidden_size
            feed_forward = model.hidden_size * (3 * width * model.experts_per_token + model.num_experts)
        return cls(
            per_token=2 * model.num_layers * (attention + feed_forward),
            per_pair=4 * model.num_layers * model.num_attention_heads * head,
        )

    def __call__(self, tokens: int) -> int:
        return self.per_token * tokens + self.per_pair * (tokens * (tokens + 1) // 2)


def deal_out(lengths: Sequence[int], budget: int, multiple: int, cost: Callable[[int], int]) -> list[list[int]]:
    """Micro-batches of indices into `lengths`, each index in one of them, each with at most `budget` tokens.

    Their number is a multiple of `multiple`: the least that the tokens could need, or more where documents do not fit
    together, but less than 2 * tokens / budget + `multiple`. Some are empty when there are fewer documents than
    micro-batches; no documents need none. Costs are balanced so far as the budget allows: a micro-batch without its
    shortest document costs no more than any other that has room for that document. So when room never lacks, the
    greatest cost is at most the mean plus the cost of one document.

    cost: of a document of so many tokens; must not fall with the length.
    Raises ValueError when a document is longer than the budget.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= budget:
            raise ValueError(f"document {index} has {length} tokens: a micro-batch holds 1 to {budget}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    no_two_together = sum(2 * length > budget for length in lengths)
    number = round_up(max(-(-sum(lengths) // budget), no_two_together), multiple)
    while (dealt := _deal(order, lengths, budget, number, cost)) is None:
        number += multiple
    return [sorted(members) for members in dealt]


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def _deal(
    order: Sequence[int], lengths: Sequence[int], budget: int, number: int, cost: Callable[[int], int]
) -> list[list[int]] | None:
    """The documents, in this order, into `number` micro-batches; None when one finds no room."""
    dealt: list[list[int]] = [[] for _ in range(number)]
    room = [budget] * number
    cheapest = [(0, place) for place in range(number)]
    for index in order:
        full = []
        while cheapest and room[cheapest[0][1]] < lengths[index]:
            full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        total, place = cheapest[0]
        heapq.heapreplace(cheapest, (total + cost(lengths[index]), place))
        for item in full:
            heapq.heappush(cheapest, item)
        dealt[place].append(index)
        room[place] -= lengths[index]
    return dealt
