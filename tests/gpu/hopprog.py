"""RA3 against NTP on HopProg with a model of 85M parameters: one seed, a short run.

The stages of `make hopprog` (examples/hopprog-base.yaml, the base of examples/studies/hopprog.yaml,
examples/hopprog.yaml) with a larger model and as many steps as the time allows, on the project's own steps: two warm
starts, an E-step, an M-step on documents that its policy infused, and NTP on the same rows from the same start. What
is reported is what ground truth says of held-out tasks. Whether the base passes the gate of the test bed (first lines
right at 0 hops, wrong at 3, thoughts right) is reported with it: without it, the rest says nothing of RA3.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ra3_megatron.config.load import load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.build import Corpus, build_corpus
from ra3_megatron.corpus.generated import Tasks
from ra3_megatron.em.estep import EStep
from ra3_megatron.em.evaluation import evaluate
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.mstep import MStep
from ra3_megatron.em.order import DocumentOrder, Ordered, Stream, order_seed
from ra3_megatron.em.policy import LatentPolicy, latent_policy
from ra3_megatron.mcore.model import build_model
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.scaling.counts import total_parameters
from ra3_megatron.tasks import measures
from tests.gpu.evidence import Evidence
from tests.gpu.setting import Setting
from tests.gpu.training import Documents, copy_weights

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHARES = {"first": 0.25, "second": 0.2, "estep": 0.2}
"""Of the time behind the corpora. The rest: infusion, the M-steps, held-out tasks."""
SECONDS = 300.0
"""With less time the part says nothing."""
GATE = (0.95, 0.5, 0.95)
"""First lines right at 0 hops at least, at 3 hops at most; thoughts right at least."""
MODEL = [
    "model.num_layers=12",
    "model.hidden_size=768",
    "model.ffn_hidden_size=2048",
    "model.num_attention_heads=12",
    "model.num_query_groups=12",
    "model.init_std=0.02",
]
"""85M; in the small form the example's own shape, smaller."""
SMALL = ["model.hidden_size=32", "model.ffn_hidden_size=64", "parallel.threads=1", "evaluation.documents=4"]
SECOND = [
    "corpus.tasks.first=100000",
    "corpus.tasks.min_hops=0",
    "corpus.tasks.drill_share=0.6",
    "corpus.tasks.plain_drill_share=0.5",
]
"""What the base of the study changes of hopprog-base.yaml."""
GATE_TASKS = ["corpus.tasks.min_hops=0", "corpus.tasks.first=2000000"]
"""The gate is judged on tasks of 0 hops, too."""
BASE = "hopprog-base.yaml"


@dataclass
class Course:
    """One run: its setting, corpora by stage, and the time it has."""

    evidence: Evidence
    setting: Setting
    seconds: float

    def configuration(self, file: str, count: int, *overrides: str, tokenizer: Path | None = None) -> RunConfig:
        """An example with a larger model and its own tasks; tokenizer: the one to take, None: it trains one."""
        precision = "bf16" if self.setting.cuda else "fp32"
        values = [f"model.precision={precision}", f"corpus.tasks.count={count}", *overrides]
        values.append(f"rollout.cuda_graphs={str(self.setting.cuda).lower()}")
        values += self.setting.pick(MODEL, SMALL)
        if tokenizer is not None:
            values.append(f"tokenizer.path={tokenizer}")
        return load_config(EXAMPLES / file, values)

    def stages(self) -> dict[str, Stage]:
        """Every stage with its corpus; all use one tokenizer. Corpora are made beside each other but in the small
        form."""
        first = self.configuration(BASE, self.setting.pick(2_000, 300))
        tokenizer = build_corpus(first, self.setting.folder / "tokens").folder / "tokenizer"
        counts = self.setting.pick((12_000, 10_000, 4_000, 1_000), (200, 200, 200, 100))
        configs = {
            "first": self.configuration(BASE, counts[0], tokenizer=tokenizer),
            "second": self.configuration(BASE, counts[1], *SECOND, tokenizer=tokenizer),
            "third": self.configuration("hopprog.yaml", counts[2], tokenizer=tokenizer),
            "gate": self.configuration("hopprog.yaml", counts[3], *GATE_TASKS, tokenizer=tokenizer),
        }
        folders = {name: self.setting.folder / name for name in configs}
        if not self.setting.small:
            with ProcessPoolExecutor(len(configs), get_context("spawn")) as pool:
                for made in [pool.submit(_build, configs[name], folders[name]) for name in configs]:
                    made.result()
        return {name: Stage(self, config, build_corpus(config, folders[name])) for name, config in configs.items()}


def _build(config: RunConfig, folder: Path) -> None:
    build_corpus(config, folder)


@dataclass
class Stage:
    """What steps of one kind read."""

    course: Course
    config: RunConfig
    corpus: Corpus

    def model(self) -> Any:
        """With initial weights."""
        tokenizer, setting = self.corpus.tokenizer, self.course.setting
        sets, size = self.corpus.format.sets, tokenizer.vocab_size
        return build_model(self.config.model, setting.parallel, setting.runtime, size, sets, self.config.seed)

    def copy(self, source: Any) -> Any:
        """A model of its own with the same weights."""
        model = self.model()
        copy_weights(source, model)
        return model

    def policy(self, model: Any, version: int | None = 0) -> LatentPolicy:
        """What samples from a model."""
        runtime = self.course.setting.runtime
        return latent_policy(model, self.config, runtime, self.corpus.format, self.corpus.tokenizer, version)


def run(evidence: Evidence, setting: Setting) -> None:
    """All stages."""
    whole = setting.cuda and not setting.small
    if whole and not evidence.enough("RA3 against NTP on HopProg", SECONDS):
        return
    course = Course(evidence, setting, 10.0)
    first, second, third, gate = course.stages().values()
    if whole:
        course.seconds = evidence.left
    size = total_parameters(first.config.model, first.corpus.tokenizer.vocab_size)
    evidence.figure("parameters", size / 1e6, "million", note="a short run, one seed")
    base = first.model()
    warm_start(first, base, "first", 3e-4)
    warm_start(second, base, "second", 2e-4)
    held_out(gate, base, "base, 0 to 3 hops", gate=True)
    held_out(third, base, "base")
    q = estep(third, base)
    steps = compare(third, base, q)
    evidence.figure("M-step: steps of each arm", steps)


def steps_in(seconds: float, step: Any, setting: Setting, least: int, most: int) -> int:
    """As many steps as take so long, from the time of a few."""
    step()
    setting.wait()
    begin = time.perf_counter()
    for _ in range(3):
        step()
    setting.wait()
    return max(least, min(most, int(seconds / ((time.perf_counter() - begin) / 3))))


def warm_start(stage: Stage, model: Any, name: str, rate: float) -> None:
    """Next-token prediction in place, for its share of the time."""
    course, setting = stage.course, stage.course.setting
    settings = stage.config.warm_start
    changed = {"learning_rate": setting.pick(rate, 3e-3), "min_learning_rate": 0.0}
    optimizer = settings.optimizer.model_copy(update=changed)
    rows, micro = setting.pick((16, 16), (4, 4))
    settings = settings.model_copy(
        update={"global_batch_size": rows, "micro_batch_size": micro, "optimizer": optimizer, "steps": 10**6}
    )
    store = stage.corpus.store("warm", "train")
    probe = stage.copy(model)  # its weights are thrown away
    trial = trainer_of(stage, probe, settings, 10)
    mstep = MStep(stage.config, settings, trial, store)
    count = steps_in(SHARES[name] * course.seconds, mstep.step, setting, least=4, most=setting.pick(8_000, 6))
    del trial, mstep, probe
    trainer = trainer_of(stage, model, settings, count)
    mstep = MStep(stage.config, settings, trainer, shuffled(stage, store, settings, count))
    losses = [mstep.step()["loss"] for _ in range(count)]
    course.evidence.series(f"{name} warm start, loss", losses[:: max(1, count // 200)])
    course.evidence.figure(f"{name} warm start: steps of {rows} rows", count)


def trainer_of(stage: Stage, model: Any, settings: Any, steps: int) -> Trainer:
    """A trainer of a model with the optimizer of a section."""
    setting = stage.course.setting
    return Trainer(model, settings.optimizer, setting.parallel, setting.runtime, steps)


def shuffled(stage: Stage, store: Any, settings: Any, steps: int) -> Ordered:
    """The documents of so many steps in the order of the seed."""
    counted = settings.model_copy(update={"steps": steps})
    order = DocumentOrder(
        store, counted, stage.config.model.context_length, order_seed(stage.config.seed, Stream.WARM_ORDER)
    )
    return Ordered(store, order.of(1))


def estep(stage: Stage, base: Any) -> Any:
    """The policy, trained against the frozen base for its share of the time."""
    course, setting, config = stage.course, stage.course.setting, stage.config
    section = config.estep.model_copy(update={"documents_per_step": 4}) if setting.small else config.estep
    rate = setting.pick(5e-5, 5e-4)
    section = section.model_copy(update={"optimizer": section.optimizer.model_copy(update={"learning_rate": rate})})
    config = config.model_copy(update={"estep": section})
    q, scorer = stage.copy(base), stage.copy(base).requires_grad_(False)
    trainer = trainer_of(stage, q, section, section.steps)
    step = EStep(config, stage.policy(trainer.model, None), trainer, scorer, blank_tokens(stage.corpus.tokenizer))
    store, count = stage.corpus.store("mid", "train"), section.documents_per_step
    begin, metrics = time.monotonic(), []
    for number in range(setting.pick(section.steps, 2)):
        documents = [store[(number * count + n) % len(store)] for n in range(count)]
        keys = [(config.seed, Stream.ESTEP, 1, number, n) for n in range(count)]
        metrics.append(step.step(documents, keys)[0])
        if time.monotonic() - begin > SHARES["estep"] * course.seconds:
            break
    for name in ("reward", "think_rate"):
        course.evidence.series(f"E-step, {name}", [each[name] for each in metrics])
    course.evidence.figure("E-step: updates", len(metrics))
    return q


def compare(stage: Stage, base: Any, q: Any) -> int:
    """RA3's M-step on infused documents and NTP on the same documents without thoughts, as many steps each."""
    course, setting = stage.course, stage.course.setting
    rate = setting.pick(1e-4, 3e-4)
    section = stage.config.mstep
    section = section.model_copy(update={"optimizer": section.optimizer.model_copy(update={"learning_rate": rate})})
    raw_store, limit = stage.corpus.store("mid", "train"), setting.pick(3000, 24)
    raw = Documents(raw_store[n] for n in range(min(limit, len(raw_store))))
    keys = [(stage.config.seed, Stream.INFUSE, 1, n) for n in range(len(raw))]
    infused = Documents(stage.policy(q).sample(raw, keys, 1))
    steps = setting.pick(section.steps, 3)
    for name, documents in (("RA3", infused), ("NTP", raw)):
        model = stage.copy(base)
        trainer = trainer_of(stage, model, section, steps)
        mstep = MStep(stage.config, section, trainer, documents, stage.config.mstep.thought_weight)
        losses = [mstep.step()["code_ce"] for _ in range(steps)]
        course.evidence.series(f"M-step of {name}, code_ce", losses)
        held_out(stage, model, name)
    return steps


def held_out(stage: Stage, model: Any, name: str, gate: bool = False) -> None:
    """What ground truth says of held-out tasks."""
    evidence, config = stage.course.evidence, stage.config
    store = stage.corpus.store("mid", "valid")
    count = min(config.evaluation.documents, len(store))
    documents = [store[n] for n in range(count)]
    keys = [(config.seed, Stream.EVALUATION, 0, n) for n in range(count)]
    found = evaluate(model, stage.policy(model), documents, keys, config, blank_tokens(stage.corpus.tokenizer))
    lines = measures.lines_of(found.by_line(stage.corpus.tokenizer), Tasks(config.corpus).task_named)
    chosen = measures.selectivity(lines)
    note = f"{count} held-out tasks"
    evidence.figure(f"{name}: nats a line of an item", measures.nats_a_line(lines), "nats", note=note)
    evidence.figure(f"{name}: nats a line without thoughts", measures.nats_a_line(lines, raw=True), "nats")
    evidence.figure(f"{name}: thoughts at true boundaries, F1", chosen.f1, note=f"{chosen.think_rate:.3f} of lines")
    if gate:
        first, thoughts = measures.first_line_accuracy(lines, raw=True), measures.thought_accuracy(lines)
        right = min(thoughts.values(), default=0.0)
        text = ", ".join(f"{hops} hops {share:.2f}" for hops, share in first.items())
        passed = first.get(0, 0.0) >= GATE[0] and first.get(3, 1.0) < GATE[1] and right >= GATE[2]
        note = f"first lines right without thoughts: {text}; least share of right thoughts at any hops {right:.2f}"
        evidence.figure("the base passes the gate", "yes" if passed else "no", note=note)
