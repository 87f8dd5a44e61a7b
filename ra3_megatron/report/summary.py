"""`summary.json`: the headline figures of a run, typed.

All cross-entropies are in nats per token, rewards and ELBO in nats, times in seconds. Held-out figures are means over
`evaluation.documents`, the same documents for every arm. Only `code_ce` compares with next-token prediction:
`thought_ce` is about tokens that NTP never sees.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.problems import first_problem
from ra3_megatron.report.run_folder import RunFolder, read_json, write_json

REMEDY = "delete it, and the run's command with --resume writes it again"
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Scalar = int | float | str | bool | None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model, measured on the held-out documents, and what it cost."""

    __pydantic_config__ = _STRICT

    code_ce: float
    """Cross-entropy of code tokens, given the thoughts in the context, nats per code token."""
    think_rate: float
    """Share of lines with a new thought."""
    tokens: int
    """Tokens trained on, since random weights or the start of the arm."""
    seconds: float
    """Time spent on them."""
    raw_code_ce: float | None = None
    """Cross-entropy of code tokens without any thoughts, nats per code token: what NTP is judged by."""
    code_accuracy: float | None = None
    """Share of code tokens that greedy decoding would write, given the thoughts in the context."""
    raw_code_accuracy: float | None = None
    """The same without any thoughts."""
    thought_ce: float | None = None
    """Cross-entropy of thought tokens, nats per thought token; None: no thoughts."""
    mean_thought_tokens: float | None = None
    """Mean length of a thought; None: no thoughts."""
    reward: float | None = None
    """Mean reward of a line: log-likelihood minus the price of thoughts, nats."""
    elbo: float | None = None
    """Held-out evidence lower bound, nats per line."""
    tokens_per_second: float | None = None
    """Training throughput; None: nothing was trained."""
    total_seconds: float | None = None
    """Time of everything that the arm took: for RA3 also its E-steps and infusions."""


@dataclass(frozen=True, kw_only=True)
class EStep:
    """What one E-step did to q."""

    __pydantic_config__ = _STRICT

    reward_first: float
    """Mean reward of a line in the first update."""
    reward_last: float
    """Mean reward of a line in the last update."""
    think_rate: float
    """Share of lines with a new thought in the last update."""
    mean_thought_tokens: float | None = None
    """Mean length of a thought in the last update; None: no thoughts."""
    entropy: float | None = None
    """Mean entropy of a decision in the last update, nats."""
    think_rate_first: float | None = None
    """Share of lines with a new thought in the first update."""
    log_prob_mismatch: float | None = None
    """Mean |ratio - 1| between rollout engine and trainer in the last update."""
    steps: int | None = None
    """Updates of q."""
    seconds: float | None = None
    """Time of the E-step."""
    documents_per_second: float | None = None
    """Documents sampled, scored and trained on per second (each with its group of transcripts)."""


@dataclass(frozen=True, kw_only=True)
class Iteration(Arm):
    """An arm after one iteration."""

    iteration: int
    """Number of the iteration, from 1."""
    arm: Literal["ra3", "ntp"]
    """Which arm."""
    estep: EStep | None = None
    """The E-step before it; None for NTP."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Cost of one phase."""

    __pydantic_config__ = _STRICT

    seconds: float
    """Wall-clock time."""
    tokens: int
    """Tokens processed: trained on, or sampled and scored."""
    tokens_per_second: float | None = None
    """Throughput over all processes."""
    documents_per_second: float | None = None
    """Documents per second, where documents are what is counted."""
    flops: float | None = None
    """Arithmetic of matrix products, FLOP (`em/flops.py`)."""


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """A sign of failure that was seen."""

    __pydantic_config__ = _STRICT

    name: str
    """Name of the monitor."""
    message: str
    """What was seen, with the figure and its threshold."""
    advice: str
    """What to change."""
    phase: str
    """Phase in which it fired."""
    iteration: int
    """EM iteration in which it fired."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All of `summary.json`."""

    __pydantic_config__ = _STRICT

    method: Literal["ra3", "ntp"]
    """Method of the run."""
    base: Arm
    """After the warm start."""
    ntp: Arm | None = None
    """Next-token prediction: the method, or the control on the same number of tokens."""
    ra3: Arm | None = None
    """RA3 after its last iteration."""
    iterations: list[Iteration] = field(default_factory=list)
    """Every arm after every iteration."""
    phases: dict[str, Phase] = field(default_factory=dict)
    """Cost of each phase, in the order in which they ran."""
    data: dict[str, Scalar] = field(default_factory=dict)
    """Counts of the corpus: documents, tokens, cut, dropped, …"""
    monitors: list[Monitor] = field(default_factory=list)
    """Signs of failure, in the order in which they were seen."""
    snippets: list[str] = field(default_factory=list)
    """Infused held-out documents to read."""

    @property
    def arms(self) -> dict[str, Arm]:
        """The arms there are, by the name that tables use, in their order."""
        named = {"base": self.base, "NTP": self.ntp, "RA3": self.ra3}
        return {name: arm for name, arm in named.items() if arm is not None}


_ADAPTER = TypeAdapter(Summary)


def write_summary(run_dir: Path | str, summary: Summary) -> Path:
    """Write `summary.json` atomically; its path.

    Raises:
        ValueError: a figure is NaN or infinite; the message names it.
    """
    value = asdict(summary)
    _check_finite("summary", value)
    path = RunFolder(Path(run_dir)).summary
    write_json(path, value)
    return path


def read_summary(run_dir: Path | str) -> Summary:
    """The summary of a run.

    Raises:
        UserError: there is none, or it does not have the form that this version writes.
    """
    path = RunFolder(Path(run_dir)).summary
    if not path.exists():
        raise UserError(f"{path}: no summary; it is written when a run ends")
    try:
        return _ADAPTER.validate_python(read_json(path, REMEDY))
    except ValidationError as error:
        key, said = first_problem(error)
        what = f"{key}: {said}" if key else "is no summary of a run"
        raise UserError(f"{path}: {what}: {REMEDY}") from error


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_finite(f"{name}.{key}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_finite(f"{name}[{index}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: a summary holds finite figures only, or None where there is none")
