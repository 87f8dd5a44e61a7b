"""The whole configuration of a run, and the checks that need more than one section."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ra3_megatron.config.base import Section
from ra3_megatron.config.benchmarks import BenchmarksConfig
from ra3_megatron.config.data import CorpusConfig, TextConfig, TokenizerConfig
from ra3_megatron.config.layouts import Batches, batch_problems, layout_advice, layout_problems
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.profile import ProfileConfig
from ra3_megatron.config.rlvr import RlvrConfig, Sandboxing
from ra3_megatron.config.runtime import CheckpointConfig, ExportConfig, LoggingConfig, RolloutConfig, WatchdogConfig
from ra3_megatron.config.training import (
    EMConfig,
    EStepConfig,
    EvaluationConfig,
    MonitorConfig,
    MStepConfig,
    WarmStartConfig,
)


class RunConfig(Section):
    """Everything that decides what a run computes and where it writes."""

    method: Literal["ra3", "ntp", "rlvr"] = "ra3"
    """`ra3`: EM with latent thoughts; `ntp`: plain next-token prediction with the same loop and data order; `rlvr`:
    reinforcement learning with verifiable rewards (`ra3 rlvr` sets it)."""

    run_dir: str = Field(default="runs/ra3", min_length=1)
    """Folder of the run: configuration, manifest, metrics, checkpoints, report."""

    seed: int = Field(default=1234, ge=0, lt=2**31)
    """Seed of weights, data order and sampling."""

    corpus: CorpusConfig = CorpusConfig()
    """Expert text."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer."""
    text: TextConfig = TextConfig()
    """Primitive actions and latents."""
    model: ModelConfig = ModelConfig()
    """Architecture."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over processes."""
    warm_start: WarmStartConfig = WarmStartConfig()
    """NTP before the first EM iteration."""
    em: EMConfig = EMConfig()
    """The EM loop."""
    estep: EStepConfig = EStepConfig()
    """Policy gradient on the latent policy q."""
    mstep: MStepConfig = MStepConfig()
    """NTP on infused documents."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out measurement."""
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    """Suites of tasks, every so many updates."""
    monitors: MonitorConfig = MonitorConfig()
    """Signs of failure."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Noticing that a run hangs."""
    export: ExportConfig = ExportConfig()
    """What a run leaves for others."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics and progress."""
    profile: ProfileConfig = ProfileConfig()
    """Single steps, looked at closely."""
    rlvr: RlvrConfig = RlvrConfig()
    """Reinforcement learning with verifiable rewards (`ra3 rlvr`)."""
    sandbox: Sandboxing = "bubblewrap"
    """What programs that a model wrote are executed in. `subprocess-unsafe`: nothing; they can do whatever the user who
    started the run can."""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """One line for each combination of sections that cannot run."""
        yield from self._rlvr_problems() if self.method == "rlvr" else self._em_problems()
        if self.model.vocab_size is not None and self.tokenizer.kind != "hf":
            yield (
                f"model.vocab_size={self.model.vocab_size} goes with tokenizer.kind=hf only: leave it out, the model "
                "has the tokenizer's vocabulary"
            )
        if self.model.fp8_recipe and self.rollout.engine != "vllm":
            yield (
                f"model.precision={self.model.precision} needs rollout.engine=vllm: FP8 products cannot take single "
                "tokens, as rollout.engine=megatron samples them"
            )
        if self.model.fp8_recipe and self.model.num_experts is not None:
            yield (
                f"model.precision={self.model.precision} does not go with model.num_experts={self.model.num_experts}: "
                f"tokens of an expert are no multiple of {self.model.row_multiple}; use model.precision=bf16"
            )
        yield from self._quantization_problems()
        yield from self._graph_problems()
        lines = list(layout_problems(self.model, self.parallel))
        if lines:
            advice = self.layout_advice(self.parallel.world_size)
            yield from lines[:-1]
            yield f"{lines[-1]}; {advice}" if advice else lines[-1]
        yield from batch_problems(self.parallel, self._batches())
        for name in self._sections():
            budget = getattr(self, name).micro_batch_tokens
            if budget is not None and budget < self.model.context_length:
                yield (
                    f"{name}.micro_batch_tokens={budget} is less than the longest document, "
                    f"model.context_length={self.model.context_length}"
                )
        if 4 * self.text.max_latent_tokens > self.model.context_length:
            yield (
                f"text.max_latent_tokens={self.text.max_latent_tokens} leaves no room for code in "
                f"model.context_length={self.model.context_length}: at most a quarter of it"
            )

    def _em_problems(self) -> Iterator[str]:
        """What mid-training cannot do."""
        if self.text.latent_format == "comment" and self.corpus.human_comments == "keep":
            yield (
                "corpus.human_comments=keep does not go with text.latent_format=comment "
                "(a human comment cannot be told from a thought): use strip or as_thoughts"
            )
        if math.isinf(self.estep.latent_price) and self.corpus.human_comments == "as_thoughts":
            yield (
                "estep.latent_price=inf (never think) does not go with corpus.human_comments=as_thoughts: "
                "use strip or keep, or a finite price"
            )
        if self.evaluation.observed_thoughts and self.corpus.human_comments != "as_thoughts":
            yield (
                f"evaluation.observed_thoughts=true goes with corpus.human_comments=as_thoughts: with "
                f"{self.corpus.human_comments} no comment stands for a thought"
            )
        if self.method == "ntp" and self.mstep.latents != "sampled":
            yield (
                f"mstep.latents={self.mstep.latents} is not read with method=ntp, which has no latents: it goes with "
                "method=ra3"
            )
        if self.method == "ra3" and math.isinf(self.estep.latent_price):
            read = {"mstep.latents": (self.mstep.latents, "sampled"), "estep.policy": (self.estep.policy, None)}
            for key, (value, default) in read.items():
                if value != default:
                    yield f"{key}={value} is not read with estep.latent_price=inf (never think): give a finite price"
        yield from self._staleness_problems("estep", self.estep)
        if self.model.hf is not None and self.warm_start.checkpoint is not None:
            yield (
                f"warm_start.checkpoint={self.warm_start.checkpoint} does not go with model.hf={self.model.hf}: "
                "give one of them to start from"
            )

    def _rlvr_problems(self) -> Iterator[str]:
        """What RLVR cannot do."""
        if self.rlvr.checkpoint is None and self.model.hf is None:
            yield "rlvr.checkpoint is missing: name the checkpoint folder to start from (or model.hf)"
        if self.rlvr.checkpoint is not None and self.model.hf is not None:
            yield (
                f"rlvr.checkpoint={self.rlvr.checkpoint} does not go with model.hf={self.model.hf}: give one of them"
            )
        if not self.text.keep_latents:
            yield (
                "text.keep_latents=false does not go with method=rlvr: responses are sampled with all thoughts in the "
                "context"
            )
        yield from self._staleness_problems("rlvr", self.rlvr)

    def _staleness_problems(self, name: str, section: EStepConfig | RlvrConfig) -> Iterator[str]:
        """A line when `section` would train on what older weights sampled, and not correct for it."""
        if self.rollout.max_staleness and section.importance_cap is None and section.clip_ratio is None:
            yield (
                f"rollout.max_staleness={self.rollout.max_staleness} trains on samples of older weights: set "
                f"{name}.importance_cap (2, say) or {name}.clip_ratio"
            )

    def _graph_problems(self) -> Iterator[str]:
        """A pass that is recorded runs in one process, and waits for nothing."""
        if not self.rollout.cuda_graphs:
            return
        for name in ("tensor", "pipeline", "expert"):
            size = getattr(self.parallel, name)
            if size > 1:
                yield (
                    f"rollout.cuda_graphs=true does not go with parallel.{name}={size}: a pass over several processes "
                    "is not recorded"
                )
        if self.parallel.overlap_param_gather:
            yield (
                "rollout.cuda_graphs=true does not go with parallel.overlap_param_gather=true, which waits for weights "
                "within a pass"
            )
        if self.model.num_experts is not None:
            yield (
                f"rollout.cuda_graphs=true does not go with model.num_experts={self.model.num_experts}: how many "
                "tokens an expert gets differs from pass to pass"
            )

    def _quantization_problems(self) -> Iterator[str]:
        """Lines when engines are to sample in FP8, and that would not work or not be corrected for."""
        key = f"rollout.vllm.quantization={self.rollout.vllm.quantization}"
        if self.rollout.vllm.quantization == "none":
            return
        if self.model.precision == "fp32":
            yield f"{key} needs model.precision=bf16: vLLM quantises no fp32 model"
        if self.model.num_experts is not None:
            yield f"{key} does not go with model.num_experts={self.model.num_experts}: refits of experts are untested"
        name, section = ("rlvr", self.rlvr) if self.method == "rlvr" else ("estep", self.estep)
        if self.method != "ntp" and section.importance_cap is None:
            yield f"{key} samples with another policy than the trainer's: set {name}.importance_cap (2, say)"

    @property
    def starts(self) -> dict[str, Path]:
        """Checkpoints that a run begins with, by the keys that name them."""
        if self.method == "rlvr":
            named = {"rlvr.checkpoint": self.rlvr.checkpoint}
        else:
            named = {"warm_start.checkpoint": self.warm_start.checkpoint, "estep.policy": self.estep.policy}
        return {key: Path(value) for key, value in named.items() if value is not None}

    def layout_advice(self, world_size: int) -> str:
        """The nearest layouts of `world_size` processes that would fit, as the end of an error line; "" for none."""
        return layout_advice(self.model, world_size, self.parallel, self._batches())

    def _sections(self) -> tuple[str, ...]:
        """Those that deal out tokens to micro-batches."""
        return ("rlvr",) if self.method == "rlvr" else ("warm_start", "estep", "mstep")

    def _batches(self) -> Batches:
        if self.method == "rlvr":  # rows are filled up to what the layout needs
            return {}
        batches: Batches = {"warm_start": self.warm_start, "mstep": self.mstep}
        return {name: batch for name, batch in batches.items() if batch.steps}
