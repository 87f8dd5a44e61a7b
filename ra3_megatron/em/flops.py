"""How much arithmetic a phase takes: the measure by which arms are given equal compute.

Matrix products alone: 2 FLOP a weight and token forward, 4 backward; attention scores are left out (a few percent at
lengths of a hundred tokens). Sampling and scoring each count one forward pass over every token of a transcript; equal
transcripts of an E-step count once (`em/distinct.py`).
"""

from ra3_megatron.config.model import ModelConfig

FORWARD, BACKWARD = 2, 4
TRAINED = FORWARD + BACKWARD
SCORED = SAMPLED = FORWARD


def active_weights(model: ModelConfig, vocab_size: int) -> int:
    """Weights of matrices that each token is multiplied with, the output layer included, the embedding not."""
    hidden, head = model.hidden_size, model.head_dim or model.hidden_size // model.num_attention_heads
    attention = hidden * head * (2 * model.num_attention_heads + 2 * model.num_query_groups)
    width, experts, router = model.ffn_hidden_size, 1, 0
    if model.num_experts is not None:
        width, experts = model.expert_ffn_hidden_size or width, model.experts_per_token
        router = hidden * model.num_experts
    return model.num_layers * (attention + 3 * hidden * width * experts + router) + hidden * vocab_size


def flops(model: ModelConfig, vocab_size: int, tokens: int, passes: int) -> float:
    """FLOP of `tokens` tokens, at `passes` FLOP a weight and token (sums of `TRAINED`, `SCORED`, `SAMPLED`)."""
    return float(passes) * active_weights(model, vocab_size) * tokens
