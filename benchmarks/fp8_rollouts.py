"""How far a policy that samples in FP8 is from the one that trains: `python -m benchmarks.fp8_rollouts CHECKPOINT …`.

Transcripts are sampled from a copy of a checkpoint whose linear layers are rounded as vLLM's `quantization="fp8"`
rounds them: weights to e4m3 with one scale a layer (queries, keys and values are one, gate and up are one), inputs with
one scale a token (GPUs with CUTLASS) or one for all tokens of a pass (other GPUs). Then an E-step update is made on
them with the exact weights and next to no learning rate, and what it logs is what a run would log in its first step.

Products are of the rounded numbers in fp32, as tensor cores add them up: what is missing is their order of addition.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import ra3_megatron.mcore  # noqa: F401
from benchmarks.estep import STILL
from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.build import Corpus, build_corpus
from ra3_megatron.em.estep import EStep
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.policy import LatentPolicy, latent_policy
from ra3_megatron.mcore import checkpoint as checkpoints
from ra3_megatron.mcore import startup
from ra3_megatron.mcore.fp8 import LINEAR
from ra3_megatron.mcore.model import build_model
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.verbs.sampled_model import find_weights

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SHOWN = {
    "log_prob_mismatch": "mean abs(q_trainer / q_engine - 1)",
    "log_prob_difference": "mean abs(log q_trainer - log q_engine)",
    "largest_log_prob_difference": "largest",
    "truncated_fraction": "weights cut at 2",
    "think_rate": "thoughts a line",
}


def rounded(x: Tensor, per_row: bool) -> Tensor:
    """The nearest numbers of e4m3 in units of a scale by which the largest one just fits. per_row: a scale for each
    vector of the last dimension."""
    most = x.abs().amax(-1, keepdim=True) if per_row else x.abs().amax()
    scale = (most / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return ((x / scale).clamp(-LARGEST, LARGEST).to(FP8).to(x.dtype) * scale).to(x.dtype)


@torch.no_grad()
def round_layers(model: nn.Module, inputs: str | None) -> int:
    """Round the weights of the linear layers, and from now on their inputs (`token`, `tensor`, or not); how many.

    ValueError for Transformer Engine's layers that begin with a norm: what comes in is not what they multiply.
    """
    layers = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in LINEAR]
    if any(hasattr(layer, "layer_norm_weight") for layer in layers):
        raise ValueError(
            "layers of Transformer Engine hide the inputs of their products: measure on a CPU (CUDA_VISIBLE_DEVICES=)"
        )
    for layer in layers:
        layer.weight.copy_(rounded(layer.weight, per_row=False))
        if inputs is not None:
            layer.register_forward_pre_hook(_rounding(inputs == "token"))
    return len(layers)


def _rounding(per_row: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, given: (rounded(given[0], per_row), *given[1:])


def measure(checkpoint: Path, documents: int) -> dict[str, dict[str, float]]:
    """Metrics of an E-step update on the first held-out documents, for each way of rounding."""
    weights = find_weights(checkpoint, None, "megatron", 1.0, ["estep.importance_cap=2", "estep.clip_ratio=null"])
    config = weights.config
    folder = next(parent for parent in checkpoint.parents if (parent / "corpus").is_dir()) / "corpus"
    corpus = build_corpus(config, folder)
    runtime = startup.initialize(config.parallel, config.seed)
    try:
        return _measure(checkpoint, config, corpus, runtime, documents)
    finally:
        startup.shutdown()


def _measure(
    checkpoint: Path, config: RunConfig, corpus: Corpus, runtime: Runtime, documents: int
) -> dict[str, dict[str, float]]:
    def opened() -> nn.Module:
        size = corpus.tokenizer.vocab_size
        model = build_model(config.model.frozen, config.parallel, runtime, size, corpus.format.sets, None)
        checkpoints.load(checkpoint, model, runtime)
        return model

    store = corpus.store("mid", "valid")
    chosen = [store[number] for number in range(min(documents, len(store)))]
    keys = [(number,) for number in range(len(chosen))]
    trainer = Trainer(opened(), STILL, config.parallel, runtime, steps=1_000_000)
    scorer = opened()

    def policy_of(prepare: Callable[[nn.Module], object]) -> LatentPolicy:
        model = opened()
        prepare(model)
        policy = latent_policy(model, config, runtime, corpus.format, corpus.tokenizer, 0)
        policy.sampling.engine.stage._direct = None  # type: ignore[attr-defined]  # passes through modules are hooked
        return policy

    ways: dict[str, Callable[[nn.Module], object]] = {
        "nothing": lambda model: None,
        "weights": partial(round_layers, inputs=None),
        "weights, inputs by token": partial(round_layers, inputs="token"),
        "weights, inputs by pass": partial(round_layers, inputs="tensor"),
    }
    found = {}
    for name, prepare in ways.items():
        policy = policy_of(prepare)
        estep = EStep(config, policy, trainer, scorer, blank_tokens(corpus.tokenizer))
        found[name], _ = estep.update(policy.sample(chosen, keys, config.estep.group_size))
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown, a row for each way of rounding."""
    rows = [f"| rounded | {' | '.join(SHOWN.values())} |", "|---" * (1 + len(SHOWN)) + "|"]
    rows += [f"| {name} | {' | '.join(f'{values[key]:.4g}' for key in SHOWN)} |" for name, values in found.items()]
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_rollouts", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="ends of E-steps: RUN/checkpoints/estep-N/final")
    parser.add_argument("--documents", type=int, default=64, help="held-out documents")
    parsed = parser.parse_args(arguments)
    for checkpoint in parsed.checkpoints:
        print(f"\n{checkpoint}\n\n{table(measure(checkpoint, parsed.documents))}", flush=True)


if __name__ == "__main__":
    main()
