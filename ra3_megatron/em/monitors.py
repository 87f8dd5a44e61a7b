"""Signs of failure, each with its name, what was seen, and what to change (docs/troubleshooting.md).

Pure functions of figures that are logged anyway; the loop reports what they return in the log, in `metrics.jsonl`,
in TensorBoard and in the report.
"""

from collections.abc import Mapping, Sequence

from ra3_megatron.config.training import MonitorConfig
from ra3_megatron.training.alarms import Alarm


def check_estep(metrics: Mapping[str, float], config: MonitorConfig) -> list[Alarm]:
    """Signs in the metrics of the last updates of an E-step."""
    alarms = []
    rate = metrics["think_rate"]
    if rate > config.max_think_rate:
        alarms.append(
            Alarm(
                "latent price too low",
                f"{rate:.0%} of lines start a thought (more than {config.max_think_rate:.0%})",
                "raise estep.latent_price",
            )
        )
    entropy = metrics["decision_entropy"]
    if entropy < config.min_decision_entropy:
        alarms.append(
            Alarm(
                "entropy collapse",
                f"mean decision entropy is {entropy:.4f} nats (less than {config.min_decision_entropy:g})",
                "raise estep.entropy_coefficient, or lower estep.optimizer.learning_rate",
            )
        )
    alarms += _degenerate(metrics, config)
    return alarms


def check_mstep(
    code_ce: float,
    previous: float,
    raw_code_ce: float,
    previous_raw: float,
    ntp_code_ce: float | None,
    config: MonitorConfig,
) -> list[Alarm]:
    """Signs in held-out cross-entropies of code tokens after an M-step: against before it, and against NTP."""
    alarms = []
    if code_ce >= previous and raw_code_ce >= previous_raw:
        alarms.append(
            Alarm(
                "M-step does not learn",
                f"held-out code cross-entropy went from {previous:.4f} to {code_ce:.4f} nats/token",
                "the latents are noise to the model: raise estep.latent_price or train q longer; "
                "or lower mstep.optimizer.learning_rate",
            )
        )
    if ntp_code_ce is not None and code_ce > ntp_code_ce + config.min_code_ce_change:
        alarms.append(
            Alarm(
                "noisy latents",
                f"held-out code cross-entropy is {code_ce:.4f} nats/token, above NTP's {ntp_code_ce:.4f}",
                "raise estep.latent_price, or lower mstep.thought_weight",
            )
        )
    return alarms


def check_pruning(base: Sequence[float], now: Sequence[float], config: MonitorConfig) -> list[Alarm]:
    """Signs that expert lines which the base model could write have become unlikely: nats of the same held-out lines,
    by the base model and now. RL cannot find again what is never sampled."""
    lost = sum(after - before > config.lost_line_nats for before, after in zip(base, now, strict=True))
    share = lost / len(base) if base else 0.0
    if share <= config.max_lost_lines:
        return []
    return [
        Alarm(
            "pruned actions",
            f"{share:.0%} of held-out lines (more than {config.max_lost_lines:.0%}) cost {config.lost_line_nats:g} "
            "nats more than with the base model",
            "widen the mid-training corpus, mix in base data, or lower mstep.optimizer.learning_rate",
        )
    ]


def _degenerate(metrics: Mapping[str, float], config: MonitorConfig) -> list[Alarm]:
    alarms: list[Alarm] = []
    if metrics.get("thoughts", 0) < config.min_thoughts:
        return alarms
    for key, what in (("identical_thoughts", "are one and the same"), ("copied_thoughts", "copy the line they govern")):
        share = metrics.get(key, 0.0)
        if share > config.max_identical_thoughts:
            alarms.append(
                Alarm(
                    "degenerate latents",
                    f"{share:.0%} of thoughts {what} (more than {config.max_identical_thoughts:.0%})",
                    "raise estep.entropy_coefficient or estep.format_penalty; thoughts that say nothing cannot pay",
                )
            )
    return alarms
