"""The project's M-step and E-step in bf16 and every FP8 recipe: the same data, the same initial weights, curves.

Documents are functions of this machine's Python (in the small form, toy documents); the M-step reads their comments as
thoughts, so that there is something to sample. FP8 products take no single
tokens, so the E-step samples with a bf16 copy of the weights that it trains, renewed before every update: what a run
does with rollout.engine=vllm, without vLLM. What the two precisions differ in is the E-step's `log_prob_mismatch`, by
which a run would stop.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ra3_megatron.config.data import CorpusConfig, TextConfig
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.config.precision import RECIPES
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.runtime import RolloutConfig
from ra3_megatron.config.training import EStepConfig, MonitorConfig, MStepConfig, OptimizerConfig
from ra3_megatron.em.estep import EStep
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.mstep import MStep
from ra3_megatron.em.policy import latent_policy
from ra3_megatron.mcore.model import build_model, chunks_of
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.text.documents import compose
from ra3_megatron.text.latents import LatentFormat, build_format, encode_document, raw
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Transcript
from tests.gpu.evidence import Evidence, largest
from tests.gpu.setting import Setting, mean, release, with_precision

MODEL = ModelConfig(num_layers=8, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, num_query_groups=4)
"""28M with the vocabulary."""
VOCABULARY = 4096
LIMIT = 6000
"""Functions that are read."""
LOSS_MOST = 0.02
"""An FP8 recipe's loss at the end may be off bf16's by this share."""
THINKS = 0.005
"""Mean share of lines with a thought in the E-step, at least: 3% to 4% of lines have a comment above them. Where only
"no thought" is sampled, nearly surely, trainer and sampler agree whatever they compute."""
LAST = 0.1
"""Share of the steps whose mean is the loss at the end."""
LINES = ("a = b\n", "  ab(c):\n", "   b\n\n", " d(a)\n  \n", "c\n", "ab(a)\n")
"""Of toy documents."""


class Documents(list[Transcript]):
    """A store of transcripts."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [transcript.num_tokens for transcript in self]


@dataclass(frozen=True)
class Material:
    """What is trained on, and the architecture."""

    model: ModelConfig
    text: TextConfig
    tokenizer: Tokenizer
    latents: LatentFormat
    documents: Documents
    """Of the M-step, with human thoughts."""
    plain: Documents
    """The same without thoughts, of the E-step."""


def run(evidence: Evidence, setting: Setting) -> None:
    """Every precision in turn."""
    material = toy(setting) if setting.small else python_functions(setting)
    names = ["bf16", *setting.recipes(material.model, evidence)] if setting.cuda else ["fp32", "bf16"]
    if not setting.cuda:
        setting.recipes(material.model, evidence)
    base = names[0]
    curves: dict[str, dict[str, list[float]]] = {}
    seconds = setting.pick(60.0, 1.0)
    for precision in names:
        if not evidence.enough(precision, seconds):
            continue
        begin = time.monotonic()
        with evidence.attempt(precision):
            curves[precision] = both(evidence, setting, material, precision)
            for kind, values in curves[precision].items():
                evidence.series(f"{kind}, {precision}", values)
            judge(evidence, curves, precision, base)
            if not setting.small:
                think_rate = mean(curves[precision]["E-step think_rate"])
                evidence.check(f"{precision}: lines with a thought in the E-step", think_rate, at_least=THINKS)
        release()
        seconds = 1.1 * (time.monotonic() - begin)
    draw(evidence, setting, curves)


def judge(evidence: Evidence, curves: dict[str, dict[str, list[float]]], precision: str, base: str) -> None:
    """What must hold of the curves of a precision."""
    mine = curves[precision]
    begin, end = at_end(mine["M-step loss"][:3], 1.0), at_end(mine["M-step loss"])
    evidence.check(f"{precision}: M-step loss at the end by that at the beginning", end / begin, at_most=0.98)
    evidence.figure(f"{precision}: E-step reward at the end", at_end(mine["E-step reward"]), "nats a line")
    evidence.check(
        f"{precision}: how far q_trainer / q_sampler is off 1, mean over sampled choices, largest of an update",
        largest(mine["E-step log_prob_mismatch"]),
        MonitorConfig().max_fp8_log_prob_mismatch if precision in RECIPES else MonitorConfig().max_log_prob_mismatch,
        note="above this a run stops",
    )
    if precision != base and base in curves:
        other = at_end(curves[base]["M-step loss"])
        evidence.check(f"{precision}: M-step loss at the end, off {base}'s by", abs(end / other - 1), LOSS_MOST)


def at_end(values: Sequence[float], share: float = LAST) -> float:
    """Mean of the last share of a curve."""
    return mean(values[-max(1, round(share * len(values))) :])


def both(evidence: Evidence, setting: Setting, material: Material, precision: str) -> dict[str, list[float]]:
    """M-steps from initial weights, then E-steps from where they end; the curves."""
    config = configuration(setting, material, precision)
    pi = model(setting, material, config)
    trainer = Trainer(pi, config.mstep.optimizer, setting.parallel, setting.runtime, config.mstep.steps)
    mstep = MStep(config, config.mstep, trainer, material.documents)
    found: dict[str, list[float]] = {"M-step loss": [mstep.step()["loss"] for _ in range(config.mstep.steps)]}
    scorer = model(setting, material, config.model_copy(update={"model": config.model.frozen})).requires_grad_(False)
    q = model(setting, material, config)
    for copy in (scorer, q):
        copy_weights(trainer.model, copy)
    del trainer, mstep, pi
    release()
    metrics = estep(setting, material, config, q, scorer)
    for name in ("reward", "think_rate", "log_prob_mismatch"):
        found[f"E-step {name}"] = [each[name] for each in metrics]
    return found


def estep(
    setting: Setting, material: Material, config: RunConfig, q: torch.nn.Module, scorer: torch.nn.Module
) -> list[dict[str, float]]:
    """Updates of q, sampled by a copy of it in bf16 (in fp32 when q is); metrics of each."""
    trainer = Trainer(q, config.estep.optimizer, setting.parallel, setting.runtime, config.estep.steps)
    plain = configuration(setting, material, "fp32" if config.model.precision == "fp32" else "bf16")
    sampler = model(setting, material, plain).requires_grad_(False)
    policy = latent_policy(sampler, plain, setting.runtime, material.latents, material.tokenizer)
    step = EStep(config, policy, trainer, scorer, blank_tokens(material.tokenizer))
    count, metrics = config.estep.documents_per_step, []
    for number in range(config.estep.steps):
        copy_weights(trainer.model, sampler)
        places = [(number * count + n) % len(material.plain) for n in range(count)]
        documents = [material.plain[place] for place in places]
        found, _ = step.step(documents, [(config.seed, 2, number, n) for n in range(count)])
        metrics.append(found)
    return metrics


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """The weights of one model into another one of the same kind of layers. ValueError when names differ."""
    for one, other in zip(chunks_of(source), chunks_of(target), strict=True):
        values, places = dict(one.named_parameters()), dict(other.named_parameters())
        if values.keys() != places.keys():
            raise ValueError("the two models have other weights")
        for name, place in places.items():
            place.copy_(values[name])


def model(setting: Setting, material: Material, config: RunConfig) -> torch.nn.Module:
    """With the initial weights of the configuration's seed."""
    size, sets = material.tokenizer.vocab_size, material.latents.sets
    return build_model(config.model, setting.parallel, setting.runtime, size, sets, config.seed)


def configuration(setting: Setting, material: Material, precision: str) -> RunConfig:
    """Of a run on this material. (FP8 asks for an engine that samples beside the trainer: here that is the copy.)"""
    steps, updates = setting.pick((200, 12), (8, 2))
    rows, micro = setting.pick((32, 16), (4, 4))
    documents, group = setting.pick((32, 8), (4, 4))
    beside = precision not in ("fp32", "bf16")
    return RunConfig(
        seed=11,
        model=with_precision(material.model, precision),
        text=material.text,
        rollout=RolloutConfig(engine="vllm") if beside else RolloutConfig(cuda_graphs=setting.cuda),
        mstep=MStepConfig(
            steps=steps,
            global_batch_size=rows,
            micro_batch_size=micro,
            optimizer=OptimizerConfig(learning_rate=setting.pick(1e-3, 1e-2), warmup_fraction=0.1),
        ),
        estep=EStepConfig(steps=updates, documents_per_step=documents, group_size=group, micro_batch_size=micro),
    )


def toy(setting: Setting) -> Material:
    """Documents of a few tokens, for the small form."""
    from tests.toy import LARGE, Toy

    made = Toy(setting.runtime, "comment", LARGE, max_latent_tokens=3)
    draw = random.Random(1)
    codes = ["a\n" + "".join(draw.choices(LINES, k=draw.randint(1, 6))) for _ in range(40)]
    texts = [raw(made.document(code, f"document {n}"), made.latents, made.tokenizer) for n, code in enumerate(codes)]
    return Material(made.architecture, made.text, made.tokenizer, made.latents, Documents(texts), Documents(texts))


def python_functions(setting: Setting) -> Material:
    """Functions of 3 to 30 lines of the standard library, and a tokenizer trained on them."""
    from ra3_megatron.corpus.sources import iter_texts
    from ra3_megatron.text.tokenizer import train_sentencepiece

    texts: list[str] = []
    for source in iter_texts(CorpusConfig(), None):
        if 3 <= source.text.count("\n") <= 30:
            texts.append(source.text)
        if len(texts) >= LIMIT:
            break
    tokenizer = train_sentencepiece(texts, VOCABULARY, setting.folder / "tokenizer")
    text = TextConfig(max_latent_tokens=6)
    latents = build_format(text, tokenizer)
    found = []
    for number, code in enumerate(texts):
        document = encode_document(code, str(number), tokenizer, latents, text, "as_thoughts")
        thinking = compose(document, document.observed, latents, tokenizer)
        if thinking.num_tokens <= MODEL.context_length - 64:
            found.append((thinking, raw(replace(document, observed={}), latents, tokenizer)))
    random.Random(1).shuffle(found)
    documents, plain = (Documents(each) for each in zip(*found, strict=True))
    return Material(MODEL, text, tokenizer, latents, documents, plain)


def draw(evidence: Evidence, setting: Setting, curves: dict[str, dict[str, list[float]]]) -> None:
    """`curves.png` beside the results, where matplotlib is there."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        evidence.missing("curves.png", "matplotlib is not there")
        return
    kinds = sorted({kind for of in curves.values() for kind in of})
    figure = Figure(figsize=(4 * max(1, len(kinds)), 3), layout="constrained")
    axes: Any = figure.subplots(1, max(1, len(kinds)), squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=False):
        for precision, of in curves.items():
            axis.plot(range(1, len(of.get(kind, [])) + 1), of.get(kind, []), label=precision)
        axis.set_title(kind)
        axis.set_xlabel("step")
        axis.legend(fontsize="small")
    FigureCanvasAgg(figure)
    figure.savefig(setting.out / "curves.png", dpi=100)
