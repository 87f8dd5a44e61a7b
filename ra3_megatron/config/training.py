"""How it is trained: optimizers, the warm start, E-step, M-step and the loop around them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ra3_megatron.config.base import Section


class OptimizerConfig(Section):
    """Adam and its learning-rate schedule within one phase."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""

    min_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate at the end of a schedule that falls (cosine, linear)."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up, over the steps of the phase."""

    warmup_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the phase's steps over which the learning rate rises linearly."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay (not on norms and biases)."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""

    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""

    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}")
        if self.min_learning_rate and self.schedule == "constant":
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} is not read with schedule=constant, which ends where it "
                "began: it goes with cosine, linear"
            )
        return self


class PackedTraining(Section):
    """Next-token prediction on packed sequences: what warm start, M-step and NTP share."""

    steps: int = Field(default=100, ge=0)
    """Optimizer steps of the phase."""

    global_batch_size: int = Field(default=16, ge=1)
    """Sequences of `model.context_length` tokens a step, over all processes."""

    micro_batch_size: int = Field(default=4, ge=1)
    """Sequences a forward pass of one process."""

    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens a forward pass of one process at most; documents are dealt out to micro-batches of about equal cost;
    none: `micro_batch_size` rows."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer of the phase."""

    @model_validator(mode="after")
    def _check(self) -> "PackedTraining":
        if self.micro_batch_tokens is None and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide global_batch_size={self.global_batch_size}"
            )
        return self


class WarmStartConfig(PackedTraining):
    """Next-token prediction from random weights, before the first EM iteration. 0 steps: start from scratch."""

    checkpoint: str | None = None
    """Start from this checkpoint folder instead (then `steps` may go on from it or be 0)."""


class EStepConfig(Section):
    """Policy gradient on q: method.md, E-step."""

    steps: int = Field(default=20, ge=0)
    """Updates of q an EM iteration."""

    documents_per_step: int = Field(default=16, ge=1)
    """Documents whose latents are sampled for one update."""

    group_size: int = Field(default=8, ge=2)
    """G, transcripts sampled of each document; their mean return is the baseline."""

    micro_batch_size: int = Field(default=4, ge=1)
    """Packed sequences a forward pass of one process."""

    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens a forward pass of one process at most; documents are dealt out to micro-batches of about equal cost;
    none: `micro_batch_size` rows."""

    latent_price: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 0.05
    """c, nats charged for each new thought; `inf`: never think, which makes RA3 plain NTP."""

    likelihood: Literal["mean", "sum"] = "mean"
    """log pi(a_t | s_t, z_t) per token of the line, or summed over it."""

    format_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the reward of a line whose thought is empty or was cut at `text.max_latent_tokens`."""

    horizon: int = Field(default=4, ge=1)
    """H, lines whose rewards make up a return (1: the next line only)."""

    discount: float = Field(default=1.0, ge=0, le=1)
    """gamma, weight of each further line in the return."""

    policy: str | None = None
    """Take q from this checkpoint folder (a finished E-step's) instead of training it; `steps` is not read then."""

    estimator: Literal["policy_gradient", "rejection_sampling"] = "policy_gradient"
    """What an update does: the policy gradient of the returns, or imitation of the best of the G transcripts of each
    document and line (`baseline` is not read then)."""

    baseline: Literal["group_mean", "leave_one_out", "no_thought", "none"] = "group_mean"
    """What is subtracted from a return: the mean over the G transcripts of the same document and line (leave_one_out:
    over the others), or what the document gets at that line without any thought (RLP)."""

    normalize_advantages: bool = False
    """Divide advantages by their root mean square over the decisions of the global batch: their standard deviation,
    where `baseline` centres them."""

    entropy_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the entropy bonus of the exact KL; without any, decisions collapse to 0 or 1 in tens of steps."""

    clip_ratio: float | None = Field(default=None, gt=0)
    """PPO clip range of q / q_behaviour; none: plain on-policy gradient."""

    importance_cap: float | None = Field(default=None, gt=0)
    """Truncated importance sampling: weights min(q_trainer / q_engine, cap), without gradient; then the clip range
    is of q / q before the update; none: off."""

    updates_per_rollout: int = Field(default=1, ge=1)
    """Passes over one batch of transcripts (more than 1 needs `clip_ratio`)."""

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=2e-4, schedule="constant", warmup_fraction=0.0, weight_decay=0.0
    )
    """Optimizer of q."""

    @model_validator(mode="after")
    def _check(self) -> "EStepConfig":
        if self.updates_per_rollout > 1 and self.clip_ratio is None:
            raise ValueError(
                f"estep.updates_per_rollout={self.updates_per_rollout} is off-policy: set estep.clip_ratio (0.2, say)"
            )
        if self.estimator == "rejection_sampling" and self.normalize_advantages:
            raise ValueError("estep.normalize_advantages=true does not go with estep.estimator=rejection_sampling")
        return self


class MStepConfig(PackedTraining):
    """Next-token prediction on the infused documents: method.md, M-step."""

    start: Literal["base", "pi", "q"] = "pi"
    """Weights the M-step starts from: the warm start, the last iteration's model, or the E-step's policy. NTP
    has no policy: with `base` it starts from the warm start each time, otherwise from its last model."""

    latents: Literal["sampled", "shuffled", "filler", "moved"] = "sampled"
    """What the infused documents hold: the latents as q sampled them, or, for controls, the same number with other
    contents or places. `shuffled`: each thought in the place of another one; `filler`: as many tokens that say nothing;
    `moved`: each document thinks as often as q did, at random lines (and q writes the thoughts there)."""

    thought_weight: float = Field(default=1.0, ge=0)
    """Weight of thought tokens in the loss (code tokens, and the markers of the `tokens` format that hold a decision,
    weigh 1)."""


class EMConfig(Section):
    """The loop of E-steps and M-steps."""

    iterations: int = Field(default=2, ge=0)
    """EM iterations at most; 0: the warm start alone."""

    stop_without_gain: bool = False
    """Stop after an iteration that did not raise the held-out ELBO."""

    control: bool = True
    """With `method=ra3`, also train NTP on the same number of tokens from the same start."""


class EvaluationConfig(Section):
    """Held-out measurement after the warm start and after every M-step."""

    documents: int = Field(default=200, ge=1)
    """Held-out documents, the same at every measurement."""

    samples: int = Field(default=1, ge=1)
    """Transcripts sampled of each held-out document."""

    observed_thoughts: bool = False
    """With `corpus.human_comments=as_thoughts`, held-out documents keep the comments that stand for thoughts, and q
    decides at the other lines only: an oracle, whose figures are given the right thoughts. Otherwise all thoughts there
    are sampled; figures without thoughts never read one."""

    snippets: int = Field(default=3, ge=0)
    """Infused snippets shown at the end."""


class MonitorConfig(Section):
    """Thresholds at which a sign of failure is reported by name, and what becomes of an update that went wrong."""

    max_think_rate: float = Field(default=0.8, gt=0, le=1)
    """Above this share of lines with a thought, the latent price is called too low."""

    max_identical_thoughts: float = Field(default=0.5, gt=0, le=1)
    """Above this share of one and the same thought, or of thoughts that copy their line, latents are degenerate."""

    min_thoughts: int = Field(default=20, ge=1)
    """Fewer thoughts than this say nothing about degenerate latents."""

    min_code_ce_change: float = Field(default=0.001, ge=0)
    """Differences of held-out code cross-entropy below this (nats per token) are taken for noise."""

    min_decision_entropy: float = Field(default=0.01, ge=0)
    """Below this mean entropy of the decisions (nats), q has collapsed."""

    lost_line_nats: float = Field(default=2.0, gt=0)
    """A held-out line that costs this many nats more than with the base model counts as lost."""

    max_lost_lines: float = Field(default=0.05, gt=0, le=1)
    """Above this share of lost lines, mid-training has pruned actions that are of use."""

    max_log_prob_mismatch: float = Field(default=0.05, gt=0)
    """Above this mean |q_trainer / q_engine - 1| of the same weights, rollout engine and trainer disagree, and the run
    stops."""

    max_fp8_log_prob_mismatch: float = Field(default=0.2, gt=0)
    """The same where the trainer (`model.precision`) or the engine (`rollout.vllm.quantization`) computes in FP8 and
    rounding alone makes some percent."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """An update whose loss or gradient is NaN or infinite: `stop` the run, or `skip` the update. A skipped one
    leaves weights, optimizer and scales of FP8 as they were; data and learning rate go on."""

    spike: Literal["off", "skip", "stop"] = "off"
    """An update whose gradient norm is above `spike_factor` times the median of the last `spike_window` updates of its
    phase that were taken: `off`: it is taken."""

    spike_factor: float = Field(default=10.0, gt=1)
    """How far above the median a gradient norm is a spike."""

    spike_window: int = Field(default=32, ge=2)
    """Updates that the median is of; until a phase has taken so many, nothing is a spike."""

    max_skips: int = Field(default=3, ge=1)
    """Updates that may be skipped one after another; the next one stops the run."""
