"""Do what samples and what trains give the same choices the same probabilities?"""

from collections.abc import Mapping

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig


def require_agreement(section: str, where: str, metrics: Mapping[str, float], config: RunConfig) -> None:
    """UserError when what sampled and the trainer give the same choices other probabilities: training would be on
    transcripts of another policy. Stale transcripts differ by what was learned since, which is not held against them.
    """
    fp8 = config.rollout.vllm.quantization != "none" or config.model.fp8_recipe is not None
    key = "max_fp8_log_prob_mismatch" if fp8 else "max_log_prob_mismatch"
    limit, mismatch = getattr(config.monitors, key), metrics["log_prob_mismatch"]
    if metrics["staleness"] == 0 and mismatch > limit:
        mean, most = metrics["log_prob_difference"], metrics["largest_log_prob_difference"]
        raise UserError(
            f"{where}: rollout engine and trainer disagree: mean |q_trainer / q_engine - 1| is {mismatch:.1%} (limit "
            f"monitors.{key}={limit:g}), |log q_trainer - log q_engine| {mean:.3g} on average, "
            f"{most:.3g} at most; likely causes: weights that did not reach the engine, another precision, attention "
            f"or RoPE; in bf16 or FP8 rounding alone may do it: then raise the limit and set {section}.importance_cap"
        )
