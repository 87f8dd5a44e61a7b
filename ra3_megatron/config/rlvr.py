"""Reinforcement learning with verifiable rewards: `ra3 rlvr`."""

from typing import Literal

from pydantic import Field, model_validator

from ra3_megatron.config.base import Section
from ra3_megatron.config.training import OptimizerConfig

Algorithm = Literal["grpo", "dr_grpo", "rloo", "reinforce"]
ProblemSource = Literal["tasks", "mbpp", "jsonl", "deepcoder", "areal", "livecodebench", "codeforces"]
Sandboxing = Literal["bubblewrap", "subprocess-unsafe"]


class ProblemsConfig(Section):
    """Which problems are given to the policy."""

    source: ProblemSource = "tasks"
    """`tasks`: the generated tasks of `corpus.tasks`; `mbpp`: the MBPP problems that no MBPP+ task is made of; `jsonl`:
    a file of yours (docs/rlvr.md has its schema); `deepcoder`, `areal`, `livecodebench`, `codeforces`: a jsonl file of
    rows of these data sets."""

    path: str | None = None
    """Folder with `mbpp.jsonl`, or the jsonl file; not with `source=tasks`."""

    limit: int | None = Field(default=None, ge=1)
    """Training problems at most; none: all."""

    held_out: int = Field(default=64, ge=0)
    """Problems that are evaluated and never trained on."""

    benchmarks: str | None = None
    """Folder of benchmarks (`*.jsonl`, `*.jsonl.gz` with solutions): training problems that share 13 tokens in a row
    with one of their solutions are left out. none: nothing is compared."""

    @model_validator(mode="after")
    def _check(self) -> "ProblemsConfig":
        if self.source == "tasks" and self.path is not None:
            raise ValueError(f"path={self.path} does not go with source=tasks: leave it out")
        if self.source != "tasks" and self.path is None:
            raise ValueError(f"source={self.source} needs path")
        return self


class RlvrLimits(Section):
    """What a program may use when it is tested; more is a failure of the program."""

    seconds: float = Field(default=10.0, gt=0)
    """Wall-clock seconds of all its tests."""

    memory_mib: int = Field(default=512, ge=32)
    """Memory of all its processes together."""

    workers: int | None = Field(default=None, ge=1)
    """Programs tested at once on each node; none: its cores."""


class RlvrConfig(Section):
    """GRPO and its relatives: groups of responses to each problem, rewarded by executed tests."""

    checkpoint: str | None = None
    """Checkpoint folder whose weights the policy starts from; none: those of `model.hf`."""

    problems: ProblemsConfig = ProblemsConfig()
    """Problems."""

    steps: int = Field(default=100, ge=0)
    """Updates of the policy."""

    problems_per_step: int = Field(default=16, ge=1)
    """Problems whose responses make up one update."""

    group_size: int = Field(default=8, ge=2)
    """G, responses sampled to each problem."""

    max_response_tokens: int = Field(default=512, ge=1)
    """Tokens of a response at most; problem and response must fit into `model.context_length`."""

    think: bool = True
    """Thoughts are allowed in responses (they are dropped before the program is executed). False: tokens that start a
    thought are never sampled."""

    algorithm: Algorithm = "grpo"
    """`grpo`: advantages are rewards minus the mean of the group, divided by its standard deviation; loss per token.
    `dr_grpo`: no division, and the loss of a response is its sum over `max_response_tokens` (arXiv 2503.20783). `rloo`:
    the mean over the others is subtracted, and the loss of a response is its sum, too (arXiv 2402.14740). `reinforce`:
    the mean over the whole batch is subtracted. The keys below override what an algorithm stands for."""

    baseline: Literal["group_mean", "leave_one_out", "batch_mean", "none"] | None = None
    """What is subtracted from a reward; none: as the algorithm says."""

    normalize_std: bool | None = None
    """Divide advantages by the standard deviation of the rewards of the group (with `baseline=batch_mean` or `none`: of
    the batch); none: as the algorithm says."""

    loss: Literal["token", "sequence", "constant"] | None = None
    """`token`: mean over all tokens of the batch (DAPO); `sequence`: mean over the tokens of a response, then over
    responses (GRPO's paper); `constant`: sum over tokens, divided by `max_response_tokens`, then mean over responses
    (Dr. GRPO, RLOO). none: as the algorithm says."""

    clip_ratio: float | None = Field(default=0.2, gt=0, lt=1)
    """PPO clip range of policy / behaviour below 1; none: plain policy gradient."""

    clip_ratio_high: float | None = Field(default=0.28, gt=0)
    """Clip range above 1 (clip-higher, DAPO); none: that below. Not read without `clip_ratio`."""

    importance_cap: float | None = Field(default=None, gt=0)
    """Truncated importance sampling: weights min(policy_trainer / policy_engine, cap), without gradient; then the clip
    range is of policy / policy before the update; none: off."""

    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of KL(policy || start), estimated by k3 = r - log r - 1 with r = start / policy at the sampled tokens; 0:
    off, and no second model is kept."""

    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of an entropy bonus on the sampled tokens' distributions."""

    dynamic_sampling: bool = False
    """Leave out groups whose rewards are all equal, which have no gradient, and sample further problems in their place
    (DAPO)."""

    max_sampling_rounds: int = Field(default=4, ge=1)
    """Batches of problems sampled for one update at most, with `dynamic_sampling`."""

    overlong: Literal["mask", "keep"] = "mask"
    """A response that was cut at `max_response_tokens`: left out of the loss, or kept with the reward it got."""

    updates_per_rollout: int = Field(default=1, ge=1)
    """Passes over one batch of responses (more than 1 needs `clip_ratio`)."""

    micro_batch_size: int = Field(default=4, ge=1)
    """Packed sequences a forward pass of one process."""

    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens a forward pass of one process at most; none: `micro_batch_size` rows."""

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-6, schedule="constant", warmup_fraction=0.0, weight_decay=0.0
    )
    """Optimizer of the policy."""

    evaluation_interval: int = Field(default=10, ge=1)
    """Updates between evaluations on the held-out problems (one is always made before the first update and at the
    end)."""

    evaluation_samples: int = Field(default=1, ge=1)
    """Responses sampled to each held-out problem."""

    limits: RlvrLimits = RlvrLimits()
    """What a program may use when it is tested."""

    @model_validator(mode="after")
    def _check(self) -> "RlvrConfig":
        if self.updates_per_rollout > 1 and self.clip_ratio is None:
            raise ValueError(f"updates_per_rollout={self.updates_per_rollout} is off-policy: set clip_ratio (0.2, say)")
        baseline = self.baseline or ("batch_mean" if self.algorithm == "reinforce" else "group_mean")
        if self.dynamic_sampling and baseline in ("batch_mean", "none"):
            raise ValueError(
                "dynamic_sampling=true leaves out groups of equal rewards, which have a gradient with "
                f"baseline={baseline}: use baseline=group_mean or leave_one_out"
            )
        return self
