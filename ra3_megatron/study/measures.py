"""The figures that studies compare: those of a run's summary, by name, with title, unit and which way is better."""

from typing import Literal, NamedTuple

Better = Literal["lower", "higher", "neither"]


class Measure(NamedTuple):
    """One figure of an arm."""

    title: str
    """For people, with the unit."""
    better: Better = "neither"
    """Which way is better."""
    form: Literal["number", "tenths", "percent", "count", "seconds"] = "number"
    """How it is written."""


MEASURES: dict[str, Measure] = {
    "code_ce": Measure("code cross-entropy (nats/token)", "lower"),
    "raw_code_ce": Measure("the same without thoughts", "lower"),
    "code_accuracy": Measure("code accuracy (tokens, greedy)", "higher", "percent"),
    "raw_code_accuracy": Measure("code accuracy without thoughts", "higher", "percent"),
    "think_rate": Measure("thinking rate (lines)", "neither", "percent"),
    "mean_thought_tokens": Measure("thought length (tokens)", "neither", "tenths"),
    "thought_ce": Measure("thought cross-entropy (nats/token)"),
    "elbo": Measure("ELBO (nats/line)", "higher"),
    "reward": Measure("reward (nats/line)", "higher"),
    "tokens": Measure("tokens trained on", "neither", "count"),
    "seconds": Measure("time of training on them", "neither", "seconds"),
    "total_seconds": Measure("time with E-steps and infusion", "neither", "seconds"),
    "flops": Measure("FLOPs", "neither", "count"),
}
"""Measures of `results.jsonl`, by key."""
