"""A made run folder: every file that a run leaves, curves of plausible shape, figures that are nobody's result."""

import math
import random
from pathlib import Path

from ra3_megatron.report.metrics import MetricsWriter
from ra3_megatron.report.run_folder import write_json, write_text
from ra3_megatron.report.summary import Arm, EStep, Iteration, Monitor, Phase, Summary, write_summary
from ra3_megatron.report.transcripts import LineRecord, TranscriptRecord, write_transcripts

SNIPPET = """def clamp(value, low, high):
    # check the lower bound
    if value < low:
        return low
    # then the upper <b>one</b>
    if value > high:
        return high
    return value
"""

TOKENS_SNIPPET = """<act>def half(value):
<think>integer division</think>    # the expert's comment
<act>    return value // 2
"""

CONFIG = """method: ra3
run_dir: runs/made
seed: 1234
estep:
  latent_price: 0.05  # <nats>
"""


def arm(code_ce: float, **figures: float | int | None) -> Arm:
    values: dict = {"think_rate": 0.0, "tokens": 1_234_567, "seconds": 84.2, "tokens_per_second": 14_661.5}
    return Arm(code_ce=code_ce, **{**values, **figures})


def make_summary() -> Summary:
    thinking = {"think_rate": 0.2871, "thought_ce": 3.0125, "mean_thought_tokens": 5.43, "reward": -1.91, "elbo": -14.2}
    cost = {"tokens": 600_000, "seconds": 41.0, "tokens_per_second": 14_634.1}
    return Summary(
        method="ra3",
        base=arm(2.4021, think_rate=0.0312, thought_ce=4.2, mean_thought_tokens=7.9, reward=-2.31, elbo=-16.8),
        ntp=arm(2.1744),
        ra3=arm(2.1689, **thinking),
        iterations=[
            Iteration(iteration=1, arm="ra3", code_ce=2.28, **thinking, **cost, estep=make_estep(-2.3)),
            Iteration(iteration=1, arm="ntp", code_ce=2.27, think_rate=0.0, **cost),
            Iteration(iteration=2, arm="ra3", code_ce=2.1689, **thinking, **cost, estep=make_estep(-2.1)),
            Iteration(iteration=2, arm="ntp", code_ce=2.1744, think_rate=0.0, **cost),
        ],
        phases={
            "warm start": Phase(seconds=84.2, tokens=1_234_567, tokens_per_second=14_661.5),
            "E-step 1": Phase(seconds=61.0, tokens=812_000, tokens_per_second=13_311.5, documents_per_second=5.2),
            "M-step 1": Phase(seconds=41.0, tokens=600_000, tokens_per_second=14_634.1),
        },
        data={"documents": 8123, "tokens": 1_402_554, "cut": 12, "dropped": 0},
        monitors=[
            Monitor(
                name="think_rate",
                message="0.91 of lines start a thought (threshold 0.80)",
                advice="raise estep.latent_price",
                phase="estep",
                iteration=2,
            )
        ],
        snippets=[SNIPPET, TOKENS_SNIPPET],
    )


def make_estep(reward: float) -> EStep:
    return EStep(
        reward_first=reward, reward_last=reward + 0.2, think_rate=0.3, mean_thought_tokens=5.5, entropy=0.21, steps=20
    )


def write_made_metrics(run_dir: Path, tensorboard: bool = False) -> None:
    """Metrics of a warm start and two EM iterations with their controls."""
    draw = random.Random(0)
    with MetricsWriter(run_dir, tensorboard=tensorboard) as writer:

        def train(phase: str, iteration: int, steps: int, first: float, last: float, thoughts: bool = False) -> None:
            for step in range(1, steps + 1):
                loss = last + (first - last) * math.exp(-4 * step / steps) + draw.gauss(0, 0.03)
                values = {"loss": loss, "code_ce": loss, "grad_norm": 1 + draw.random(), "learning_rate": 1e-3}
                values |= {"tokens_per_second": 14_000 + draw.gauss(0, 300), "seconds": 0.56}
                values |= {"seconds_forward": 0.168, "seconds_backward": 0.336, "seconds_optimizer": 0.056}
                values |= {"seconds_other": 0.0, "seconds_checkpoint": 0.7 * (step % 20 == 1), "peak_memory_gib": 41.5}
                if thoughts:
                    values["thought_ce"] = loss + 1.2
                writer.write(phase, iteration, step, values)

        train("warm_start", 0, 100, 8.3, 2.6)
        writer.write("evaluation", 0, 0, {"arm": "base", "code_ce": 2.4021, "think_rate": 0.03})
        for iteration in (1, 2):
            for step in range(1, 21):
                values = {
                    "reward": -2.3 + 0.2 * (1 - math.exp(-step / 5)) + draw.gauss(0, 0.02),
                    "think_rate": 0.05 + 0.02 * step,
                    "mean_thought_tokens": 8 - 0.1 * step,
                    "decision_entropy": 0.2 + 0.05 * draw.random(),
                    "advantage_std": 0.3 + 0.05 * draw.random(),
                    "grad_norm": 0.5 + draw.random(),
                    "log_prob_mismatch": 1e-4 * (1 + draw.random()),
                    "largest_log_prob_difference": 1e-3 * (1 + draw.random()),
                    "refit_seconds": 0.1 + 0.05 * draw.random(),
                    **dict.fromkeys(("seconds_sampling", "seconds_scoring"), 0.75),
                    "seconds": 2.0,
                    "seconds_refit": 0.498,
                    "seconds_other": 0.002,
                    "peak_memory_gib": step / 8,
                }
                writer.write("estep", iteration, step, values)
            train("mstep", iteration, 40, 2.5, 2.3, thoughts=True)
            train("ntp", iteration, 40, 2.5, 2.3)
            writer.write("evaluation", iteration, 0, {"arm": "ra3", "code_ce": 2.4 - 0.11 * iteration})
            writer.write("evaluation", iteration, 0, {"arm": "ntp", "code_ce": 2.4 - 0.1 * iteration})
        warning = {"monitor": "think_rate", "message": "0.91 of lines", "advice": "raise estep.latent_price"}
        writer.write("estep", 2, 20, warning)


def make_transcripts(document: str = "json/decoder.py:12", step: int = 20) -> list[TranscriptRecord]:
    """Two rollouts of one document."""
    lines = [
        LineRecord(text="def scan(text):\n", offered=False, reward=-1.5, log_likelihood=-1.5),
        LineRecord(
            text="    total = 0\n\n",
            thought="# start at zero\n",
            log_prob=-3.25,
            reward=-0.55,
            log_likelihood=-0.5,
            advantage=0.125,
        ),
        LineRecord(text="    return total\n", log_prob=-0.0625, reward=-0.75, log_likelihood=-0.75, advantage=-0.5),
    ]
    return [
        TranscriptRecord(document=document, iteration=1, step=step, rollout=rollout, weight_version=7, lines=lines)
        for rollout in range(2)
    ]


def make_run(run_dir: Path, tensorboard: bool = False) -> Path:
    """A finished run."""
    write_text(run_dir / "config.yaml", CONFIG)
    manifest = {
        "source": "installed",
        "documents": 8123,
        "files": [{"path": f"m{i}.py", "hash": "0a"} for i in range(99)],
    }
    write_json(run_dir / "manifest.json", manifest)
    layers = {"fp8_tensorwise": ["1.linear_qkv", "1.linear_proj"], "bf16": ["0.linear_qkv"]}
    phases = {"warm_start": layers, "estep-1": {}}
    kernels = {"linear layers": "Transformer Engine"}
    write_json(run_dir / "precision.json", {"asked": "fp8_tensorwise", "kernels": kernels, "phases": phases})
    write_json(run_dir / "versions.json", {"python": "3.11.9", "packages": {"torch": "2.13.0", "vllm": None}})
    write_made_metrics(run_dir, tensorboard)
    write_transcripts(run_dir, "estep-1-0020", make_transcripts())
    write_summary(run_dir, make_summary())
    return run_dir
