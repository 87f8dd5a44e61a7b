"""What becomes of an update whose loss or gradient is wrong: it is taken, skipped, or the run stops.

Two things are wrong: a loss or gradient norm that is not finite, and a gradient norm above `spike_factor` times the
median of the last `spike_window` updates of the phase that were taken. The gradient norm alone, because the E-step's
loss has no scale and no sign; the median, because no single update moves it. Until a phase has taken `spike_window`
updates, and where the median is 0 (no advantages), no gradient is a spike.

Pure decisions of numbers that every process has alike; their history is in the checkpoint, so that a resumed run
decides the same.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from ra3_megatron.config.training import MonitorConfig
from ra3_megatron.mcore.trainer import NonFiniteLoss, RefusedStep
from ra3_megatron.training.alarms import Alarm


def spike(grad_norm: float, taken: Sequence[float], factor: float, window: int) -> str:
    """What makes this gradient norm a spike behind those of updates that were taken; "" when nothing does."""
    last = taken[-window:]
    if len(last) < window:
        return ""
    usual = median(last)
    if usual == 0 or grad_norm <= factor * usual:
        return ""
    return (
        f"gradient norm {grad_norm:.4g} is above {factor:g} times {usual:.4g}, the median of the last {window} updates"
    )


class Spikes:
    """Judges the updates of one phase (`Trainer.judge`)."""

    def __init__(self, config: MonitorConfig) -> None:
        self._config = config
        self.may_skip = "skip" in (config.nonfinite, config.spike)
        self._norms: list[float] = []
        self._in_a_row = 0
        self._skipped: list[str] = []

    def judge(self, loss: float, grad_norm: float) -> str:
        """Why this update is to be skipped; "": it is taken. Raises RefusedStep when the run is to stop."""
        config = self._config
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                if config.nonfinite == "stop":
                    raise NonFiniteLoss(f"{name} is {value}")
                return self._skip(f"{name} is {value}")
        why = "" if config.spike == "off" else spike(grad_norm, self._norms, config.spike_factor, config.spike_window)
        if why and config.spike == "stop":
            raise RefusedStep(why)
        if why:
            return self._skip(why)
        self._norms = [*self._norms, grad_norm][-config.spike_window :]
        self._in_a_row = 0
        return ""

    def skipped(self) -> list[str]:
        """Why the updates since the last call that were skipped were."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable history."""
        return {"norms": self._norms, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._norms, self._in_a_row = list(state["norms"]), state["in_a_row"]

    def _skip(self, why: str) -> str:
        self._in_a_row += 1
        if self._in_a_row > self._config.max_skips:
            raise RefusedStep(
                f"{why}, and {self._config.max_skips} updates before it were skipped (monitors.max_skips)"
            )
        self._skipped.append(why)
        return why


def skipped_step(why: Sequence[str], batch: str) -> Alarm:
    """The warning of a step whose updates were skipped; batch: where the names of its documents are."""
    return Alarm(
        "skipped step",
        "; ".join(dict.fromkeys(why)),
        f"look at its documents in {batch}; lower the learning rate of this phase if it happens often",
    )
