"""From which weights the M-steps of RA3 and of its control start."""

import math
from pathlib import Path
from typing import Any

import pytest

from ra3_megatron.config.run import RunConfig
from ra3_megatron.em.loop import EM
from ra3_megatron.training.phases import Phase


class Recorded(EM):
    """The loop, with phases that only say what they started from."""

    def __init__(self, **settings: Any) -> None:
        self.config = RunConfig.model_validate(settings)
        self.starts: dict[str, str] = {}

    def _say(self, text: str) -> None:
        pass

    def _check_policy(self) -> None:
        pass

    def _documents(self, iteration: int) -> Any:
        return iteration

    def warm_start(self) -> Path:
        return Path("base")

    def estep(self, iteration: int, pi: Path) -> Path:
        return super().estep(iteration, pi) if math.isinf(self.config.estep.latent_price) else Path(f"q-{iteration}")

    def infuse(self, iteration: int, q: Path) -> Any:
        return iteration

    def evaluate(self, arm: str, iteration: int, model_of: Path) -> dict[str, Any]:
        return {"elbo": 0.0}

    def mstep(self, phase: Phase, start: Path, documents: Any) -> Path:
        assert documents() == phase.iteration
        self.starts[phase.key] = str(start)
        return Path(phase.key)


STARTS = {"pi": ["base", "mstep-1"], "base": ["base", "base"], "q": ["q-1", "q-2"]}
CONTROL = {"pi": ["base", "ntp-1"], "base": ["base", "base"], "q": ["base", "ntp-1"]}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("price", [0.05, math.inf])
def test_the_control_starts_where_the_m_steps_do(start: str, price: float) -> None:
    loop = Recorded(em={"iterations": 2}, mstep={"start": start}, estep={"latent_price": price})
    loop.run_context = None  # type: ignore[assignment]
    loop.run()
    assert [loop.starts[f"ntp-{n}"] for n in (1, 2)] == CONTROL[start]
    without_thoughts = [name.replace("ntp", "mstep") for name in CONTROL[start]]
    expected = STARTS[start] if math.isfinite(price) else without_thoughts
    assert [loop.starts[f"mstep-{n}"] for n in (1, 2)] == expected
